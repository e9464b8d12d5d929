"""Read a folder of parallel text: ``train.en``, ``train.de``, ``val.en`` and ``val.de``, plain or gzipped."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

from recorder.errors import UsageError

_NAMES = ("train.en", "train.de", "val.en", "val.de")


@dataclass(frozen=True, kw_only=True)
class ParallelText:
    """The lines of both languages; a line and its translation have the same position.

    Parameters
    ----------
    train_english, train_german
        What to train on.
    validation_english, validation_german
        What to validate on.
    """

    train_english: list[str]
    train_german: list[str]
    validation_english: list[str]
    validation_german: list[str]


def read_parallel_text(folder: Path, *, limit: int | None = None) -> ParallelText:
    """Read the four files of a folder.

    Parameters
    ----------
    folder
        Holds each file plain or with ``.gz`` behind its name; the plain one is taken where there are both.
    limit
        Take only the first so many training pairs.

    Returns
    -------
    ParallelText
        Lines without their ends and without surrounding spaces.

    Raises
    ------
    UsageError
        If the folder or a file is missing, empty, or unreadable, or two sides differ in length.
    """
    paths = _find(folder)
    sides = {name: _lines(path) for name, path in paths.items()}
    for split in ("train", "val"):
        english, german = f"{split}.en", f"{split}.de"
        if len(sides[english]) != len(sides[german]):
            message = (
                f"expected a line of {paths[german]} for each line of {paths[english]}; "
                f"found {len(sides[german])} and {len(sides[english])} lines. Align the two files."
            )
            raise UsageError(message)
        if not sides[english]:
            message = f"expected sentences in {paths[english]}, found an empty file. Fill it."
            raise UsageError(message)
    return ParallelText(
        train_english=sides["train.en"][:limit],
        train_german=sides["train.de"][:limit],
        validation_english=sides["val.en"],
        validation_german=sides["val.de"],
    )


def _find(folder: Path) -> dict[str, Path]:
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else None
    if found is None:
        message = f"expected a folder with {', '.join(_NAMES)} (each plain or .gz); {folder} is no folder"
        raise UsageError(message)
    missing = [name for name in _NAMES if name not in found and f"{name}.gz" not in found]
    if missing:
        listed = ", ".join(found[:10]) + (f" and {len(found) - 10} more" if len(found) > 10 else "")
        message = (
            f"expected {', '.join(_NAMES)} (each plain or .gz) in {folder}; found {listed or 'nothing'}. "
            f"Add {', '.join(missing)}."
        )
        raise UsageError(message)
    return {name: folder / (name if name in found else f"{name}.gz") for name in _NAMES}


def _lines(path: Path) -> list[str]:
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        text = content.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        message = f"expected UTF-8 text in {path}, found something unreadable: {error}. Make the file anew."
        raise UsageError(message) from error
    # Not splitlines(): it also splits at characters such as U+2028, which other programs keep inside a line.
    return [line.strip() for line in text.removesuffix("\n").split("\n")] if text else []
