"""A checkpoint that was found in a source: after how many updates it was taken, and how its tensors are read."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from recorder.errors import UsageError
from recorder.importing.distributed_weights import METADATA, DistributedWeights
from recorder.importing.unpickling import SUFFIXES, pickled
from recorder.importing.weights import SafetensorsFiles, Weights, indexed_files


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A checkpoint in a source.

    Parameters
    ----------
    step
        After how many updates it was taken.
    path
        The file or folder, as messages name it.
    open
        Opens its tensors; may be called several times, and holds nothing until then.
    epoch
        The training's epoch then, from 1; 0 where the source does not tell.
    """

    step: int
    path: Path
    open: Callable[[], Weights]
    epoch: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What was found in a source.

    Parameters
    ----------
    kind
        What kind of checkpoints.
    checkpoints
        The checkpoints, in any order.
    notes
        What the user should know, in sentences.
    """

    kind: str
    checkpoints: tuple[Found, ...]
    notes: tuple[str, ...] = ()


_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def weights_file(folder: Path) -> Path | None:
    """Find the file of the weights in a folder as transformers writes it.

    Parameters
    ----------
    folder
        The folder of one checkpoint.

    Returns
    -------
    Path or None
        The file, or the index of several; safetensors before pickles. None if there is none.
    """
    return next((folder / name for name in _FILES if (folder / name).is_file()), None)


def open_file(path: Path) -> Weights:
    """Open the weights in one file.

    Parameters
    ----------
    path
        A safetensors file, a pickle file, or the index of several.

    Returns
    -------
    Weights
        The weights.

    Raises
    ------
    UsageError
        If it is none of these.
    """
    if path.name.endswith(".safetensors.index.json"):
        return SafetensorsFiles(indexed_files(path))
    if path.suffix == ".safetensors":
        return SafetensorsFiles((path,))
    if path.suffix in SUFFIXES or path.name.endswith(".bin.index.json"):
        return pickled(path)
    message = f"{path}: expected a file of weights, with one of the endings .safetensors, {', '.join(SUFFIXES)}"
    raise UsageError(message)


def open_anything(path: Path) -> Weights:
    """Open the weights in a file, or in the folder of one checkpoint.

    Parameters
    ----------
    path
        A file as for `open_file`, a folder with one, or a folder of torch.distributed.checkpoint.

    Returns
    -------
    Weights
        The weights.

    Raises
    ------
    UsageError
        If nothing is there, or no weights are.
    """
    if path.is_file():
        return open_file(path)
    if not path.exists():
        message = f"{path}: no such file or folder"
        raise UsageError(message)
    if (path / METADATA).is_file():
        return DistributedWeights(path)
    file = weights_file(path)
    if file is None:
        message = f"{path}: expected a checkpoint, found a folder without {', '.join(_FILES)} or {METADATA}"
        raise UsageError(message)
    return open_file(file)


_NUMBER = re.compile(r"\d+")
_NAMED_NUMBER = re.compile(r"(?:step|iter|iteration|update|checkpoint|ckpt)s?[-_=.]*(\d+)")


def number_in(name: str) -> int | None:
    """Read the number of updates from a name.

    Parameters
    ----------
    name
        Such as ``step1000``, ``checkpoint-500``, ``epoch=2-step=300`` or ``stage1-step1000-tokens5B``.

    Returns
    -------
    int or None
        The number after a word for updates, or the only number; None where that does not decide.

    Examples
    --------
    >>> [number_in(name) for name in ("step1000", "checkpoint-500", "epoch=2-step=300", "0007", "main", "v1-2")]
    [1000, 500, 300, 7, None, None]
    """
    named = _NAMED_NUMBER.findall(name)
    numbers = named or _NUMBER.findall(name)
    return int(numbers[0]) if len(set(numbers)) == 1 else None


def whole_number(facts: Mapping[str, Any], key: str) -> int | None:
    """Take a number of updates from what a file tells.

    Parameters
    ----------
    facts
        What it tells.
    key
        The entry.

    Returns
    -------
    int or None
        None where there is none, or no such number.
    """
    value = facts.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
