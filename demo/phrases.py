"""Phrases in English and German, drawn from Babel's CLDR data and num2words, to fill a sentence's slots."""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable

from recorder.errors import LossledgerError

try:
    from babel import Locale, dates, lists, numbers, units
    from num2words import num2words
except ModuleNotFoundError as error:
    message = f"the demonstration's text cannot be made ({error}). Install: pip install 'lossledger[demo]'"
    raise LossledgerError(message) from error

Phrase = tuple[str, str]  # English, German
Draw = Callable[[random.Random], Phrase]

# Each noun in the one form that the templates use: people and vehicles in the nominative singular with their
# article, goods in the plural without one, where the German nominative and accusative agree.
_NOUNS = {
    "person": """
        the minister = die Ministerin | the teacher = der Lehrer | the doctor = die Ärztin
        my sister = meine Schwester | our neighbor = unser Nachbar | my uncle = mein Onkel
        the captain = der Kapitän | the engineer = die Ingenieurin | the young artist = die junge Künstlerin
        the old farmer = der alte Bauer | the baker = der Bäcker | the new mayor = der neue Bürgermeister
        the violinist = die Geigerin | the tall guest = der große Gast | our grandmother = unsere Großmutter
        the journalist = der Journalist | the lawyer = die Anwältin | the tired student = der müde Student
        the gardener = die Gärtnerin | the cook = der Koch
    """,
    "vehicle": """
        the train = der Zug | the night train = der Nachtzug | the bus = der Bus | the ferry = die Fähre
        the steamship = das Dampfschiff | the express train = der Schnellzug
        the delivery van = der Lieferwagen
    """,
    "goods": """
        books = Bücher | oranges = Orangen | bicycles = Fahrräder | umbrellas = Regenschirme | chairs = Stühle
        candles = Kerzen | watches = Uhren | postcards = Postkarten | apples = Äpfel | bottles = Flaschen
        violins = Geigen | maps = Landkarten | coats = Mäntel | keys = Schlüssel | knives = Messer
        cups = Tassen | shoes = Schuhe | mirrors = Spiegel | paintings = Gemälde | lamps = Lampen
        carpets = Teppiche | hats = Hüte | spoons = Löffel | pumpkins = Kürbisse | onions = Zwiebeln
        suitcases = Koffer
    """,
}

# Chosen by hand: names that take no article in either language and stay the same after "in", "aus", "nach".
# CLDR does not mark those that do ("die Schweiz", "der Iran", "die Vereinigten Staaten", "the Philippines").
_TERRITORIES = """
    AD AF AL AM AO AR AT AU AZ BA BD BE BF BG BI BJ BO BR BT BW BY BZ CA CL CM CN CO CR CU CY CZ DE DJ DK
    DZ EC EE EG ER ES ET FI FR GA GE GH GL GN GQ GR GT GW GY HN HR HT HU ID IE IL IN IS IT JO JP KE KG KH
    KP KR KW KZ LA LI LK LR LS LT LU LV LY MA MC ME MK ML MR MT MW MX MY MZ NA NC NG NI NO NP NZ PA PE PG
    PK PL PT PY QA RO RS RU RW SA SE SG SI SL SM SO SR SY SZ TG TH TJ TL TM TN TW TZ UG UY UZ VE VN ZA ZM
    ZW
"""

# Likewise: one word each and undeclined after "auf" and before "-prüfung" (not "Norwegisch (Bokmål)").
_LANGUAGES = """
    ar bg bn ca cs cy da de el en eo es et eu fi fo fr gl gu he hi hr hu hy id is it ja ka kk ko lb lt lv
    mk mn mt nl pl pt ro ru sk sl sq sr sv ta te th tr uk ur uz vi zh zu
"""

# Only those whose German plural in CLDR is the one in use (CLDR has "Rumänische Leu" where people say "Lei").
_CURRENCIES = """
    EUR USD GBP CHF SEK NOK DKK PLN CZK HUF CAD AUD NZD INR JPY MXN CNY KRW THB ISK EGP ARS SGD KES
"""

