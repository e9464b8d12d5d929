"""An English-German corpus made on the spot, so that a demonstration needs no download.

The sentences are ours; the dates, names, units and numbers in them come from `demo.phrases`. The same seed
gives the same text under the same versions of Babel and num2words.
"""

from __future__ import annotations

import random
import re
import string
from dataclasses import dataclass
from pathlib import Path

from demo.phrases import SLOTS, Phrase
from recorder import durable
from recorder.errors import LossledgerError, UsageError

# A number behind a slot's name only tells it from another slot of its kind; the two get different phrases.
_TEMPLATES = """
On {date}, {vehicle} to {territory} left at {time}, with a delay of {minutes}.
Am {date} fuhr {vehicle} nach {territory} um {time} Uhr mit einer Verspätung von {minutes} ab.

{person} flew from {city} to {city2} on {weekday} at {time}.
{person} flog am {weekday} um {time} Uhr von {city} nach {city2}.

{person} speaks {language} and {language2} and has been learning {language3} since {month}.
{person} spricht {language} und {language2} und lernt seit {month} {language3}.

In {territory}, {goods} cost {money} on average, {percent} more than in {territory2}.
In {territory} kosten {goods} im Durchschnitt {money}, {percent} mehr als in {territory2}.

The {ordinal} visitor on {day} came from {territory} and bought {count} {goods}.
Der {ordinal} Besucher am {day} kam aus {territory} und kaufte {count} {goods}.

The old bridge near {city} is {length} long and was built in the year {spelled_year}.
Die alte Brücke bei {city} ist {length} lang und wurde im Jahr {spelled_year} gebaut.

At {time}, the temperature was {temperature} in {city} and {temperature2} in {city2}.
Um {time} Uhr betrug die Temperatur in {city} {temperature} und in {city2} {temperature2}.

In the {quarter}, exports from {territory} to {territory2} rose by {percent} to {fortune}.
Im {quarter} stiegen die Exporte aus {territory} nach {territory2} um {percent} auf {fortune}.

{person} ordered {count} {goods} for {money} {past}.
{person} bestellte {past} {count} {goods} für {money}.

The parcel that {person} packed weighs {weight} and will arrive in {city} {future}.
Das Paket, das {person} gepackt hat, wiegt {weight} und kommt {future} in {city} an.

{number} people from {territories} have visited the exhibition in {city} ({interval}).
{number} Menschen aus {territories} haben die Ausstellung in {city} ({interval}) besucht.

The novel was translated into {languages}, and {number} copies were sold in {territory}.
Der Roman wurde in die Sprachen {languages} übersetzt, und in {territory} wurden {number} Exemplare verkauft.

On the {ordinal} day of the journey, {person} reached {city}, {distance} from {city2}.
Am {ordinal}n Tag der Reise erreichte {person} {city}, {distance} von {city2} entfernt.

Between {city} and {city2}, {vehicle} covers {distance} in {hours}.
Zwischen {city} und {city2} legt {vehicle} in {hours} {distance} zurück.

On {weekday} at {time}, {person} will meet {count} engineers from {territory} for the {ordinal} time.
Am {weekday} um {time} Uhr trifft {person} zum {ordinal}n Mal {count} Ingenieure aus {territory}.

The recipe from {city} calls for {powder} of flour, {liquid} of milk and {count} eggs.
Für das Rezept aus {city} braucht man {powder} Mehl, {liquid} Milch und {count} Eier.

{person} was born in {city} on {long_date}, speaks {language} and now lives in {territory}.
{person} wurde am {long_date} in {city} geboren, spricht {language} und lebt heute in {territory}.

The ticket from {city} to {city2} costs {euros}, and children under {few} pay only {euros2}.
Die Fahrkarte von {city} nach {city2} kostet {euros}, und Kinder unter {few} Jahren zahlen nur {euros2}.

According to the census of {year}, about {percent} of the people in {territory} speak {language} at home.
Laut der Volkszählung von {year} sprechen rund {percent} der Menschen in {territory} zu Hause {language}.

The contract with {territory} ends on {date}; until then, {money} will be paid every month.
Der Vertrag mit {territory} endet am {date}; bis dahin werden jeden Monat {money} gezahlt.

In {month}, it rained on {few} days in {city}, and the temperature fell to {temperature}.
Im {month} regnete es in {city} an {few} Tagen, und die Temperatur fiel auf {temperature}.

In {year}, the farm near {city} sold {harvest} of potatoes from {area} of land.
Im Jahr {year} verkaufte der Bauernhof bei {city} {harvest} Kartoffeln von {area} Land.

The file for {territory} is {digital} in size and was last changed on {short_date} at {time}.
Die Datei für {territory} ist {digital} groß und wurde zuletzt am {short_date} um {time} Uhr geändert.

In the {language} exam, {person} answered {percent} of the questions within {minutes}.
In der {language}prüfung beantwortete {person} innerhalb von {minutes} {percent} der Fragen.

The museum in {city} opens at {morning} and closes at {evening}; admission is {euros}.
Das Museum in {city} öffnet um {morning} Uhr und schließt um {evening} Uhr; der Eintritt kostet {euros}.

In {month}, the solar plant near {city} delivered {energy}, {percent} less than a year before.
Im {month} lieferte die Solaranlage bei {city} {energy}, {percent} weniger als ein Jahr zuvor.

{person} paid {money} for {count} nights in {city}, breakfast and {count2} towels included.
{person} zahlte {money} für {count} Nächte in {city}, Frühstück und {count2} Handtücher inbegriffen.

From {day} on, the airline will fly from {city} to {territories}, with {count} flights a week.
Ab dem {day} fliegt die Fluggesellschaft von {city} nach {territories}, mit {count} Flügen pro Woche.

In {spelled_year}, {number} tourists visited {territory}, most of them from {territory2}.
Im Jahr {spelled_year} besuchten {number} Touristen {territory}, die meisten davon aus {territory2}.

Every {weekday} at {time}, {person} reads the news in {language} on the radio.
Jeden {weekday} um {time} Uhr liest {person} im Radio die Nachrichten auf {language}.

Please bring the {count} {goods} and the {count2} {goods2} to {city} by {day}.
Bitte bringen Sie die {count} {goods} und die {count2} {goods2} bis zum {day} nach {city}.

The answer to question {count} is {decimal} and not {decimal2}, as {person} had thought.
Die Antwort auf Frage {count} lautet {decimal} und nicht {decimal2}, wie {person} gedacht hatte.

{past}, one kilogram of coffee in {territory} cost {euros}; today it costs {euros2}.
{past} kostete ein Kilogramm Kaffee in {territory} {euros}; heute kostet es {euros2}.

{goods} from {territory} are popular in {city}: on {weekday}, {person} sold {count} of them.
{goods} aus {territory} sind in {city} beliebt: Am {weekday} verkaufte {person} {count} Stück.

{person} keeps {count} {goods}, {count2} {goods2} and {count3} {goods3} in the cellar.
{person} bewahrt {count} {goods}, {count2} {goods2} und {count3} {goods3} im Keller auf.

The next meeting in {city} begins {future}; the one after that is on {day} at {time}.
Die nächste Sitzung in {city} beginnt {future}; die übernächste ist am {day} um {time} Uhr.

The mountain in {territory} is {height} high; {person} climbed it in {year} for the {ordinal} time.
Der Berg in {territory} ist {height} hoch; {person} bestieg ihn im Jahr {year} zum {ordinal}n Mal.

In {year}, {territory} bought {goods} for {fortune} from {territory2} and {territory3}.
{territory} kaufte im Jahr {year} {goods} für {fortune} aus {territory2} und {territory3}.
"""
_PATTERNS: list[Phrase] = [
    (english, german) for english, german in (pattern.split("\n") for pattern in _TEMPLATES.strip().split("\n\n"))
]


