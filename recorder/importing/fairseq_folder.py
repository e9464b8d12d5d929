"""A folder of fairseq's ``checkpoint_*.pt``: the update number is the checkpoint's own, whatever its file is called."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recorder.errors import UsageError
from recorder.importing.found import Found, Source, whole_number
from recorder.importing.unpickling import load, pickled

KIND = "fairseq"
_PATTERN = "checkpoint*.pt"


def recognises(source: Path) -> bool:
    """Tell whether a source is a folder of fairseq's checkpoints.

    Parameters
    ----------
    source
        The folder.

    Returns
    -------
    bool
        Whether it holds files of fairseq's names.
    """
    return source.is_dir() and any(source.glob(_PATTERN))


def find(source: Path) -> Source:
    """Find the checkpoints.

    Parameters
    ----------
    source
        The folder.

    Returns
    -------
    Source
        One for each update number; ``checkpoint_best.pt`` and ``checkpoint_last.pt`` often are copies of another.

    Raises
    ------
    UsageError
        If there are none, or one is sharded.
    """
    files = sorted(source.glob(_PATTERN))
    sharded = [file.name for file in files if "-shard" in file.name]
    if sharded:
        message = (
            f"{source}: {sharded[0]} is one shard of several; put the shards together with fairseq's "
            "scripts/consolidate_fsdp_shards.py, and import the result"
        )
        raise UsageError(message)
    if not files:
        message = f"{source}: expected fairseq's {_PATTERN}, found none"
        raise UsageError(message)
    return Source(kind=KIND, checkpoints=tuple(_checkpoint(file) for file in files))


def _checkpoint(file: Path) -> Found:
    document = load(file)
    updates = None
    if isinstance(document, Mapping) and isinstance(document.get("model"), Mapping):
        history = document.get("optimizer_history") or [{}]
        updates = whole_number(history[-1], "num_updates")
    if updates is None:
        message = (
            f"{file}: expected a checkpoint of fairseq, with its weights under 'model' and the number of updates in "
            "its 'optimizer_history'. Is it another trainer's? --kind files takes the number from the name of a file, "
            "--step N=FILE from you"
        )
        raise UsageError(message)
    return Found(step=updates, path=file, open=functools.partial(pickled, file, ("model",)), epoch=_epoch(document))


def _epoch(document: Mapping[str, Any]) -> int:
    # The iterator's own, which counts from 1.
    state = document.get("extra_state")
    iterator = state.get("train_iterator") if isinstance(state, Mapping) else None
    return (whole_number(iterator, "epoch") if isinstance(iterator, Mapping) else None) or 0