_TIME_ZONES = """
    Africa/Algiers Africa/Cairo Africa/Lagos Africa/Nairobi Africa/Tripoli Africa/Tunis America/Bogota
    America/Chicago America/Havana America/Lima America/Los_Angeles America/New_York Asia/Baghdad
    Asia/Baku Asia/Bangkok Asia/Beirut Asia/Damascus Asia/Jerusalem Asia/Kabul Asia/Seoul Asia/Shanghai
    Asia/Tashkent Asia/Tehran Asia/Tokyo Australia/Sydney Europe/Amsterdam Europe/Athens Europe/Belgrade
    Europe/Berlin Europe/Brussels Europe/Bucharest Europe/Budapest Europe/Copenhagen Europe/Dublin
    Europe/Helsinki Europe/Istanbul Europe/Lisbon Europe/London Europe/Madrid Europe/Moscow Europe/Oslo
    Europe/Paris Europe/Prague Europe/Riga Europe/Rome Europe/Sofia Europe/Stockholm Europe/Vienna
    Europe/Vilnius Europe/Warsaw Europe/Zagreb Europe/Zurich
"""

# slot: CLDR's unit, the least number (at least 2: every unit is in the plural), the greatest, decimals.
# Times in minutes and hours only: "Tage" and "Monate" would need their dative after "in" and "von".
_MEASURES = {
    "length": ("length-meter", 20, 2500, 0),
    "height": ("length-meter", 600, 6900, 0),
    "distance": ("length-kilometer", 12, 3400, 0),
    "minutes": ("duration-minute", 2, 59, 0),
    "hours": ("duration-hour", 2, 48, 0),
    "weight": ("mass-kilogram", 2, 60, 1),
    "powder": ("mass-gram", 50, 990, 0),
    "liquid": ("volume-milliliter", 50, 900, 0),
    "temperature": ("temperature-celsius", 2, 38, 1),
    "area": ("area-hectare", 5, 900, 1),
    "harvest": ("mass-tonne", 3, 800, 1),
    "digital": ("digital-megabyte", 2, 999, 1),
    "energy": ("energy-kilowatt-hour", 1000, 99999, 0),
}


def _both(write: Callable[[str], str]) -> Phrase:
    return write("en"), write("de")


def _one_of(choices: list[Phrase]) -> Draw:
    return lambda rng: rng.choice(choices)


def _day(rng: random.Random) -> datetime.date:
    return datetime.date(1950, 1, 1) + datetime.timedelta(days=rng.randrange(75 * 365))


def _dated(pattern: str) -> Draw:
    def draw(rng: random.Random) -> Phrase:
        day = _day(rng)
        return _both(lambda locale: dates.format_date(day, pattern, locale=locale))

    return draw


def _day_and_month(rng: random.Random) -> Phrase:
    day = _day(rng)
    return _both(lambda locale: dates.format_skeleton("MMMMd", day, locale=locale))


def _quarter(rng: random.Random) -> Phrase:
    day = _day(rng)
    english, german = _both(lambda locale: dates.format_date(day, "QQQQ", locale=locale))
    return f"{english} of {day.year}", f"{german} {day.year}"


def _interval(rng: random.Random) -> Phrase:
    first = _day(rng)
    last = first + datetime.timedelta(days=rng.randint(2, 40))
    return _both(lambda locale: dates.format_interval(first, last, "yMMMd", locale=locale))


def _time(first_hour: int, last_hour: int) -> Draw:
    def draw(rng: random.Random) -> Phrase:
        time = datetime.time(rng.randint(first_hour, last_hour), rng.randrange(60))
        return _both(lambda locale: dates.format_time(time, "short", locale=locale))

    return draw


def _relative(*, sign: int) -> Draw:
    def draw(rng: random.Random) -> Phrase:
        hours = rng.choice((1, 24, 7 * 24, 31 * 24)) * rng.randint(2, 6)
        delta = datetime.timedelta(hours=sign * hours)
        return _both(lambda locale: dates.format_timedelta(delta, add_direction=True, locale=locale))

    return draw


def _measure(unit: str, least: int, greatest: int, digits: int) -> Draw:
    def draw(rng: random.Random) -> Phrase:
        amount = rng.randint(least * 10**digits, greatest * 10**digits) / 10**digits
        return _both(lambda locale: units.format_unit(amount, unit, locale=locale))

    return draw


