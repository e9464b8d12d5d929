"""One file of shards: the arrays of a range of steps, written whole, and read with every checksum verified.

Part of the shard format (docs/formats/shards.md); imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recorder import tensorfile
from recorder.errors import FormatError
from recorder.table import Parameter
from replay.columns import COUNTS, PER_PARAMETER, PER_STEP, PER_UNIT, SPREAD, Shard, spread_shape
from replay.settings import VERSION

if TYPE_CHECKING:
    import numpy.typing as npt

    Attempts = Sequence[tuple[int, int, int]]

FORMAT = "lossledger-shards"


def write_shard(
    path: Path,
    shard: Shard,
    trained: Iterable[Parameter],
    *,
    settings: str,
    start: int,
    stop: int,
    attempts: Attempts,
) -> None:
    """Write the shard of steps `start` to `stop` - 1, durably and all at once.

    Parameters
    ----------
    path
        The file.
    shard
        Its content; a `ValueError` tells of an array whose shape or dtype is not that of `replay.columns`.
    trained
        The parameters in the ledger.
    settings
        The settings hash.
    start, stop
        The range of steps.
    attempts
        Which attempts of the training recorded these steps: number, start and stop of each.
    """
    rows, steps = list(trained), stop - start
    tensors: dict[str, npt.NDArray[Any]] = {}
    for name, dtype in PER_STEP.items():
        tensors[name] = _checked(name, shard.per_step[name], (steps,), dtype)
    for quantity, dtype in PER_UNIT.items():
        for row in rows:
            key = f"{quantity}/{row.name}"
            tensors[key] = _checked(key, shard.per_unit[quantity][row.name], (steps, row.units), dtype)
    for quantity, dtype in PER_PARAMETER.items():
        for row in rows:
            key = f"{quantity}/{row.name}"
            tensors[key] = _checked(key, shard.per_parameter[quantity][row.name], (steps,), dtype)
    if shard.counts is not None:
        shape = (steps, shard.counts.shape[-1])
        tensors[COUNTS] = _checked(COUNTS, shard.counts, shape, np.float64)
        for row in rows:
            key = f"{SPREAD}/{row.name}"
            tensors[key] = _checked(key, shard.spread[row.name], spread_shape(row, shape), np.float64)
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "settings": settings,
        "start": start,
        "stop": stop,
        "attempts": [list(entry) for entry in attempts],
        "pieces": [[step, number] for step, number in sorted(shard.pieces.items())],
    }
    tensorfile.write(path, tensors, facts)


def open_shard(path: Path, *, settings: str, start: int, stop: int) -> tensorfile.TensorFile:
    """Open a shard.

    Parameters
    ----------
    path
        The file.
    settings, start, stop
        What it is expected to be of.

    Returns
    -------
    TensorFile
        Nothing of its arrays is read yet.

    Raises
    ------
    FormatError
        If the file was moved here from other settings, or bears the name of other steps.
    """
    file = tensorfile.TensorFile(path)
    if file.facts.get("settings") != settings:
        message = f"{path}: expected a shard of settings {settings}, found {file.facts.get('settings')!r}"
        raise FormatError(message)
    held = (file.facts.get("start"), file.facts.get("stop"))
    if held != (start, stop):
        message = f"{path}: expected the steps of its name, found steps {held[0]} to {held[1]} (not included)"
        raise FormatError(message)
    return file


def read_shard(file: tensorfile.TensorFile, trained: Iterable[Parameter]) -> Shard:
    """Read all of a shard, every checksum verified.

    Parameters
    ----------
    file
        From `open_shard`.
    trained
        The parameters in the ledger.

    Returns
    -------
    Shard
        Its content.
    """
    names = [row.name for row in trained]

    def by_parameter(quantities: Iterable[str]) -> dict[str, dict[str, npt.NDArray[Any]]]:
        return {quantity: {name: file.array(f"{quantity}/{name}") for name in names} for quantity in quantities}

    sampled = COUNTS in file.names
    return Shard(
        per_step=read_per_step(file),
        per_unit=by_parameter(PER_UNIT),
        per_parameter=by_parameter(PER_PARAMETER),
        spread=by_parameter([SPREAD])[SPREAD] if sampled else {},
        counts=file.array(COUNTS) if sampled else None,
        pieces=dict(file.facts.get("pieces", [])),
    )


def read_per_step(file: tensorfile.TensorFile) -> dict[str, npt.NDArray[Any]]:
    """Read of a shard only what it holds once a step: little, however large the model.

    Parameters
    ----------
    file
        From `open_shard`.

    Returns
    -------
    dict of str to numpy.ndarray
        The arrays of `PER_STEP`.
    """
    return {name: file.array(name) for name in PER_STEP}


def _checked(name: str, array: npt.NDArray[Any], shape: tuple[int, ...], dtype: type) -> npt.NDArray[Any]:
    if array.shape != shape or array.dtype != dtype:
        message = f"{name}: expected {np.dtype(dtype)} of shape {shape}, got {array.dtype} of shape {array.shape}"
        raise ValueError(message)
    return array
