"""Checkpoints that the user lists with their numbers of updates, or whose file names tell them.

--step 0=init.safetensors --step 1000=model.safetensors

step,path                       a file of comma-separated values; the line of names may be missing
0,init.safetensors              a path that is not absolute starts in the file's folder
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Sequence
from pathlib import Path

from recorder.errors import UsageError
from recorder.importing.found import Found, Source, number_in, open_anything
from recorder.importing.unpickling import SUFFIXES

KIND = "files"
LISTS = (".csv", ".txt")
_SUFFIXES = (".safetensors", *SUFFIXES)


def recognises(source: Path) -> bool:
    """Tell whether a source is a list, or a folder of numbered files.

    Parameters
    ----------
    source
        The file or folder.

    Returns
    -------
    bool
        Whether it is.
    """
    if source.is_file():
        return source.suffix in LISTS
    return any(number_in(file.stem) is not None for file in _files(source))


def _files(source: Path) -> list[Path]:
    return sorted(file for file in source.glob("*") if file.is_file() and file.suffix in _SUFFIXES)


def find(source: Path) -> Source:
    """Find the checkpoints.

    Parameters
    ----------
    source
        The list, or the folder.

    Returns
    -------
    Source
        The checkpoints.

    Raises
    ------
    UsageError
        If a line is not understood, or there are none.
    """
    if source.is_file():
        return Source(kind=KIND, checkpoints=tuple(_of_list(source)))
    checkpoints, notes = [], []
    for file in _files(source):
        step = number_in(file.stem)
        if step is None:
            notes.append(f"{file.name} has not one number in its name and is left out")
        else:
            checkpoints.append(_listed(step, file))
    if not checkpoints:
        message = (
            f"{source}: expected files {', '.join(_SUFFIXES)} with their number of updates in the name, found none"
        )
        raise UsageError(message)
    return Source(kind=KIND, checkpoints=tuple(checkpoints), notes=tuple(notes))


def _of_list(file: Path) -> list[Found]:
    found = []
    with file.open(encoding="utf-8", newline="") as stream:
        for number, row in enumerate(csv.reader(stream), start=1):
            cells = [cell.strip() for cell in row]
            if not any(cells) or cells[0].startswith("#") or (number == 1 and cells[:2] == ["step", "path"]):
                continue
            if len(cells) != 2 or not _is_number(cells[0]) or not cells[1]:
                message = (
                    f"{file}: line {number}: expected a number of updates, a comma, a path; found {','.join(row)!r}"
                )
                raise UsageError(message)
            found.append(_listed(int(cells[0]), file.parent / cells[1]))
    return found


def named(texts: Sequence[str]) -> Source:
    """Take the checkpoints that ``--step`` names.

    Parameters
    ----------
    texts
        Each ``N=PATH``.

    Returns
    -------
    Source
        The checkpoints.

    Raises
    ------
    UsageError
        If one is of another form.
    """
    found = []
    for text in texts:
        number, sign, path = text.partition("=")
        if not sign or not _is_number(number) or not path:
            message = f"--step expects N=PATH, N being the number of updates done, got {text!r}"
            raise UsageError(message)
        found.append(_listed(int(number), Path(path)))
    return Source(kind=KIND, checkpoints=tuple(found))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _listed(step: int, path: Path) -> Found:
    return Found(step=step, path=path, open=functools.partial(open_anything, path))