def _money(rng: random.Random) -> Phrase:
    amount, currency = rng.randint(200, 200_000) / 100, rng.choice(_CURRENCIES.split())
    return _both(lambda locale: numbers.format_currency(amount, currency, locale=locale, format_type="name"))


def _fortune(rng: random.Random) -> Phrase:
    amount, currency = rng.randint(20, 9000) * 10 ** rng.choice((5, 8)), rng.choice(_CURRENCIES.split())

    def write(locale: str) -> str:
        figure = numbers.format_compact_decimal(amount, format_type="long", locale=locale, fraction_digits=1)
        return f"{figure} {numbers.get_currency_name(currency, count=amount, locale=locale)}"

    return _both(write)


def _euros(rng: random.Random) -> Phrase:
    amount = rng.randint(100, 9999) / 100
    return _both(lambda locale: numbers.format_currency(amount, "EUR", locale=locale))


def _percent(rng: random.Random) -> Phrase:
    share = rng.randint(11, 989) / 1000
    return _both(lambda locale: numbers.format_percent(share, locale=locale, decimal_quantization=False))


def _decimal(least: int, greatest: int, digits: int) -> Draw:
    def draw(rng: random.Random) -> Phrase:
        number = rng.randint(least, greatest) / 10**digits
        return _both(lambda locale: numbers.format_decimal(number, locale=locale))

    return draw


def _year(rng: random.Random) -> Phrase:
    year = str(rng.randint(1850, 2030))
    return year, year


def _spelled(kind: str, least: int, greatest: int) -> Draw:
    def draw(rng: random.Random) -> Phrase:
        number = rng.randint(least, greatest)
        return _both(lambda locale: str(num2words(number, lang=locale, to=kind)))

    return draw


def _listed(names: list[Phrase]) -> Draw:
    def draw(rng: random.Random) -> Phrase:
        chosen = rng.sample(names, rng.randint(2, 4))
        english, german = zip(*chosen, strict=True)
        return lists.format_list(english, locale="en"), lists.format_list(german, locale="de")

    return draw


def _named(kind: str, codes: str) -> list[Phrase]:
    def name(locale: str, code: str) -> str:
        return str(getattr(Locale(locale), kind)[code])

    return [(name("en", code), name("de", code)) for code in codes.split()]


def _cities() -> list[Phrase]:
    def name(locale: str, zone: str) -> str:
        return dates.get_timezone_location(zone, locale=locale, return_city=True)

    return [(name("en", zone), name("de", zone)) for zone in _TIME_ZONES.split()]


def _nouns(kind: str) -> list[Phrase]:
    entries = (entry.split(" = ") for line in _NOUNS[kind].strip().splitlines() for entry in line.split(" | "))
    return [(english.strip(), german.strip()) for english, german in entries]


_TERRITORY_NAMES = _named("territories", _TERRITORIES)
_LANGUAGE_NAMES = _named("languages", _LANGUAGES)

SLOTS: dict[str, Draw] = {
    **{kind: _one_of(_nouns(kind)) for kind in _NOUNS},
    **{kind: _measure(*measure) for kind, measure in _MEASURES.items()},
    "territory": _one_of(_TERRITORY_NAMES),
    "territories": _listed(_TERRITORY_NAMES),
    "language": _one_of(_LANGUAGE_NAMES),
    "languages": _listed(_LANGUAGE_NAMES),
    "city": _one_of(_cities()),
    "date": _dated("full"),
    "long_date": _dated("long"),
    "short_date": _dated("medium"),
    "weekday": _dated("EEEE"),
    "month": _dated("LLLL y"),
    "day": _day_and_month,
    "quarter": _quarter,
    "interval": _interval,
    "time": _time(0, 23),
    "morning": _time(7, 11),
    "evening": _time(16, 21),
    "past": _relative(sign=-1),
    "future": _relative(sign=1),
    "money": _money,
    "fortune": _fortune,
    "euros": _euros,
    "percent": _percent,
    "number": _decimal(1_000, 999_999, digits=0),
    "decimal": _decimal(101, 99_999, digits=2),
    "year": _year,
    "spelled_year": _spelled("year", 1850, 2030),
    "count": _spelled("cardinal", 2, 99),
    "few": _spelled("cardinal", 2, 19),
    "ordinal": _spelled("ordinal", 2, 99),
}
