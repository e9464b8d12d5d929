"""Lightning's ``.ckpt`` files: ``state_dict`` and ``global_step``."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from recorder.errors import UsageError
from recorder.importing.found import Found, Source, whole_number
from recorder.importing.unpickling import load, pickled

KIND = "lightning"


def recognises(source: Path) -> bool:
    """Tell whether a source is a folder of Lightning's checkpoints.

    Parameters
    ----------
    source
        The folder.

    Returns
    -------
    bool
        Whether it, or its folder ``checkpoints``, holds files ``*.ckpt``.
    """
    return bool(_files(source))


def _files(source: Path) -> list[Path]:
    return sorted(source.glob("*.ckpt")) or sorted((source / "checkpoints").glob("*.ckpt"))


def find(source: Path) -> Source:
    """Find the checkpoints.

    Parameters
    ----------
    source
        The folder.

    Returns
    -------
    Source
        Every file; ``last.ckpt`` is often a copy of another.

    Raises
    ------
    UsageError
        If there are none.
    """
    files = _files(source)
    if not files:
        message = f"{source}: expected Lightning's *.ckpt there or in {source / 'checkpoints'}, found none"
        raise UsageError(message)
    return Source(kind=KIND, checkpoints=tuple(_checkpoint(file) for file in files))


def _checkpoint(file: Path) -> Found:
    document = load(file)
    step = whole_number(document, "global_step") if isinstance(document, Mapping) else None
    if step is None or not isinstance(document.get("state_dict"), Mapping):
        message = (
            f"{file}: expected a checkpoint of Lightning, with state_dict and global_step; import it by its number: "
            "--step N=FILE"
        )
        raise UsageError(message)
    epoch = whole_number(document, "epoch")
    return Found(
        step=step,
        path=file,
        open=functools.partial(pickled, file, ("state_dict",)),
        # Lightning counts epochs from 0.
        epoch=0 if epoch is None else epoch + 1,
    )
