"""Which kind of checkpoints a source holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from recorder.errors import UsageError
from recorder.importing import distributed_folder, fairseq_folder, huggingface_folder, lightning_files, listed_files
from recorder.importing.found import Source

_ROOMS: tuple[ModuleType, ...] = (
    fairseq_folder,
    huggingface_folder,
    lightning_files,
    distributed_folder,
    listed_files,
)
KINDS: dict[str, ModuleType] = {room.KIND: room for room in _ROOMS}
"""In the order in which they are tried: names that only one trainer gives come first."""


def find(source: Path | None, kind: str | None, named: Sequence[str]) -> Source:
    """Find the checkpoints of a source.

    Parameters
    ----------
    source
        A folder or a list; None where all are named.
    kind
        One of `KINDS`; None to tell it from what is there.
    named
        Further checkpoints, each ``N=PATH``.

    Returns
    -------
    Source
        Of all.

    Raises
    ------
    UsageError
        If nothing is there, or it is of no kind.
    """
    listed = listed_files.named(named)
    if source is None:
        if not named:
            message = "expected a SOURCE, or --step N=PATH for each checkpoint; see python -m recorder import --help"
            raise UsageError(message)
        return listed
    if not source.exists():
        message = f"{source}: no such file or folder"
        raise UsageError(message)
    room = KINDS[kind] if kind else next((room for room in KINDS.values() if room.recognises(source)), None)
    if room is None:
        message = (
            f"{source}: holds no checkpoints of a known kind: fairseq's checkpoint_*.pt; folders checkpoint-N or a "
            "repository of the hub's cache; Lightning's *.ckpt; folders of torch.distributed.checkpoint; a list or "
            "numbered files. Name them one by one: --step N=PATH"
        )
        raise UsageError(message)
    found: Source = room.find(source)
    return dataclasses.replace(found, checkpoints=(*found.checkpoints, *listed.checkpoints))