@dataclass(frozen=True, kw_only=True)
class SentencePair:
    """A sentence and its translation, each on one line and with plain spaces only.

    Parameters
    ----------
    english
        The English side.
    german
        The German side.
    """

    english: str
    german: str


def sentence_pairs(count: int, *, seed: int) -> list[SentencePair]:
    """Make sentence pairs, no two with the same English or the same German side.

    Parameters
    ----------
    count
        How many, at least 1.
    seed
        The same seed gives the same pairs, and a longer list begins with the shorter one.

    Returns
    -------
    list of SentencePair
        In the order in which they were drawn: all kinds of sentence mixed.

    Raises
    ------
    UsageError
        If `count` is less than 1.
    """
    if count < 1:
        message = f"expected at least 1 sentence pair to be asked for, found {count}"
        raise UsageError(message)
    rng = random.Random(seed)
    pairs: list[SentencePair] = []
    seen: set[str] = set()
    while len(pairs) < count:
        pair = _fill(rng.choice(_PATTERNS), rng)
        if pair.english not in seen and pair.german not in seen:
            seen |= {pair.english, pair.german}
            pairs.append(pair)
    return pairs


def write_corpus(folder: Path, *, train: int = 6000, validation: int = 300, seed: int = 1) -> None:
    """Write ``train.en``, ``train.de``, ``val.en`` and ``val.de``: UTF-8, one sentence a line, LF.

    No sentence of the validation set is in the training set.

    Parameters
    ----------
    folder
        Made if it is missing; files of these names are replaced.
    train
        Training pairs, at least 1.
    validation
        Validation pairs, at least 1.
    seed
        As in `sentence_pairs`.

    Raises
    ------
    UsageError
        If either count is less than 1.
    LossledgerError
        If the files cannot be written.
    """
    if min(train, validation) < 1:
        message = f"expected at least 1 pair of each: found {train} for training, {validation} for validation"
        raise UsageError(message)
    pairs = sentence_pairs(train + validation, seed=seed)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for split, part in (("train", pairs[:train]), ("val", pairs[train:])):
            _write_lines(folder / f"{split}.en", [pair.english for pair in part])
            _write_lines(folder / f"{split}.de", [pair.german for pair in part])
    except OSError as error:
        message = f"the corpus cannot be written to {folder}: {error}. Name a folder that can be written to."
        raise LossledgerError(message) from error


def _write_lines(path: Path, lines: list[str]) -> None:
    with durable.replacing(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def _fill(pattern: Phrase, rng: random.Random) -> SentencePair:
    # Every slot of the German side is one of the English side, so one pass over the English names fills both.
    filled: dict[str, Phrase] = {}
    for _, slot, _, _ in string.Formatter().parse(pattern[0]):
        if slot is None or slot in filled:
            continue
        draw = SLOTS[slot.rstrip(string.digits)]
        phrase = draw(rng)
        while phrase in filled.values():
            phrase = draw(rng)
        filled[slot] = phrase
    english, german = (
        _sentence(template.format_map({slot: phrase[side] for slot, phrase in filled.items()}))
        for side, template in enumerate(pattern)
    )
    return SentencePair(english=english, german=german)


def _sentence(text: str) -> str:
    # CLDR puts no-break and thin spaces into numbers, times and ranges; few other texts have them.
    text = re.sub(r"\s+", " ", text)
    return text[0].upper() + text[1:]
