"""Three steps of what is to do, computed and timed; nothing is written.

The first, the middle and the last of them: the adaptive rule takes other numbers of evaluations early in a training
than late. One of them is done once before, untimed, for what only the first use takes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from replay.collector import Collector
from replay.ledger import sharers
from replay.rows import Rows

if TYPE_CHECKING:
    from replay.dropout import RandomStates
    from replay.evaluation import Evaluation, Surface, Theta
    from replay.job import Task
    from replay.products import Projection
    from replay.reading import RecordedStep
    from replay.work import Replayer

STEPS = 3

Clock = Callable[[], float]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """What a step takes on one loss data, on average over the trial.

    Parameters
    ----------
    evaluations
        Gradient evaluations of a step that finds none done by the step before.
    evaluation_seconds, pass_seconds
        Of one gradient evaluation, and of one forward pass alone; 0 where the trial had none.
    rest_seconds
        Of a step, beside these: sums, norms, single entries.
    """

    evaluations: float
    evaluation_seconds: float
    pass_seconds: float
    rest_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What was found.

    Parameters
    ----------
    steps
        The steps.
    reading_seconds
        Of one step: to read and decode the θ at its end.
    paces
        Loss data to its pace; of a loss data in groups also the groups.
    """

    steps: tuple[int, ...]
    reading_seconds: float
    paces: Mapping[str, Pace]


def clock_of(device: torch.device) -> Clock:
    """Choose the clock that a device's work is timed by.

    Parameters
    ----------
    device
        Where it is computed.

    Returns
    -------
    callable
        Seconds, when all that the device was given to do is done.
    """
    if device.type != "cuda":
        return time.perf_counter

    def when_done() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return when_done


def spread_over(tasks: Sequence[Task]) -> tuple[int, ...]:
    """Choose the first, the middle and the last of the steps to do.

    Parameters
    ----------
    tasks
        What is to do; at least one.

    Returns
    -------
    tuple of int
        The steps; fewer where there are not so many.

    Examples
    --------
    >>> from replay.job import Task
    >>> spread_over([Task(start=4, stop=9, loss_data=("batch",))])
    (4, 6, 8)
    """
    steps = [t for task in tasks for t in range(task.start, task.stop)]
    last = len(steps) - 1
    return tuple(dict.fromkeys(steps[position * last // (STEPS - 1)] for position in range(STEPS)))


def try_steps(opened: Replayer, tasks: Sequence[Task], clock: Clock | None = None) -> Trial:
    """Do a few of the steps to do, on all loss data that any of them is to be done on.

    Parameters
    ----------
    opened
        The run, opened for replay.
    tasks
        What is to do; at least one.
    clock
        Tells seconds; by default as `clock_of` the job's device.

    Returns
    -------
    Trial
        What they took.
    """
    clock = clock_of(opened.device) if clock is None else clock
    wanted = {name for task in tasks for name in task.loss_data}
    # In the order of a replay: groups before what is put together of them.
    wanted |= {part for name in wanted for part in opened.measuring.evaluated(name)}
    names = [name for name in opened.loss_data if name in wanted]
    steps = spread_over(tasks)
    _Stopwatch(opened, names, clock).take(steps[0])
    watch = _Stopwatch(opened, names, clock)
    for t in steps:
        watch.take(t)
    return Trial(
        steps=steps,
        reading_seconds=watch.reading / len(steps),
        paces={name: watch.spent[name].pace(len(steps)) for name in names},
    )


@dataclasses.dataclass(slots=True)
class _Spent:
    evaluations: int = 0
    evaluating: float = 0.0
    passes: int = 0
    passing: float = 0.0
    whole: float = 0.0

    def pace(self, steps: int) -> Pace:
        return Pace(
            evaluations=self.evaluations / steps,
            evaluation_seconds=self.evaluating / max(self.evaluations, 1),
            pass_seconds=self.passing / max(self.passes, 1),
            rest_seconds=(self.whole - self.evaluating - self.passing) / steps,
        )


class _Stopwatch:
    """Takes the time of steps, part by part."""

    def __init__(self, opened: Replayer, names: Sequence[str], clock: Clock) -> None:
        self._opened, self._names, self._clock = opened, names, clock
        self.spent = {name: _Spent() for name in names}
        self.reading = 0.0

    def take(self, t: int) -> None:
        opened, trained = self._opened, self._opened.trained
        step = self._read(t)
        surface = _Timed(opened.surface, self._clock)
        # The losses at both ends at every step: how many of the steps to do have them is known without a trial.
        allocations = opened.measuring.allocations(step, self._names, {}, surface=surface, check=True)
        for name in self._names:
            surface.spent = spent = self.spent[name]
            began = self._clock()
            _, allocation = next(allocations)
            Rows(1, trained, opened.tolerance).add(step.record, allocation)
            self._collector(t).add(t, allocation)
            spent.whole += self._clock() - began

    def _read(self, t: int) -> RecordedStep:
        # What comes before θ_t in its segment is not the step's own.
        self._opened.run.parameters(t)
        began = self._clock()
        list(self._opened.reader.steps(t, t))
        without_end = self._clock()
        (step,) = self._opened.reader.steps(t, t + 1)
        self.reading += max(0.0, (self._clock() - without_end) - (without_end - began))
        return step

    def _collector(self, t: int) -> Collector:
        of_step = [((t, t + 1), (t, t + 1))] if any(a <= t < b for a, b in self._opened.job.windows) else []
        return Collector(of_step, lambda window, steps, sums: None, sharers(self._opened.trained))


class _Timed:
    """A surface whose passes are timed."""

    def __init__(self, surface: Surface, clock: Clock) -> None:
        self._surface, self._clock = surface, clock
        self.spent = _Spent()

    def evaluate(
        self,
        theta: Theta,
        micro_batches: Sequence[Any],
        direction: Projection | None = None,
        *,
        states: RandomStates | None = None,
    ) -> Evaluation:
        began = self._clock()
        evaluation = self._surface.evaluate(theta, micro_batches, direction, states=states)
        self.spent.evaluating += self._clock() - began
        self.spent.evaluations += 1
        return evaluation

    def loss(self, theta: Theta, micro_batches: Sequence[Any], *, states: RandomStates | None = None) -> float:
        began = self._clock()
        loss = self._surface.loss(theta, micro_batches, states=states)
        self.spent.passing += self._clock() - began
        self.spent.passes += 1
        return loss
