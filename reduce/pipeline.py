"""From shards to a cube: one lazy task a shard, their steps laid one behind the other, a block at a time.

The only file of this package that names dask. A block is `cube.STEPS_AT_ONCE` steps of all loss data; its shards are
read and reduced one by one, it is written, and only then the next block begins. So memory does not grow with the
number of steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask
import numpy as np

from recorder.errors import FormatError
from reduce import cube, sampling, schema, sources
from reduce.grouping import Grouping, grouping
from reduce.statistics import STATISTICS
from replay import shards

if TYPE_CHECKING:
    import numpy.typing as npt
    import xarray as xr

    Arrays = dict[str, npt.NDArray[Any]]

_OF_THE_UPDATE = ("epoch", "lr", "predictions")
_OF_THE_ENTRY = ("loss_start", "loss_end", "residual", "tolerance", "status", "evaluations", sampling.TOTAL)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Plan:
    """What goes into a cube, before anything is read.

    Parameters
    ----------
    chosen
        The shards of each loss data.
    steps
        Array of shape (steps,), int64: the steps of the shards, which are intervals between checkpoints along a chord.
    updates
        Array of shape (steps, 2), int64: after how many updates each begins and ends, which the cube tells.
    grouping
        The groups of the run's parameters.
    """

    chosen: tuple[sources.Source, ...]
    steps: sources.Steps
    updates: sources.Updates
    grouping: Grouping


def plan(run: Path, hashes: Sequence[str] = ()) -> Plan:
    """Choose the shards of a run and lay out the cube's axes.

    Parameters
    ----------
    run
        The run's folder.
    hashes
        As for `sources.choose`.

    Returns
    -------
    Plan
        The plan.
    """
    chosen = sources.choose(run, hashes)
    steps = sources.all_steps(chosen)
    return Plan(
        chosen=chosen,
        steps=steps,
        updates=sources.updates(chosen, steps),
        grouping=grouping(chosen[0].folder.parameters),
    )


def write(plan: Plan, path: Path, *, command: str, advance: Callable[[int], None] = lambda steps: None) -> None:
    """Reduce the shards of a plan to a cube.

    Parameters
    ----------
    plan
        The plan.
    path
        The cube's file.
    command
        The command line, for the cube's history.
    advance
        Called with the number of steps of every block that is done.
    """
    attributes = schema.attributes(
        path=plan.chosen[0].folder.settings.path, provenance=sources.provenance(plan.chosen), command=command
    )
    axes = _axes(plan)

    def made() -> Iterator[xr.Dataset]:
        for block in blocks(plan):
            # Threads were measured to be slower: nearly all the time goes into copying and checking the shards'
            # bytes, which holds the interpreter's lock.
            arrays: Arrays = block.compute(scheduler="synchronous")
            rows = np.searchsorted(plan.steps, arrays["step"])
            arrays["step"], arrays["step_end"] = plan.updates[rows].T
            yield cube.make({**axes, **arrays}, attributes)
            advance(len(rows))

    cube.write(path, made(), steps=len(plan.steps))


def blocks(plan: Plan) -> Iterator[Any]:
    """Yield the cube's blocks of steps, each a lazy value with its own small graph: one task a shard, one to join.

    Parameters
    ----------
    plan
        The plan.

    Yields
    ------
    dask.delayed.Delayed
        Computes to the block's arrays along step, by the name of the cube's variable or coordinate.
    """
    groups = dask.delayed(plan.grouping, pure=False, traverse=False)
    for first in range(0, len(plan.steps), cube.STEPS_AT_ONCE):
        steps = plan.steps[first : first + cube.STEPS_AT_ONCE]
        parts = [
            [
                dask.delayed(reduce_shard, pure=False)(source.folder, start, stop, groups)
                for start, stop in source.ranges
                if start <= steps[-1] and stop > steps[0]
            ]
            for source in plan.chosen
        ]
        yield dask.delayed(join, pure=False)(parts, steps, groups)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Part:
    """One shard, its units added up.

    Parameters
    ----------
    per_step
        Name to array of shape (steps,), as in the shard, and the standard error of the sum over all cells.
    totals
        Variable of the cube to array of shape (steps, groups), float64, not finalized.
    """

    per_step: Arrays
    totals: Arrays


def reduce_shard(folder: shards.ShardFolder, start: int, stop: int, grouping: Grouping) -> Part:
    """Read one shard and add up its units.

    Parameters
    ----------
    folder
        The folder of shards.
    start, stop
        The shard's range of steps.
    grouping
        The groups of the run's parameters.

    Returns
    -------
    Part
        What is left of it: its size depends on the number of groups, no more on the number of units.

    Raises
    ------
    FormatError
        If the steps inside are not those of the file's name.
    """
    shard = folder.read(start, stop)
    found = shard.per_step["step"]
    if not np.array_equal(found, np.arange(start, stop)):
        message = (
            f"{folder.file(start, stop)}: expected steps {start} to {stop - 1}, found {found.tolist()}; "
            "remove the file and run python -m replay again"
        )
        raise FormatError(message)
    totals = {
        statistic.variable: statistic.partial(
            shard.per_unit[statistic.quantity], statistic.groups(grouping), stop - start
        )
        for statistic in STATISTICS
    }
    totals[sampling.CELLS], of_total = sampling.standard_errors(shard, grouping)
    return Part(per_step={**shard.per_step, sampling.TOTAL: of_total}, totals=totals)


def join(parts: Sequence[Sequence[Part]], steps: sources.Steps, grouping: Grouping) -> Arrays:
    """Lay the parts of every loss data on one block of steps, and finalize.

    Parameters
    ----------
    parts
        For every loss data its parts that hold any of the steps.
    steps
        Array of shape (steps,), int64, ascending.
    grouping
        The groups of the run's parameters.

    Returns
    -------
    dict
        Name to array, for every variable and coordinate of the cube along step. Steps that no part holds are NaN,
        their status is `schema.MISSING`, their evaluations 0.
    """
    shape = (len(parts), len(steps))
    entries: Arrays = {name: np.full(shape, np.nan) for name in _OF_THE_ENTRY}
    entries["status"] = np.full(shape, schema.MISSING, dtype=np.int8)
    entries["evaluations"] = np.zeros(shape, dtype=np.int64)
    totals: Arrays = {
        statistic.variable: np.full((*shape, statistic.groups(grouping).size), np.nan) for statistic in STATISTICS
    }
    totals[sampling.CELLS] = np.full((*shape, grouping.cells.size), np.nan)
    updates: Arrays = {name: np.zeros(len(steps), dtype=shards.PER_STEP[name]) for name in _OF_THE_UPDATE}
    known = np.zeros(len(steps), dtype=bool)
    for data, of_data in enumerate(parts):
        for part in of_data:
            inside = np.isin(part.per_step["step"], steps, assume_unique=True)
            rows = np.searchsorted(steps, part.per_step["step"][inside])
            for name, column in entries.items():
                column[data, rows] = part.per_step[name][inside]
            for name, table in totals.items():
                table[data, rows] = part.totals[name][inside]
            for name, update in updates.items():
                values = part.per_step[name][inside]
                _check_same_update(name, steps[rows], values, np.where(known[rows], update[rows], values))
                update[rows] = values
            known[rows] = True
    totals[sampling.CELLS] = totals[sampling.CELLS].reshape(*shape, *grouping.cells.shape)
    for statistic in STATISTICS:
        groups = statistic.groups(grouping)
        table = totals[statistic.variable].reshape(*shape, *groups.shape)
        totals[statistic.variable] = statistic.finalize(table, groups.entries)
    return {"step": steps, **updates, **entries, **totals}


def _check_same_update(name: str, steps: sources.Steps, values: Any, before: Any) -> None:
    differing = np.flatnonzero(~np.isclose(values, before, rtol=0, atol=0, equal_nan=True))
    if differing.size:
        first = differing[0]
        message = (
            f"step {steps[first]}: expected {name} {before[first]} as on the other loss data, found {values[first]}; "
            "the loss data were not replayed from the same recorded run"
        )
        raise FormatError(message)


def _axes(plan: Plan) -> Arrays:
    layers = plan.grouping.layers
    return {
        "data": np.array([source.loss_data for source in plan.chosen]),
        "layer": np.array([layer.name for layer in layers]),
        "stack": np.array([layer.stack for layer in layers]),
        "depth": np.array([layer.depth for layer in layers], dtype=np.int64),
        "component": np.array(shards.COMPONENTS),
        "attention_component": np.array(shards.ATTENTION_COMPONENTS),
        "head": np.arange(plan.grouping.heads.shape[-1], dtype=np.int64),
        "n_parameters": plan.grouping.cells.entries,
        "n_not_recorded": plan.grouping.not_recorded,
        "n_tied": plan.grouping.tied,
    }
