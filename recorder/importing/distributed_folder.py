"""A folder of folders of ``torch.distributed.checkpoint``, each with its number of updates in the name."""

from __future__ import annotations

import functools
from pathlib import Path

from recorder.errors import UsageError
from recorder.importing.distributed_weights import METADATA, DistributedWeights
from recorder.importing.found import Found, Source, number_in

KIND = "distributed"


def recognises(source: Path) -> bool:
    """Tell whether a source is a folder of such folders.

    Parameters
    ----------
    source
        The folder.

    Returns
    -------
    bool
        Whether a folder in it has ``.metadata``.
    """
    return bool(_folders(source))


def _folders(source: Path) -> list[Path]:
    return sorted(file.parent for file in source.glob(f"*/{METADATA}"))


def find(source: Path) -> Source:
    """Find the checkpoints.

    Parameters
    ----------
    source
        The folder.

    Returns
    -------
    Source
        Every folder whose name has a number of updates.

    Raises
    ------
    UsageError
        If there are none.
    """
    checkpoints, notes = [], []
    for folder in _folders(source):
        step = number_in(folder.name)
        if step is None:
            notes.append(f"{folder.name} has no number of updates in its name and is left out")
        else:
            checkpoints.append(Found(step=step, path=folder, open=functools.partial(DistributedWeights, folder)))
    if not checkpoints:
        message = (
            f"{source}: expected folders of torch.distributed.checkpoint with their number of updates in the name, "
            f"such as step-1000, found none{''.join(f' ({note})' for note in notes)}; or name them: --step N=FOLDER"
        )
        raise UsageError(message)
    return Source(kind=KIND, checkpoints=tuple(checkpoints), notes=tuple(notes))
