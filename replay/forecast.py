"""From the pace of a trial to the time of a whole replay."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence
from typing import TYPE_CHECKING

from replay import cost
from replay.trial import Trial

if TYPE_CHECKING:
    from replay.job import Task
    from replay.readcost import Reading
    from replay.work import Replayer


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """How long a replay is going to take, if all its steps are like those of the trial.

    Parameters
    ----------
    trial
        A few steps, timed.
    steps
        To do.
    workers
        How many will work; None where a cluster has its own.
    gradient_evaluations
        Of all steps.
    evaluating_seconds
        In them, of one worker that does everything.
    work_seconds
        Of one worker that does everything, once it has opened the run.
    opening_seconds
        What each worker takes to open the run: model, data. The start of Python and its libraries is not known.
    expected_seconds
        Of all workers together, as long as they do not slow each other down; None where their number is not known.
    """

    trial: Trial
    steps: int
    workers: int | None
    gradient_evaluations: float
    evaluating_seconds: float
    work_seconds: float
    opening_seconds: float
    expected_seconds: float | None

    @property
    def evaluation_seconds(self) -> float:
        """Seconds of a gradient evaluation, on average over the loss data."""
        return self.evaluating_seconds / self.gradient_evaluations

    @property
    def step_seconds(self) -> float:
        """Seconds of a step on all loss data, with all that belongs to it: reading, sums, losses."""
        return self.work_seconds / self.steps

    @property
    def evaluations_per_second(self) -> float:
        """Of all workers together; of one, where their number is not known."""
        seconds = self.work_seconds if self.expected_seconds is None else self.expected_seconds
        return self.gradient_evaluations / seconds


def forecast(
    opened: Replayer, tasks: Sequence[Task], to_read: Sequence[Reading], trial: Trial, workers: int | None
) -> Forecast:
    """Tell how long tasks are going to take.

    Parameters
    ----------
    opened
        The run, opened for replay.
    tasks
        At least one.
    to_read
        What each has to read.
    trial
        The pace.
    workers
        How many will work; None where that is not known.

    Returns
    -------
    Forecast
        The times.
    """
    evaluating, evaluations, of_tasks = 0.0, 0.0, []
    of_step = {name: pace.evaluations for name, pace in trial.paces.items()}
    for task, reading in zip(tasks, to_read, strict=True):
        expected = cost.expected_evaluations(opened, task, of_step)
        in_evaluations = sum(count * trial.paces[name].evaluation_seconds for name, count in expected.items())
        evaluations += sum(expected.values())
        evaluating += in_evaluations
        of_tasks.append(in_evaluations + _beside_evaluations(opened, task, reading, trial, in_evaluations))
    together = None if workers is None else opened.seconds_to_open + shared_out(of_tasks, workers)
    return Forecast(
        trial=trial,
        steps=sum(task.stop - task.start for task in tasks),
        workers=workers,
        gradient_evaluations=evaluations,
        evaluating_seconds=evaluating,
        work_seconds=sum(of_tasks),
        opening_seconds=opened.seconds_to_open,
        expected_seconds=together,
    )


def _beside_evaluations(opened: Replayer, task: Task, reading: Reading, trial: Trial, in_evaluations: float) -> float:
    steps = task.stop - task.start
    passes = cost.forward_passes(opened, task)
    computing = sum(count * trial.paces[name].pass_seconds for name, count in passes.items())
    computing += steps * sum(trial.paces[name].rest_seconds for name in {*passes, *task.loss_data})
    if not opened.reader.ahead:
        return computing + reading.states * trial.reading_seconds
    # What is read while a step is computed on takes time only where it takes longer.
    first, beside = (reading.states - steps) * trial.reading_seconds, steps * trial.reading_seconds
    return computing + first + max(0.0, beside - computing - in_evaluations)


def shared_out(seconds: Sequence[float], workers: int) -> float:
    """Tell when the last task ends, if each goes to the worker that is free first.

    Parameters
    ----------
    seconds
        Of each task, in the order in which they are handed out.
    workers
        At least 1.

    Returns
    -------
    float
        Seconds.

    Examples
    --------
    >>> shared_out([2, 2, 2, 2, 2], 4)
    4.0
    """
    ends = [0.0] * workers
    for of_task in seconds:
        heapq.heapreplace(ends, ends[0] + of_task)
    return max(ends)
