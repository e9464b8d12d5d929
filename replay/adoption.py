"""Shards of pruned steps, taken over when the parameter table has grown.

A parameter joins the ledger with its first gradient, and with it the table changes, which decides the folder of the
shards. What was recorded before is replayed again under the new table, unless it was pruned: then its shards are taken
over from the folder of the former table. The parameter did not move in those steps, so its LCA is exactly zero; its
gradient was not computed and is told as NaN.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from recorder import commandline
from recorder.errors import UsageError
from recorder.ranges import describe_ranges, overlap
from replay.columns import spread_shape
from replay.shards import PER_PARAMETER, PER_UNIT, Shard, ShardFolder, folders

if TYPE_CHECKING:
    from collections.abc import Sequence

    from recorder.table import Parameter
    from replay.work import Replayer


def adopt_pruned(opened: Replayer) -> None:
    """Take over the shards of pruned steps from folders of a smaller parameter table, and say so.

    Parameters
    ----------
    opened
        The run, and the folders of its shards under the table as it is now.
    """
    run = opened.run
    if not run.pruned:
        return
    for name, folder in opened.folders.items():
        taken = []
        for other in _of_smaller_tables(opened, folder):
            there = {t for start, stop in folder.finished() for t in range(start, stop)}
            for start, stop in other.finished():
                pruned = overlap(run.pruned, start, stop)
                same = other.attempts(start, stop) == run.attempts_within(start, stop)
                if pruned and same and not there.intersection(range(start, stop)):
                    joined = [row for row in folder.trained if row not in other.trained]
                    shard = _widened(other.read(start, stop), joined, stop - start)
                    folder.write(start, stop, shard, run.attempts_within(start, stop))
                    taken.append((start, stop))
        if taken:
            commandline.say(
                f"{run.path}: the parameter table has grown; of {describe_ranges(sorted(taken))}, which were pruned, "
                f"the shards on {name} are those of the former table, and what joined since has LCA 0"
            )


def _of_smaller_tables(opened: Replayer, folder: ShardFolder) -> list[ShardFolder]:
    try:
        there = folders(opened.run.path)
    except UsageError:  # nothing was replayed yet
        return []
    return [
        other
        for other in there
        if other.path != folder.path
        and dataclasses.replace(other.settings, parameter_table=folder.settings.parameter_table) == folder.settings
        and set(other.trained) < set(folder.trained)
    ]


def _widened(shard: Shard, joined: Sequence[Parameter], steps: int) -> Shard:
    still = {"gradient_norm": np.nan, "update_norm": 0.0, "cosine": np.nan}
    per_unit = {name: dict(rows) for name, rows in shard.per_unit.items()}
    per_parameter = {name: dict(rows) for name, rows in shard.per_parameter.items()}
    for row in joined:
        for name, dtype in PER_UNIT.items():
            zero_entries = row.size // row.units if name == "zero_count" else 0
            per_unit[name][row.name] = np.full((steps, row.units), zero_entries, dtype)
        for name, dtype in PER_PARAMETER.items():
            per_parameter[name][row.name] = np.full(steps, still[name], dtype)
    spread = dict(shard.spread)
    if shard.counts is not None:
        spread |= {row.name: np.zeros(spread_shape(row, shard.counts.shape)) for row in joined}
    return dataclasses.replace(shard, per_unit=per_unit, per_parameter=per_parameter, spread=spread)
