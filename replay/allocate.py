"""Allocate the change of the loss over one step to every entry of every parameter.

    LCA_i = Δθ_i · Σ_k w_k · ∂L/∂θ_i (θ_t + a_k·Δθ)          Δθ = θ_{t+1} - θ_t

Lan et al. 2019, section 2 (equations 2 and 3, with their Runge-Kutta weights as the rule); Vázquez et al. 2022,
section 2.3. Nothing here knows of models or files: a step is two parameter sets and a function for the gradient.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from recorder.table import Parameter
from replay.gradients import Evaluation, Theta
from replay.quadrature import AdaptiveRule, Rule
from replay.shards import Status
from replay.unitsums import Combination, ParameterSums, dot, sum_parameters

FLOOR_ULPS = 4
"""Spacings of the loss that rounding may move a residual by: 1.5 at most in the steps of a small Transformer, float32
against float64."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """When the books balance: |residual| ≤ rtol · |ΔL| + atol + the rounding floor.

    Parameters
    ----------
    rtol
        Relative to the measured change of the loss.
    atol
        In nats.
    epsilon
        Spacing of the numbers that the loss is computed in, at 1. The rounding floor is `FLOOR_ULPS` of these times
        the larger of the two losses: what lies below is rounding, which no refinement takes away.
    """

    rtol: float
    atol: float
    epsilon: float = 0.0

    def allowed(self, loss_start: float, loss_end: float) -> float:
        """Return the largest |residual| of a balanced entry.

        Parameters
        ----------
        loss_start, loss_end
            The measured losses, in nats.

        Returns
        -------
        float
            In nats; NaN or infinite where the losses are.
        """
        floor = FLOOR_ULPS * self.epsilon * max(abs(loss_start), abs(loss_end))
        return self.rtol * abs(loss_end - loss_start) + self.atol + floor

    def status(self, residual: float, loss_start: float, loss_end: float) -> Status:
        """Judge one entry.

        Parameters
        ----------
        residual
            Σ LCA - ΔL, in nats.
        loss_start, loss_end
            The measured losses, in nats.

        Returns
        -------
        Status
            Converged, tolerance not met, or not finite.
        """
        if not (math.isfinite(residual) and math.isfinite(loss_end - loss_start)):
            return Status.NOT_FINITE
        within = abs(residual) <= self.allowed(loss_start, loss_end)
        return Status.CONVERGED if within else Status.TOLERANCE_NOT_MET


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    """One step's ledger on one loss data.

    Parameters
    ----------
    gradient
        Parameter name to the mean of its gradient along the step, as the rule finds it: float64, in the parameter's
        shape.
    delta
        Parameter name to its update Δθ, likewise.
    loss_start, loss_end
        Measured at θ_t and θ_{t+1}, in nats; NaN where they were not asked for and the rule has no node there.
    evaluations
        Gradient evaluations used.
    end
        The evaluation at θ_{t+1} where the rule has one: on a fixed loss data, the next step's first.
    checked
        Whether the losses at both ends were measured.
    total
        Σ LCA in nats, where it is known already.
    counts
        Number of predictions of every micro-batch.
    spread
        Where asked for: parameter name to what every micro-batch gives to its LCA, times all predictions, as found at
        the rule's node in the middle of the step; float64 of shape (micro-batches,).
    """

    gradient: Mapping[str, torch.Tensor]
    delta: Mapping[str, torch.Tensor]
    loss_start: float
    loss_end: float
    evaluations: int
    end: Evaluation | None
    checked: bool = True
    total: float | None = None
    counts: tuple[float, ...] = (1.0,)
    spread: Mapping[str, torch.Tensor] | None = None

    @property
    def predictions(self) -> float:
        """What the loss is averaged over."""
        return sum(self.counts)

    def lca(self, name: str) -> torch.Tensor:
        """Return the LCA of every entry of a parameter.

        Parameters
        ----------
        name
            The parameter.

        Returns
        -------
        torch.Tensor
            float64 in the parameter's shape, in nats.
        """
        return self.gradient[name] * self.delta[name]

    def sums(self, parameters: Sequence[Parameter]) -> dict[str, ParameterSums]:
        """Sum the LCA of every parameter over each of its units.

        Parameters
        ----------
        parameters
            Rows of the parameter table.

        Returns
        -------
        dict of str to ParameterSums
            By parameter name, in host memory.
        """
        return sum_parameters(parameters, self.gradient, self.delta)

    @property
    def change(self) -> float:
        """ΔL, the measured change of the loss, in nats."""
        return self.loss_end - self.loss_start

    @property
    def residual(self) -> float:
        """Σ LCA - ΔL, in nats; NaN where the losses were not measured."""
        return self._total - self.change

    def status(self, tolerance: Tolerance) -> Status:
        """Judge the entry.

        Parameters
        ----------
        tolerance
            Within which its books are to balance.

        Returns
        -------
        Status
            An LCA that is not finite is told also where the losses were not measured.
        """
        if not self.checked and math.isfinite(self._total):
            return Status.NOT_CHECKED
        return tolerance.status(self.residual, self.loss_start, self.loss_end)

    @property
    def _total(self) -> float:
        return dot(self.gradient, self.delta) if self.total is None else self.total


def allocate(
    start: Theta,
    end: Theta,
    rule: Rule | AdaptiveRule,
    evaluate: Callable[[Theta], Evaluation],
    loss: Callable[[Theta], float],
    first: Evaluation | None = None,
    *,
    tolerance: Tolerance,
    along: Callable[[Theta, Theta], Evaluation] | None = None,
    check: bool = True,
) -> Allocation:
    """Allocate the loss change between two parameter sets along the straight line between them.

    Parameters
    ----------
    start, end
        θ_t and θ_{t+1}: the same names, shapes and dtypes. They must not change as long as the result is in use.
    rule
        The quadrature rule.
    evaluate
        Loss and gradient at a parameter set, in memory of their own.
    loss
        The loss alone; used only for an end of the step where the rule has no node.
    first
        The evaluation at `start`, where it is known already.
    tolerance
        When an adaptive rule is content.
    along
        Like `evaluate`, and tells the micro-batches apart along a direction: used once, in the middle of the step,
        where their spread is asked for.
    check
        Whether the losses at both ends are wanted also where they cost a forward pass.

    Returns
    -------
    Allocation
        Its tensors are made in float64 where they are looked at.
    """
    line = _Line(start, end, evaluate, first, rule.middle, along)
    mean, total = _halved(line, rule, tolerance) if isinstance(rule, AdaptiveRule) else _once(line, rule)
    at_start, at_end = line.ends
    loss_start, loss_end = (
        point.loss if point is not None else loss(theta) if check else math.nan
        for point, theta in ((at_start, start), (at_end, end))
    )
    return Allocation(
        gradient=mean,
        delta=line.delta,
        loss_start=loss_start,
        loss_end=loss_end,
        evaluations=line.evaluations,
        end=at_end,
        checked=check or (at_start is not None and at_end is not None),
        total=total,
        counts=line.counts,
        spread=line.spread,
    )


def by_weight(parts: Sequence[Allocation]) -> Allocation:
    """Put together the allocations of groups of examples: the mean over all their predictions.

    Parameters
    ----------
    parts
        Of the same step, each on one group; at least one.

    Returns
    -------
    Allocation
        On all groups together: losses, gradients and so LCA are the groups' by weight.
    """
    predictions = sum(part.predictions for part in parts)
    weights = [part.predictions / predictions for part in parts]
    pairs = list(zip(parts, weights, strict=True))
    return Allocation(
        gradient=Combination([(weight, part.gradient) for part, weight in pairs], like=parts[0].gradient),
        delta=parts[0].delta,
        loss_start=sum(part.loss_start * weight for part, weight in pairs),
        loss_end=sum(part.loss_end * weight for part, weight in pairs),
        evaluations=sum(part.evaluations for part in parts),
        end=None,
        checked=all(part.checked for part in parts),
        counts=tuple(count for part in parts for count in part.counts),
    )


class Between(Mapping[str, torch.Tensor]):
    """A parameter set on the line between two, made where it is looked at.

    Parameters
    ----------
    start, end
        The two.
    node
        How far between them, from 0 to 1.
    """

    def __init__(self, start: Theta, end: Theta, node: float) -> None:
        self._start, self._end, self._node = start, end, node

    def __getitem__(self, name: str) -> torch.Tensor:
        # The update is exact in its own dtype where it is small, so that this is off by hardly more than the last
        # rounding, in a third of the memory that float64 would take.
        return torch.lerp(self._start[name], self._end[name], self._node)

    def __iter__(self) -> Iterator[str]:
        return iter(self._start)

    def __len__(self) -> int:
        return len(self._start)


class _Line:
    """The straight line between two parameter sets, and what is known on it."""

    def __init__(
        self,
        start: Theta,
        end: Theta,
        evaluate: Callable[[Theta], Evaluation],
        first: Evaluation | None,
        middle: float,
        along: Callable[[Theta, Theta], Evaluation] | None,
    ) -> None:
        self.start, self._end, self._evaluate = start, end, evaluate
        self._middle, self._along = middle, along
        self.counts: tuple[float, ...] = () if first is None else first.counts
        self.spread: Mapping[str, torch.Tensor] | None = None
        self.delta = Combination([(1.0, end), (-1.0, start)], like=start)
        self.ends: tuple[Evaluation | None, Evaluation | None] = (first, None)
        self.evaluations = 0

    def at(self, node: float) -> Mapping[str, torch.Tensor]:
        # At the ends it is computed once.
        at_start, at_end = self.ends
        if node == 0 and at_start is not None:
            return at_start.gradient
        if self._along is not None and node == self._middle:
            point = self._along(self._between(node), self.delta)
            self.spread = point.along
        else:
            point = self._evaluate(self._between(node))
        self.counts = point.counts
        self.evaluations += 1
        if node in (0, 1):
            self.ends = (point, at_end) if node == 0 else (at_start, point)
        return point.gradient

    def sum(self, *terms: tuple[float, Mapping[str, torch.Tensor]]) -> Combination:
        return Combination(terms, like=self.start)

    def _between(self, node: float) -> Theta:
        # The ends are taken as they were recorded: start + 1·Δ need not round to end.
        if node == 0:
            return self.start
        if node == 1:
            return self._end
        return Between(self.start, self._end, node)


def _once(line: _Line, rule: Rule) -> tuple[Combination, float]:
    mean = line.sum(*((weight, line.at(node)) for node, weight in zip(rule.nodes, rule.weights, strict=True)))
    return mean, dot(mean, line.delta)


def _halved(line: _Line, rule: AdaptiveRule, tolerance: Tolerance) -> tuple[Combination, float]:
    # Simpson's rule first, from the gradients as they came: most steps are content with it.
    sixth = 1 / 6
    start, middle = line.at(0), line.at(1 / 2)
    mean = line.sum((sixth, start), (4 * sixth, middle), (sixth, line.at(1)))
    total, pieces = dot(mean, line.delta), 1
    at_start, at_end = line.ends
    assert at_start is not None
    assert at_end is not None
    change = at_end.loss - at_start.loss
    borders: dict[str, torch.Tensor] = {}
    middles: dict[str, torch.Tensor] = {}
    while (
        pieces < rule.most_pieces
        and tolerance.status(total - change, at_start.loss, at_end.loss) is Status.TOLERANCE_NOT_MET
    ):
        # Two sums in float64 then stand for all gradients. They are kept without their weights, which change with the
        # number of pieces.
        if pieces == 1:
            for ends in (at_start.gradient, at_end.gradient):
                _add(borders, ends)
            _add(middles, middle)
            del middle, mean
        pieces *= 2
        _add(borders, middles, 2)
        for entries in middles.values():
            entries.zero_()
        for node in rule.middles(pieces):
            _add(middles, line.at(node))
        sixth = 1 / (6 * pieces)
        mean = line.sum((sixth, borders), (4 * sixth, middles))
        total = dot(mean, line.delta)
    return mean, total


def _add(total: dict[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], weight: float = 1) -> None:
    for name, tensor in tensors.items():
        if name not in total:
            total[name] = torch.zeros_like(tensor, dtype=torch.float64)
        total[name].add_(tensor, alpha=weight)
