"""From parallel text to the binary data that fairseq trains on, by one SentencePiece model for both sides."""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from demo.binarise import LANGUAGE_MODEL, TRANSLATION, binarise
from demo.parallel_text import ParallelText, read_parallel_text
from recorder import durable
from recorder.errors import LossledgerError, UsageError

try:
    import sentencepiece
except ModuleNotFoundError as error:
    message = f"text cannot be split into pieces ({error}). Install: pip install 'lossledger[demo]'"
    raise LossledgerError(message) from error

PIECES = "sentencepiece.model"
STAMP = "prepared.json"

# Raised whenever the same text and settings would give other files than before.
_RECIPE = 1

# fairseq adds these to every dictionary and does not write them down: <s>, <pad>, </s>, <unk>.
_SPECIAL_SYMBOLS = 4


@dataclass(frozen=True, kw_only=True)
class PreparedText:
    """Where the binary data lies and what is in it.

    Parameters
    ----------
    translation
        Folder for fairseq's ``translation`` task, English to German, one dictionary for both.
    language_model
        Folder for fairseq's ``language_modeling`` and ``masked_lm`` tasks: the English side, same dictionary.
    pieces
        The SentencePiece model, which turns pieces back into text.
    train_sentences
        Pairs to train on.
    validation_sentences
        Pairs to validate on.
    dropped_sentences
        Training pairs left out: a side was empty or longer than `prepare` was told to keep.
    vocabulary
        Entries of the dictionary, fairseq's four special symbols included.
    """

    translation: Path
    language_model: Path
    pieces: Path
    train_sentences: int
    validation_sentences: int
    dropped_sentences: int
    vocabulary: int


def prepare(
    text: Path,
    out: Path,
    *,
    vocabulary: int = 1000,
    workers: int = 1,
    limit: int | None = None,
    longest: int = 60,
) -> PreparedText:
    """Split parallel text into pieces and write it as fairseq's binary data; do nothing if that is done.

    A training pair with an empty side, or with more than `longest` pieces on either side, is left out;
    `PreparedText.dropped_sentences` counts them. Validation text is kept as it is.

    Parameters
    ----------
    text
        Folder of ``train.en``, ``train.de``, ``val.en`` and ``val.de``, each plain or gzipped (``.gz``).
    out
        Folder to make. When the text or a setting has changed it is replaced as a whole; so keep nothing
        else in it.
    vocabulary
        Pieces to learn at most; a small text may have fewer.
    workers
        Processes that fairseq binarises with. The result does not depend on it.
    limit
        Take only the first so many training pairs.
    longest
        Pieces of a training sentence at most.

    Returns
    -------
    PreparedText
        The folders and the counts.

    Raises
    ------
    UsageError
        If the text is not as expected, a number is less than 1, the vocabulary is too small for the letters
        of the text, or `out` holds something else.
    LossledgerError
        If fairseq fails or `out` cannot be written.
    """
    numbers = {"vocabulary": vocabulary, "workers": workers, "limit": limit, "longest": longest}
    for name, value in numbers.items():
        if value is not None and value < 1:
            message = f"expected {name} to be at least 1, found {value}"
            raise UsageError(message)
    parallel = read_parallel_text(text, limit=limit)
    origin = {
        "recipe": _RECIPE,
        "vocabulary": vocabulary,
        "longest": longest,
        "sha256": _fingerprint(parallel),
    }
    finished = _finished(out, origin)
    if finished is not None:
        return finished
    _refuse_strangers(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Beside `out` and renamed into place: `out` is missing or whole, whenever this is killed.
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".partial", dir=out.parent) as scratch:
            folder = Path(scratch)
            made = _make(parallel, folder, vocabulary=vocabulary, workers=workers, longest=longest, origin=origin)
            if out.exists():
                out.rename(folder / "replaced")
            made.rename(out)
    except OSError as error:
        message = f"{out} cannot be made: {error}. Name a folder that can be written to."
        raise LossledgerError(message) from error
    finished = _finished(out, origin)
    assert finished is not None, "what was just made is not recognised as finished"
    return finished


