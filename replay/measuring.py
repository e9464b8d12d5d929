"""A step measured and allocated on every loss data of a job, one after the other.

What loss data have in common is done once: the evaluation at the end of a step serves as the first one of the next, and
what is allocated on groups of examples is put together by weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from recorder.steps import Step
from replay import dropout
from replay.allocate import allocate
from replay.allocation import Allocation, by_weight
from replay.evaluation import Evaluation, Surface, Theta
from replay.examples import Grouped
from replay.products import Projection
from replay.recordedbatch import RecordedBatch

if TYPE_CHECKING:
    from recorder.table import Parameter
    from replay.gradients import LossSurface
    from replay.job import Job
    from replay.lossdata import LossData
    from replay.quadrature import AdaptiveRule, Rule
    from replay.reading import RecordedStep
    from replay.tolerance import Tolerance


class Measuring:
    """The loss data of a job, and what they are measured with.

    Parameters
    ----------
    job
        What to do.
    loss_data
        Name to loss data; the groups of examples before what is put together of them.
    surface
        The model.
    trained
        The rows of the ledger that LCA is computed of.
    rule
        The quadrature rule.
    tolerance
        When the books of a step balance.
    buffers
        Whether every step has buffers of its own, at which the model is held.
    """

    def __init__(
        self,
        job: Job,
        loss_data: Mapping[str, LossData],
        surface: LossSurface,
        trained: Sequence[Parameter],
        rule: Rule | AdaptiveRule,
        tolerance: Tolerance,
        *,
        buffers: bool,
    ) -> None:
        self._job, self._loss_data, self._surface, self._trained = job, loss_data, surface, trained
        self._rule, self._tolerance, self._buffers = rule, tolerance, buffers
        every = loss_data.values()
        self._in_groups = {part.name for data in every if isinstance(data, Grouped) for part in data.parts}

    def allocations(
        self,
        step: RecordedStep,
        names: Sequence[str],
        known: dict[str, Evaluation | None],
        *,
        surface: Surface | None = None,
        check: bool | None = None,
    ) -> Iterator[tuple[str, Allocation]]:
        """Allocate a step on loss data, one after the other; nothing is written.

        Parameters
        ----------
        step
            The step, as it was read.
        names
            The loss data.
        known
            Loss data to the evaluation at the start of the step, where it is known; then holds those at its end.
        surface
            What measures loss and gradient, where it is not the model itself.
        check
            Whether the losses at both ends are wanted; by default at the steps that the job says.

        Yields
        ------
        (str, Allocation)
            Of each loss data.
        """
        if self._buffers:
            self._surface.hold(step.buffers)
        check = step.record.step % self._job.check_every == 0 if check is None else check
        ends = _Ends(step.start, step.end, self._surface if surface is None else surface, check)
        for name in names:
            yield name, self._allocate(step.record, name, ends, known)

    def evaluated(self, name: str) -> list[str]:
        """List the loss data that are evaluated for one: itself, or its groups.

        Parameters
        ----------
        name
            The loss data.

        Returns
        -------
        list of str
            Names.
        """
        data = self._loss_data[name]
        return [part.name for part in data.parts] if isinstance(data, Grouped) else [name]

    def dropout_of(self, name: str) -> str:
        """Say how a loss data is measured.

        Parameters
        ----------
        name
            The loss data.

        Returns
        -------
        str
            ``recorded`` only on the recorded batches: to other examples no recorded random state belongs.
        """
        return self._job.dropout if isinstance(self._loss_data[name], RecordedBatch) else dropout.OFF

    def random_states(self, name: str, step: Step) -> dropout.RandomStates | None:
        """Return what the dropout of a step is drawn from.

        Parameters
        ----------
        name
            The loss data.
        step
            The recorded step.

        Returns
        -------
        sequence of mapping, or None
            Of every micro-batch; None where dropout is off.
        """
        if self.dropout_of(name) == dropout.OFF:
            return None
        return [micro_batch.random_state for micro_batch in step.micro_batches]

    def _allocate(self, step: Step, name: str, ends: _Ends, known: dict[str, Evaluation | None]) -> Allocation:
        data = self._loss_data[name]
        if isinstance(data, Grouped):
            return by_weight([self._of_part(step, part.name, ends, known) for part in data.parts])
        return self._of_part(step, name, ends, known)

    def _of_part(self, step: Step, name: str, ends: _Ends, known: dict[str, Evaluation | None]) -> Allocation:
        if name in ends.done:
            return ends.done[name]
        data = self._loss_data[name]
        micro_batches = data.micro_batches(step)
        states = self.random_states(name, step)

        def along(theta: Theta, direction: Theta) -> Evaluation:
            projection = Projection(direction, self._trained)
            return ends.surface.evaluate(theta, micro_batches, projection, states=states)

        allocation = allocate(
            ends.start,
            ends.end,
            self._rule,
            evaluate=lambda theta: ends.surface.evaluate(theta, micro_batches, states=states),
            loss=lambda theta: ends.surface.loss(theta, micro_batches, states=states),
            first=known.get(name),
            tolerance=self._tolerance,
            along=along if data.sampled else None,
            check=ends.check,
        )
        known[name] = allocation.end if data.fixed and not self._buffers else None
        if name in self._in_groups:
            ends.done[name] = allocation
        return allocation


@dataclasses.dataclass(slots=True)
class _Ends:
    """Both ends of a step, how it is measured there, and what has been allocated for groups of examples."""

    start: Theta
    end: Theta
    surface: Surface
    check: bool
    done: dict[str, Allocation] = dataclasses.field(default_factory=dict)
