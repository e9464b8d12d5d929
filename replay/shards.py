"""The shards of a run: what replay computed for contiguous ranges of steps, one file a range.

    RUN/shards/<settings-hash>/settings.json                       one loss data, rule and recipe; the parameter table
    RUN/shards/<settings-hash>/00000000-00000008.safetensors       steps 0 to 7
    RUN/shards/table.json                                          which parameter table the run has now

Described for readers in any language in docs/formats/shards.md. This module is the door for who reads shards; a folder
is the matter of `shardfolder` and `settingsfile`, the mark of `tablemark`, and what is in a file of `columns` and
`shardfile`. None of them imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from recorder.errors import UsageError
from recorder.table import ATTENTION_COMPONENTS, COMPONENTS, MODEL_LAYER, Parameter, Part
from replay.columns import PER_PARAMETER, PER_STEP, PER_UNIT, Shard, Status
from replay.settings import VERSION, Settings
from replay.settingsfile import SETTINGS_FILE
from replay.shardfolder import FOLDER, ShardFolder
from replay.tablemark import marked_table

__all__ = [
    # What a reader of shards needs of the floors below stands here too.
    "ATTENTION_COMPONENTS",
    "COMPONENTS",
    "MODEL_LAYER",
    "PER_PARAMETER",
    "PER_STEP",
    "PER_UNIT",
    "VERSION",
    "Parameter",
    "Part",
    "Settings",
    "Shard",
    "ShardFolder",
    "Status",
    "folders",
    "marked_table",
]


def folders(run: Path) -> list[ShardFolder]:
    """Open every folder of shards of a run.

    Parameters
    ----------
    run
        The run's folder.

    Returns
    -------
    list of ShardFolder
        Ordered by loss data, then by hash; empty folders of shards are left out.

    Raises
    ------
    UsageError
        If there is no such run, or it was not replayed yet.
    """
    run = Path(run)
    if not run.is_dir():
        message = f"no such run folder: {run}"
        raise UsageError(message)
    parent = run / FOLDER
    found: Iterable[Path] = parent.iterdir() if parent.is_dir() else ()
    opened = [ShardFolder.open(path) for path in found if (path / SETTINGS_FILE).exists()]
    replayed = [folder for folder in opened if folder.finished()]
    if not replayed:
        message = f"{run}: holds no shards; run first: python -m replay --run {run}"
        raise UsageError(message)
    return sorted(replayed, key=lambda folder: (folder.settings.loss_data, folder.settings.hash))
