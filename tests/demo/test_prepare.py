"""From text to fairseq's binary data: readable by fairseq, done once, and never half done."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import pytest

from demo.corpus import write_corpus
from demo.prepare import PreparedText, prepare
from recorder.errors import LossledgerError, UsageError

TRAIN, VALIDATION = 200, 20
VOCABULARY = 300


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, train=TRAIN, validation=VALIDATION, seed=1)
    return folder


@pytest.fixture(scope="module")
def prepared(text: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedText:
    out = tmp_path_factory.mktemp("prepared") / "data"
    return prepare(text, out, vocabulary=VOCABULARY, longest=100)


@pytest.fixture
def own_text(text: Path, tmp_path: Path) -> Path:
    return shutil.copytree(text, tmp_path / "text")


@pytest.fixture
def own_out(prepared: PreparedText, tmp_path: Path) -> Path:
    return shutil.copytree(prepared.translation.parent, tmp_path / "data")


def _state(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in [folder, *sorted(folder.rglob("*"))]}


@pytest.mark.fairseq
def test_fairseq_opens_both_folders_with_every_sentence(prepared: PreparedText) -> None:
    import recorder.integrations.fairseq_import  # noqa: F401, I001
    from fairseq.data import Dictionary, data_utils

    sizes = {"train": TRAIN, "valid": VALIDATION}
    assert (prepared.train_sentences, prepared.validation_sentences) == (TRAIN, VALIDATION)
    assert prepared.dropped_sentences == 0
    shared = Dictionary.load(str(prepared.language_model / "dict.txt"))
    assert len(shared) == prepared.vocabulary
    assert 100 < len(shared) <= VOCABULARY + 4
    for language in ("en", "de"):
        dictionary = Dictionary.load(str(prepared.translation / f"dict.{language}.txt"))
        assert dictionary.symbols == shared.symbols
    for split, size in sizes.items():
        english = data_utils.load_indexed_dataset(str(prepared.language_model / split), shared)
        assert len(english) == size
        for language in ("en", "de"):
            prefix = prepared.translation / f"{split}.en-de.{language}"
            dataset = data_utils.load_indexed_dataset(str(prefix), shared)
            assert len(dataset) == size
            assert all(dataset[i][-1] == shared.eos() for i in range(size))
            if language == "en":
                assert all(dataset[i].equal(english[i]) for i in range(size))


@pytest.mark.fairseq
def test_the_pieces_lead_back_to_the_text(prepared: PreparedText, text: Path) -> None:
    import recorder.integrations.fairseq_import  # noqa: F401, I001
    from fairseq.data import Dictionary, data_utils

    dictionary = Dictionary.load(str(prepared.translation / "dict.de.txt"))
    prefix = prepared.translation / "train.en-de.de"
    dataset = data_utils.load_indexed_dataset(str(prefix), dictionary)
    lines = (text / "train.de").read_text(encoding="utf-8").splitlines()
    spoken = [dictionary.string(dataset[i], bpe_symbol="sentencepiece") for i in range(TRAIN)]
    assert spoken == lines


@pytest.mark.fairseq
def test_nothing_but_the_data_is_left(prepared: PreparedText) -> None:
    out = prepared.translation.parent
    assert sorted(path.name for path in out.parent.iterdir()) == [out.name]
    names = {"language-model", "prepared.json", "sentencepiece.model", "translation"}
    assert {path.name for path in out.iterdir()} == names
    assert {path.suffix for path in out.rglob("*") if path.is_file()} <= {
        ".bin",
        ".idx",
        ".txt",
        ".json",
        ".model",
    }


@pytest.mark.fairseq
def test_an_unchanged_rerun_touches_nothing(prepared: PreparedText, text: Path) -> None:
    out = prepared.translation.parent
    before = _state(out)
    assert prepare(text, out, vocabulary=VOCABULARY, longest=100, workers=2) == prepared
    assert _state(out) == before


@pytest.mark.fairseq
def test_gzipped_text_is_the_same_text(prepared: PreparedText, own_text: Path) -> None:
    out = prepared.translation.parent
    before = _state(out)
    for path in list(own_text.iterdir()):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert prepare(own_text, out, vocabulary=VOCABULARY, longest=100) == prepared
    assert _state(out) == before


@pytest.mark.fairseq
def test_changed_text_is_prepared_anew_and_long_sentences_are_dropped(own_text: Path, own_out: Path) -> None:
    for language in ("en", "de"):
        path = own_text / f"train.{language}"
        lines = path.read_text(encoding="utf-8").splitlines()
        lines[3] = lines[3] + " " + " ".join(lines[10:20])
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    again = prepare(own_text, own_out, vocabulary=VOCABULARY, longest=100, limit=TRAIN - 50)
    assert (again.train_sentences, again.dropped_sentences) == (TRAIN - 51, 1)
    assert sorted(path.name for path in own_out.parent.iterdir()) == ["data", "text"]


@pytest.mark.fairseq
def test_a_truncated_file_is_made_anew_as_it_was(own_out: Path, prepared: PreparedText, text: Path) -> None:
    path = own_out / "translation" / "train.en-de.en.bin"
    path.write_bytes(path.read_bytes()[:-10])
    prepare(text, own_out, vocabulary=VOCABULARY, longest=100)
    for name in (file.relative_to(own_out) for file in own_out.rglob("*") if file.is_file()):
        assert (own_out / name).read_bytes() == (prepared.translation.parent / name).read_bytes(), name


@pytest.mark.fairseq
def test_a_failure_keeps_what_was_there(own_out: Path, own_text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _state(own_out)
    monkeypatch.setattr("demo.binarise._PREPROCESS", "raise SystemExit('no room')")
    with pytest.raises(LossledgerError, match="exit status 1: no room"):
        prepare(own_text, own_out, vocabulary=VOCABULARY + 1, longest=100)
    assert _state(own_out) == before
    assert sorted(path.name for path in own_out.parent.iterdir()) == ["data", "text"]


@pytest.mark.parametrize("content", [{"precious.pt": "x"}, {"translation": "x"}])
def test_a_folder_that_is_not_ours_is_refused(text: Path, tmp_path: Path, content: dict[str, str]) -> None:
    for name, words in content.items():
        (tmp_path / name).write_text(words)
    with pytest.raises(UsageError, match=r"replaced as a whole.*found (precious|translation)"):
        prepare(text, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(content)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"train.en, train.de, val.en, val.de.*nowhere is no folder"):
        prepare(tmp_path / "nowhere", tmp_path / "data")


def test_missing_files_are_named_with_those_found(own_text: Path, tmp_path: Path) -> None:
    (own_text / "train.de").unlink()
    with pytest.raises(UsageError, match=r"found train.en, val.de, val.en. Add train.de."):
        prepare(own_text, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_sides_of_different_length_are_refused(own_text: Path, tmp_path: Path) -> None:
    with (own_text / "val.en").open("a", encoding="utf-8") as stream:
        stream.write("One more.\n")
    with pytest.raises(UsageError, match="found 20 and 21 lines"):
        prepare(own_text, tmp_path / "data")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe"])
def test_empty_and_foreign_files_are_refused(own_text: Path, tmp_path: Path, content: bytes) -> None:
    (own_text / "val.en").write_bytes(content)
    (own_text / "val.de").write_bytes(b"")
    with pytest.raises(UsageError, match=r"val\.en"):
        prepare(own_text, tmp_path / "data")


def test_a_damaged_archive_is_refused(own_text: Path, tmp_path: Path) -> None:
    path = own_text / "train.en"
    path.with_name("train.en.gz").write_bytes(gzip.compress(path.read_bytes())[:-20])
    path.unlink()
    with pytest.raises(UsageError, match=r"train\.en\.gz, found something unreadable"):
        prepare(own_text, tmp_path / "data")


@pytest.mark.parametrize("name", ["vocabulary", "workers", "limit", "longest"])
def test_numbers_below_one_are_refused(text: Path, tmp_path: Path, name: str) -> None:
    settings: dict[str, int] = {name: 0}
    with pytest.raises(UsageError, match=f"expected {name} to be at least 1, found 0"):
        prepare(text, tmp_path / "data", **settings)


def test_a_vocabulary_smaller_than_the_alphabet_is_refused(text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot learn 10 pieces"):
        prepare(text, tmp_path / "data", vocabulary=10)
    assert not list(tmp_path.iterdir())


def test_text_whose_every_pair_is_too_long_is_refused(text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="found none among 200"):
        prepare(text, tmp_path / "data", vocabulary=VOCABULARY, longest=1)
    assert not list(tmp_path.iterdir())