def _fingerprint(parallel: ParallelText) -> str:
    # Of the lines that are used: compressing the text or appending to it behind `limit` changes nothing.
    digest = hashlib.sha256()
    for side in (
        parallel.train_english,
        parallel.train_german,
        parallel.validation_english,
        parallel.validation_german,
    ):
        digest.update(f"{len(side)}\n".encode())
        for line in side:
            digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def _finished(out: Path, origin: dict[str, object]) -> PreparedText | None:
    try:
        stamp = json.loads((out / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(stamp, dict) or stamp.get("origin") != origin:
        return None
    sizes = _sizes(out)
    if any(sizes.get(name) != size for name, size in stamp["files"].items()):
        return None
    return PreparedText(
        translation=out / TRANSLATION,
        language_model=out / LANGUAGE_MODEL,
        pieces=out / PIECES,
        **stamp["counts"],
    )


def _sizes(out: Path) -> dict[str, int]:
    files = (path for path in out.rglob("*") if path.is_file() and path.name != STAMP)
    return {path.relative_to(out).as_posix(): path.stat().st_size for path in sorted(files)}


def _refuse_strangers(out: Path) -> None:
    if not out.exists():
        return
    found = sorted(path.name for path in out.iterdir()) if out.is_dir() else ["a file"]
    strangers = [name for name in found if name not in {TRANSLATION, LANGUAGE_MODEL, PIECES, STAMP}]
    if strangers or (found and STAMP not in found):
        message = (
            f"expected {out} to be missing, empty, or made by an earlier run (it is replaced as a whole); "
            f"found {', '.join(strangers or found)}. Name another folder, or remove it."
        )
        raise UsageError(message)


def _make(
    parallel: ParallelText,
    scratch: Path,
    *,
    vocabulary: int,
    workers: int,
    longest: int,
    origin: dict[str, object],
) -> Path:
    made, encoded = scratch / "made", scratch / "encoded"
    made.mkdir()
    encoded.mkdir()
    model = _learn_pieces([*parallel.train_english, *parallel.train_german], vocabulary)
    (made / PIECES).write_bytes(model)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    def split(lines: list[str]) -> list[list[str]]:
        pieces: list[list[str]] = processor.encode(lines, out_type=str, num_threads=1)
        return pieces

    pairs = list(zip(split(parallel.train_english), split(parallel.train_german), strict=True))
    kept = [pair for pair in pairs if all(1 <= len(side) <= longest for side in pair)]
    if not kept:
        message = f"expected training pairs of 1 to {longest} pieces a side, found none among {len(pairs)}"
        raise UsageError(message)
    _write_pieces(encoded / "train.en", (english for english, _ in kept))
    _write_pieces(encoded / "train.de", (german for _, german in kept))
    _write_pieces(encoded / "valid.en", split(parallel.validation_english))
    _write_pieces(encoded / "valid.de", split(parallel.validation_german))
    binarise(encoded, made, workers=workers)
    dictionary = (made / LANGUAGE_MODEL / "dict.txt").read_text(encoding="utf-8")
    counts = {
        "train_sentences": len(kept),
        "validation_sentences": len(parallel.validation_english),
        "dropped_sentences": len(pairs) - len(kept),
        "vocabulary": dictionary.count("\n") + _SPECIAL_SYMBOLS,
    }
    stamp = json.dumps({"origin": origin, "counts": counts, "files": _sizes(made)}, indent=2)
    with durable.replacing(made / STAMP) as temporary:
        temporary.write_text(f"{stamp}\n", encoding="utf-8")
    return made


def _learn_pieces(lines: list[str], vocabulary: int) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocabulary,
            hard_vocab_limit=False,
            character_coverage=1.0,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        message = (
            f"SentencePiece cannot learn {vocabulary} pieces from {len(lines)} lines: {error} "
            "Ask for a larger vocabulary, or give more text."
        )
        raise UsageError(message) from error
    return model.getvalue()


def _write_pieces(path: Path, sentences: Iterable[list[str]]) -> None:
    path.write_text("".join(f"{' '.join(pieces)}\n" for pieces in sentences), encoding="utf-8", newline="\n")
