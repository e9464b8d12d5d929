"""The made corpus: repeatable, parallel, and really in both languages."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import pytest
from num2words import num2words

from demo.corpus import SentencePair, sentence_pairs, write_corpus
from recorder.errors import LossledgerError, UsageError

PAIRS = sentence_pairs(3000, seed=7)


def _swap_separators(number: str) -> str:
    return number.translate(str.maketrans(",.", ".,"))


def test_the_same_seed_gives_the_same_pairs() -> None:
    assert sentence_pairs(500, seed=7) == PAIRS[:500]


def test_another_seed_gives_other_pairs() -> None:
    others = sentence_pairs(500, seed=8)
    assert len({pair.english for pair in others} & {pair.english for pair in PAIRS}) < 5


def test_no_side_repeats() -> None:
    assert len({pair.english for pair in PAIRS}) == len(PAIRS)
    assert len({pair.german for pair in PAIRS}) == len(PAIRS)


@pytest.mark.parametrize("side", ["english", "german"])
def test_each_side_is_one_line_of_plain_spaces(side: str) -> None:
    for pair in PAIRS:
        sentence: str = getattr(pair, side)
        assert sentence == " ".join(sentence.split()), sentence
        odd = [
            c
            for c in sentence
            if c != " " and (unicodedata.category(c)[0] in "ZC" or unicodedata.normalize("NFC", c) != c)
        ]
        assert not odd, (sentence, odd)
        assert sentence.endswith("."), sentence
        assert "{" not in sentence
        assert sentence[0] == sentence[0].upper()
        assert 6 <= len(sentence.split()) <= 30, sentence


def test_the_german_side_is_german() -> None:
    assert sum(any(letter in pair.german for letter in "äöüß") for pair in PAIRS) > len(PAIRS) / 2
    names = " ".join(pair.german for pair in PAIRS)
    for name in ("Österreich", "Dienstag", "März", "Kopenhagen", "Schwedische Kronen", "Kilowattstunden", "zwölf"):
        assert name in names


def test_territories_that_need_an_article_are_left_out() -> None:
    article_names = r"\b(Schweiz|Türkei|Iran|Irak|Ukraine|Niederlande|Philippinen|Mongolei|Vereinigte\w*|Libanon)\b"
    assert not [pair.german for pair in PAIRS if re.search(article_names, pair.german)]


def test_percentages_agree() -> None:
    checked = 0
    for pair in PAIRS:
        english = re.findall(r"([\d.,]+)%", pair.english)
        german = [_swap_separators(number) for number in re.findall(r"([\d.,]+) %", pair.german)]
        assert english == german, pair
        checked += len(english)
    assert checked > 100


def test_spelled_numbers_agree() -> None:
    def check(pair: SentencePair) -> bool:
        english = re.match(r"The answer to question ([\w-]+) is ([\d.,]+) and not ([\d.,]+), ", pair.english)
        if english is None:
            return False
        german = re.match(r"Die Antwort auf Frage (\w+) lautet ([\d.,]+) und nicht ([\d.,]+), ", pair.german)
        assert german is not None, pair
        spelled = {num2words(n, lang="en"): num2words(n, lang="de") for n in range(2, 100)}
        assert spelled[english[1]] == german[1], pair
        assert [_swap_separators(german[2]), _swap_separators(german[3])] == [english[2], english[3]], pair
        return True

    assert sum(check(pair) for pair in PAIRS) > 20


def test_the_files_are_parallel_and_disjoint(tmp_path: Path) -> None:
    write_corpus(tmp_path / "text", train=400, validation=50, seed=3)
    sides = {path.name: path.read_bytes().decode("utf-8").split("\n") for path in (tmp_path / "text").iterdir()}
    assert sorted(sides) == ["train.de", "train.en", "val.de", "val.en"]
    assert all(lines.pop() == "" for lines in sides.values())
    assert [len(sides[name]) for name in ("train.en", "train.de", "val.en", "val.de")] == [400, 400, 50, 50]
    assert not set(sides["train.en"]) & set(sides["val.en"])
    assert not set(sides["train.de"]) & set(sides["val.de"])


def test_the_files_are_the_same_again(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_corpus(tmp_path / folder, train=40, validation=5, seed=3)
    for name in ("train.en", "train.de", "val.en", "val.de"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_nothing_asked_for_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least 1 sentence pair"):
        sentence_pairs(0, seed=1)
    with pytest.raises(UsageError, match="found 10 for training, 0 for validation"):
        write_corpus(tmp_path, train=10, validation=0)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_a_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("mine")
    with pytest.raises(LossledgerError, match="cannot be written"):
        write_corpus(tmp_path / "text", train=2, validation=1)
    assert (tmp_path / "text").read_text() == "mine"
