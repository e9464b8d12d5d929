"""Which cubes a user means: a run's folder or a cube itself, under a label that no other has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from recorder.errors import UsageError
from reduce.cube import FILE_NAME


@dataclass(frozen=True, kw_only=True)
class Source:
    """One cube to draw.

    Parameters
    ----------
    label
        What figures and tables call it.
    cube
        The file, which exists.
    """

    label: str
    cube: Path


def sources(arguments: Sequence[str]) -> list[Source]:
    """Find the cubes that the user names.

    Parameters
    ----------
    arguments
        Each a run's folder or a cube's file, optionally as ``LABEL=PATH``. A path that exists is taken as a path,
        even with ``=`` in it.

    Returns
    -------
    list of Source
        In the same order. Without a label of its own a source is called by its run's folder; where two would be
        called the same, by parent and folder, and where that does not help, by number.

    Raises
    ------
    UsageError
        If the user gives two sources the same label.
    """
    split = [_split(argument) for argument in arguments]
    given = Counter(label for label, _ in split if label is not None)
    if given and given.most_common(1)[0][1] > 1:
        message = f"--run: expected every label once, found {given.most_common(1)[0][0]!r} more than once"
        raise UsageError(message)
    cubes = [_cube(path) for _, path in split]
    labels = [label or _name(cube) for (label, _), cube in zip(split, cubes, strict=True)]
    tied = Counter(labels)
    labels = [
        f"{_folder(cube).parent.name}/{label}" if tied[label] > 1 and own is None else label
        for label, (own, _), cube in zip(labels, split, cubes, strict=True)
    ]
    taken = set(given)
    found = []
    for label, (own, _), cube in zip(labels, split, cubes, strict=True):
        unique = label if own is not None else _free(label, taken)
        taken.add(unique)
        found.append(Source(label=unique, cube=cube))
    return found


def _split(argument: str) -> tuple[str | None, Path]:
    path = Path(argument)
    label, sign, rest = argument.partition("=")
    if path.exists() or not sign:
        return None, path
    if not label or not rest:
        message = f"--run: expected PATH or LABEL=PATH, found {argument!r}"
        raise UsageError(message)
    return label, Path(rest)


def _cube(path: Path) -> Path:
    if not path.exists():
        message = f"--run: expected a run's folder or a cube's .nc file, found nothing at {path}"
        raise UsageError(message)
    if path.is_file():
        return path
    cube = path / FILE_NAME
    if not cube.is_file():
        message = f"--run: expected a cube in the run, found no {cube}; run first: python -m reduce --run {path}"
        raise UsageError(message)
    return cube


def _folder(cube: Path) -> Path:
    return cube.resolve().parent


def _name(cube: Path) -> str:
    return _folder(cube).name if cube.name == FILE_NAME else cube.stem


def _free(label: str, taken: set[str]) -> str:
    number, unique = 2, label
    while unique in taken:
        unique = f"{label} ({number})"
        number += 1
    return unique
