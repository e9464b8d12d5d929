"""Shards of a former parameter table, taken over under the present one.

The table decides the folder of the shards, and a table may change: a parameter joins the ledger with its first
gradient, or the run's map is corrected (``python -m recorder map``). What a shard holds depends on little of it: which
parameters are in the ledger, their unit axes, and, where standard errors are kept, which units are of one component.
Where that is the same, the shards move to the folder of the present table, and nothing is computed again.

Where a parameter has joined since, all is replayed again but the steps that were pruned. The parameter did not move in
those, so its LCA is exactly zero; its gradient was not computed and is told as NaN.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock

from recorder import commandline
from recorder.errors import FormatError
from recorder.ranges import describe_ranges, overlap
from replay import entries
from replay.columns import PER_PARAMETER, PER_UNIT, Shard, spread_shape
from replay.entryfile import entry_files, move_entries
from replay.settingsfile import SETTINGS_FILE
from replay.shardfolder import FOLDER, ShardFolder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from recorder.table import Parameter
    from replay.chunks import Range
    from replay.work import Replayer

LOCK_FILE = ".adoption-lock"
_NAMED = 3


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Way:
    """From a folder of a former table to that of the present one, all other settings being the same.

    Parameters
    ----------
    source, target
        The two folders.
    joined
        Parameters that are in the ledger only now.
    changed
        Names of parameters of which other numbers were kept than would be now: of other units, or of other uses.
    parted
        Names of parameters whose units are divided into components otherwise.
    """

    source: ShardFolder
    target: ShardFolder
    joined: tuple[Parameter, ...]
    changed: tuple[str, ...]
    parted: tuple[str, ...]

    @property
    def sampled(self) -> bool:
        """Whether standard errors are kept, which know the components of a parameter."""
        finished = self.source.finished()
        return bool(finished) and self.source.sampled(*finished[0])

    @property
    def obstacle(self) -> str:
        """In words, why nothing can be taken over; empty if it can."""
        if self.changed:
            return f"the units, or the uses, of {_names(self.changed)} are others now"
        if self.parted and self.sampled:
            return f"the standard errors know other components of {_names(self.parted)}"
        return ""


def take_over(opened: Replayer) -> None:
    """Take over what was computed under former parameter tables, and say so; or say why not.

    Parameters
    ----------
    opened
        The run, and the folders of its shards under the table as it is now.
    """
    parent = opened.run.path / FOLDER
    # Commands side by side would move the same shards.
    with FileLock(parent / LOCK_FILE, is_singleton=False):
        for way in _ways(opened):
            ranges = _to_take(opened, way)
            name = way.target.settings.loss_data
            if not ranges:
                continue
            where = f"{opened.run.path}: of {describe_ranges(ranges)} the shards on {name}"
            if way.obstacle:
                commandline.say(
                    f"{where} were computed under another parameter table, and must be computed again: {way.obstacle}. "
                    f"The former ones stay in {way.source.path}"
                )
            elif way.joined:
                _copy_pruned(opened, way, ranges)
                commandline.say(
                    f"{opened.run.path}: the parameter table has grown; of {describe_ranges(ranges)}, which were "
                    f"pruned, the shards on {name} are those of the former table, and what joined since has LCA 0"
                )
            else:
                _move(opened, way, ranges)
                commandline.say(f"{where} are taken over under the present parameter table: their units are the same")


def takable(opened: Replayer) -> dict[str, list[Range]]:
    """List what `take_over` would take over; nothing is written.

    Parameters
    ----------
    opened
        As for `take_over`.

    Returns
    -------
    dict of str to list of (int, int)
        Loss data of the job to start and stop of every shard.
    """
    return {
        name: [shard for way in _ways(opened, folder) if not way.obstacle for shard in _to_take(opened, way)]
        for name, folder in opened.folders.items()
    }


def _ways(opened: Replayer, only: ShardFolder | None = None) -> Iterator[_Way]:
    # Other loss data than those asked for, too: a cube takes all of a run, and all under one table.
    like = next(iter(opened.folders.values()))
    for source in _folders(opened.run.path / FOLDER):
        settings = dataclasses.replace(source.settings, parameter_table=like.settings.parameter_table)
        if settings == source.settings or settings.run_id != like.settings.run_id:
            continue
        target = ShardFolder.of(opened.run.path, settings, like.parameters, like.provenance)
        if only is None or only.path == target.path:
            yield _way(source, target)


def _folders(parent: Path) -> Iterator[ShardFolder]:
    for path in sorted(parent.iterdir()) if parent.is_dir() else ():
        if (path / SETTINGS_FILE).exists():
            try:
                folder = ShardFolder.open(path)
            except FormatError:  # of another version: what cannot be read cannot be taken over
                continue
            if folder.finished():
                yield folder


def _way(source: ShardFolder, target: ShardFolder) -> _Way:
    before, now = ({row.name: row for row in folder.trained} for folder in (source, target))
    joined = tuple(row for name, row in now.items() if name not in before)
    # A further use takes its part from the numbers of the parameter that was there before.
    changed = [name for name in before if name not in now] + [row.name for row in joined if row.tied_to in before]
    both = [name for name in now if name in before]
    return _Way(
        source=source,
        target=target,
        joined=joined,
        changed=(*changed, *(name for name in both if _units(before[name]) != _units(now[name]))),
        parted=tuple(name for name in both if _components(before[name]) != _components(now[name])),
    )


def _units(row: Parameter) -> tuple[object, ...]:
    return row.shape, row.dtype, row.model_dtype, row.unit_axis, row.tied_to


def _components(row: Parameter) -> list[tuple[int, int]]:
    # Where one part ends and the next begins, whatever they are called; heads make no difference.
    found: list[tuple[int, int]] = []
    for block in row.blocks:
        if found and found[-1][0] == block.part:
            found[-1] = (block.part, found[-1][1] + block.units)
        else:
            found.append((block.part, block.units))
    return found


def _to_take(opened: Replayer, way: _Way) -> list[Range]:
    run = opened.run
    there = {t for start, stop in way.target.finished() for t in range(start, stop)}
    return [
        (start, stop)
        for start, stop in way.source.finished()
        if not there.intersection(range(start, stop))
        and (way.changed or not way.joined or overlap(run.pruned, start, stop))
        and way.source.attempts(start, stop) == run.attempts_within(start, stop)
    ]


def _move(opened: Replayer, way: _Way, ranges: Sequence[Range]) -> None:
    way.target.make()
    for start, stop in ranges:
        way.target.write(start, stop, way.source.read(start, stop), opened.run.attempts_within(start, stop))
        way.source.remove(start, stop)
    entries.remove_stale(way.source.path, opened.run.ever_recorded, opened.run.attempts_within)
    _move_entries(way)


def _move_entries(way: _Way) -> None:
    # Single entries have the same names and numbers. A window of which the target holds anything stays where it is.
    names = [row.name for row in way.target.trained if row.tied_to is None]
    there = {window for _, window, _ in entry_files(way.target.path)}
    for path, window, _ in list(entry_files(way.source.path)):
        if window not in there:
            move_entries(path, way.target.path, names, settings=way.target.settings.hash)


def _copy_pruned(opened: Replayer, way: _Way, ranges: Sequence[Range]) -> None:
    way.target.make()
    for start, stop in ranges:
        shard = _widened(way.source.read(start, stop), way.joined, stop - start)
        way.target.write(start, stop, shard, opened.run.attempts_within(start, stop))


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


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(map(repr, names[:_NAMED]))}{more}"
