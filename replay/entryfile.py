"""One file of single entries' sums: what it is called, written whole, and added to others.

Part of the shard format (docs/formats/shards.md); imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recorder import tensorfile
from recorder.errors import FormatError

if TYPE_CHECKING:
    import numpy.typing as npt

    from replay.chunks import Range

FORMAT = "lossledger-entries"
VERSION = 1

_NAME = re.compile(r"entries-(\d{8})-(\d{8})(?:\.part-(\d{8})-(\d{8}))?\.safetensors")


def name_of(window: Range, steps: Range | None = None) -> str:
    """Name the file of a window's sum, or of a part of it.

    Parameters
    ----------
    window
        Start and stop of the window.
    steps
        The same of the part; None for the sum.

    Returns
    -------
    str
        Of a file in the folder of shards.

    Examples
    --------
    >>> name_of((0, 100), (0, 8))
    'entries-00000000-00000100.part-00000000-00000008.safetensors'
    """
    part = "" if steps is None else f".part-{steps[0]:08d}-{steps[1]:08d}"
    return f"entries-{window[0]:08d}-{window[1]:08d}{part}.safetensors"


def entry_files(folder: Path) -> Iterator[tuple[Path, Range, Range | None]]:
    """Find the sums and parts of all windows.

    Parameters
    ----------
    folder
        A folder of shards; where it does not exist, it holds none.

    Yields
    ------
    (pathlib.Path, (int, int), (int, int) or None)
        Every file with its window, and the steps of a part.
    """
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        match = _NAME.fullmatch(path.name)
        if match:
            part = None if match[3] is None else (int(match[3]), int(match[4]))
            yield path, (int(match[1]), int(match[2])), part


def write_entries(
    path: Path,
    sums: Mapping[str, Any],
    *,
    settings: str,
    window: Range,
    steps: Iterable[Range],
    attempts: Iterable[Sequence[int]],
) -> None:
    """Write sums over steps of a window, durably and all at once.

    Parameters
    ----------
    path
        The file.
    sums
        Name of every parameter to the sum of each of its entries: float64 in its shape, in nats.
    settings
        The settings hash.
    window
        Start and stop of the window.
    steps
        Start and stop of ranges of steps that are summed over.
    attempts
        Which attempts of the training recorded these steps: number, start and stop of each.
    """
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "settings": settings,
        "start": window[0],
        "stop": window[1],
        "steps": [list(entry) for entry in steps],
        "attempts": [list(entry) for entry in attempts],
    }
    tensorfile.write(path, sums, facts)


def added_up(files: Iterable[Path], names: Iterable[str], *, settings: str) -> dict[str, npt.NDArray[Any]]:
    """Add up the sums of files.

    Parameters
    ----------
    files
        In the order of steps, for the order of the additions decides the last bit; at least one.
    names
        Of the parameters.
    settings
        The settings hash of the folder that they are in.

    Returns
    -------
    dict of str to numpy.ndarray
        Name to the sum of each entry of the parameter: float64 in its shape, in nats.

    Raises
    ------
    FormatError
        If a file is of another version or other settings.
    """
    opened = [tensorfile.TensorFile(path) for path in files]
    for file in opened:
        found = (file.facts.get("format"), file.facts.get("version"), file.facts.get("settings"))
        expected = (FORMAT, VERSION, settings)
        if found != expected:
            message = (
                f"{file.path}: expected format, version and settings {expected}, found {found}; it does not belong "
                "here: remove it and replay again"
            )
            raise FormatError(message)
    sums = {}
    for name in names:
        total = opened[0].array(name)
        for file in opened[1:]:
            total += file.array(name)
        sums[name] = total
    return sums


def summed_over(path: Path) -> tuple[Any, Any]:
    """Say which steps a file holds the sum of, and which attempts recorded them.

    Parameters
    ----------
    path
        The file.

    Returns
    -------
    steps, attempts : list of list of int
        As `write_entries` was given them.
    """
    facts = tensorfile.TensorFile(path).facts
    return facts["steps"], facts["attempts"]


def move_entries(path: Path, folder: Path, names: Iterable[str], *, settings: str) -> None:
    """Move a file to another folder of shards, where single entries have the same names and numbers.

    Parameters
    ----------
    path
        The file.
    folder
        The other folder.
    names
        Of the parameters.
    settings
        The settings hash of the other folder.
    """
    file = tensorfile.TensorFile(path)
    tensors = {name: file.array(name) for name in names}
    tensorfile.write(folder / path.name, tensors, {**file.facts, "settings": settings})
    path.unlink(missing_ok=True)
