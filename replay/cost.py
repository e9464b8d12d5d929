"""What a task will take, told before the work: evaluations, bytes of memory and of disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from replay.columns import PER_PARAMETER, PER_STEP, PER_UNIT
from replay.memory import Held, bytes_of_worker

if TYPE_CHECKING:
    from collections.abc import Mapping

    from replay.job import Task
    from replay.work import Replayer


def evaluations(opened: Replayer, task: Task) -> int:
    """Count the gradient evaluations that a task will take, at least.

    Parameters
    ----------
    opened
        The run, opened for replay.
    task
        The task.

    Returns
    -------
    int
        Over all its steps and loss data.
    """
    nodes = opened.rule.least_evaluations
    return sum(nodes * steps - shared for steps, shared in _steps_and_shared(opened, task).values())


def expected_evaluations(opened: Replayer, task: Task, of_step: Mapping[str, float]) -> dict[str, float]:
    """Count the gradient evaluations that a task will take, from how many a step takes.

    Parameters
    ----------
    opened
        The run, opened for replay.
    task
        The task.
    of_step
        Loss data to the evaluations of a step that finds none done by the step before.

    Returns
    -------
    dict of str to float
        By loss data; of one in groups by group.
    """
    return {name: of_step[name] * steps - shared for name, (steps, shared) in _steps_and_shared(opened, task).items()}


def _steps_and_shared(opened: Replayer, task: Task) -> dict[str, tuple[int, int]]:
    # Steps of each loss data that is evaluated, and how many of them find their first evaluation done.
    steps = task.stop - task.start
    # Where buffers change from step to step, the loss at the end of one is not that at the start of the next.
    shared = opened.rule.starts_at_start and opened.rule.ends_at_end and not opened.run.manifest.buffers
    evaluated = dict.fromkeys(part for name in task.loss_data for part in opened.measuring.evaluated(name))
    return {name: (steps, steps - 1 if shared and opened.loss_data[name].fixed else 0) for name in evaluated}


def forward_passes(opened: Replayer, task: Task) -> dict[str, int]:
    """Count the passes that a task takes for losses at ends of a step where the rule has no node: no gradients.

    Parameters
    ----------
    opened
        The run, opened for replay.
    task
        The task.

    Returns
    -------
    dict of str to int
        By loss data; of one in groups by group.
    """
    ends = (not opened.rule.starts_at_start) + (not opened.rule.ends_at_end)
    checked = sum(t % opened.job.check_every == 0 for t in range(task.start, task.stop))
    return dict.fromkeys(_steps_and_shared(opened, task), ends * checked)


def bytes_in_memory(opened: Replayer, task: Task) -> int:
    """Estimate what a worker on a task holds at most, as `replay.memory` has it.

    Parameters
    ----------
    opened
        The run, opened for replay.
    task
        The task.

    Returns
    -------
    int
        Bytes, beside those of Python and its libraries and of one pass over a micro-batch.
    """
    return bytes_of_worker(opened.trained, opened.rule, opened.precision, _held(opened, task))


def _held(opened: Replayer, task: Task) -> Held:
    evaluated = {name: opened.measuring.evaluated(name) for name in task.loss_data}
    groups = {part for name, parts in evaluated.items() if parts != [name] for part in parts}
    others = [opened.loss_data[name] for name, parts in evaluated.items() if parts == [name]]
    others = [data for data in others if data.name not in groups]
    # Where buffers change from step to step, no gradient serves two of them.
    serves = opened.rule.ends_at_end and not opened.run.manifest.buffers
    fixed = sum(data.fixed for data in others) if serves else 0
    return Held(
        together=len(groups) + bool(others),
        # That of the one at work is among the gradients that the rule looks at.
        kept=fixed - (0 < fixed == len(others)),
        sampled=any(data.sampled for data in others),
        summed=len(task.loss_data) if opened.job.windows else 0,
        rows=bytes_written(opened, task),
    )


def bytes_written(opened: Replayer, task: Task) -> int:
    """Count the bytes of a task's shards, without their headers.

    Parameters
    ----------
    opened
        The run, opened for replay.
    task
        The task.

    Returns
    -------
    int
        Bytes.
    """
    trained = opened.trained
    units = sum(parameter.units for parameter in trained)
    of_units = units * sum(np.dtype(dtype).itemsize for dtype in PER_UNIT.values())
    of_parameters = len(trained) * sum(np.dtype(dtype).itemsize for dtype in PER_PARAMETER.values())
    per_step = of_units + of_parameters + sum(np.dtype(dtype).itemsize for dtype in PER_STEP.values())
    steps = task.stop - task.start
    sampled = [opened.loss_data[name] for name in task.loss_data if opened.loss_data[name].sampled]
    first = opened.run.step(task.start)
    of_micro_batch = (1 + sum(len(row.parts) for row in trained)) * 8
    of_micro_batches = sum(len(data.micro_batches(first)) for data in sampled) * of_micro_batch
    return steps * (per_step * len(task.loss_data) + of_micro_batches)
