"""Allocate the change of the loss over one step to every entry of every parameter.

    LCA_i = Δθ_i · Σ_k w_k · ∂L/∂θ_i (θ_t + a_k·Δθ)          Δθ = θ_{t+1} - θ_t

Lan et al. 2019, section 2 (equations 2 and 3, with their Runge-Kutta weights as the rule); Vázquez et al. 2022,
section 2.3. Nothing here knows of models or files: a step is two parameter sets and a function for the gradient.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import torch

from recorder.table import Parameter
from replay.gradients import Evaluation
from replay.quadrature import AdaptiveRule, Rule
from replay.shards import Status

Theta = Mapping[str, torch.Tensor]


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
        Measured at θ_t and θ_{t+1}, in nats.
    evaluations
        Gradient evaluations used.
    end
        The evaluation at θ_{t+1} where the rule has one: on a fixed loss data, the next step's first.
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
    counts: tuple[float, ...] = (1.0,)
    spread: Mapping[str, torch.Tensor] | None = None

    @property
    def predictions(self) -> float:
        """What the loss is averaged over."""
        return sum(self.counts)

    def geometry(self, name: str) -> tuple[float, float, float]:
        """Return a parameter's LCA as a product of three.

        Parameters
        ----------
        name
            The parameter.

        Returns
        -------
        gradient_norm, update_norm, cosine : float
            Euclidean norms of the mean gradient along the step and of the update, and the cosine of the angle between
            them; NaN where one of the norms is 0.
        """
        gradient, delta = self.gradient[name], self.delta[name]
        lengths = float(torch.linalg.vector_norm(gradient)), float(torch.linalg.vector_norm(delta))
        product = lengths[0] * lengths[1]
        cosine = float(torch.dot(gradient.reshape(-1), delta.reshape(-1))) / product if product else math.nan
        return *lengths, cosine

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

    @property
    def change(self) -> float:
        """ΔL, the measured change of the loss, in nats."""
        return self.loss_end - self.loss_start

    @property
    def residual(self) -> float:
        """Σ LCA - ΔL, in nats."""
        return _dot(self.gradient, self.delta) - self.change


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
) -> Allocation:
    """Allocate the loss change between two parameter sets along the straight line between them.

    Parameters
    ----------
    start, end
        θ_t and θ_{t+1}: the same names, shapes and dtypes.
    rule
        The quadrature rule.
    evaluate
        Loss and gradient at a parameter set.
    loss
        The loss alone; used only for an end of the step where the rule has no node.
    first
        The evaluation at `start`, where it is known already.
    tolerance
        When an adaptive rule is content.
    along
        Like `evaluate`, and tells the micro-batches apart along a direction: used once, in the middle of the step,
        where their spread is asked for.

    Returns
    -------
    Allocation
        Accumulated in float64.
    """
    line = _Line(start, end, evaluate, first, rule.middle, along)
    mean = _halved(line, rule, tolerance) if isinstance(rule, AdaptiveRule) else _once(line, rule)
    at_start, at_end = line.ends
    return Allocation(
        gradient=mean,
        delta=line.delta,
        loss_start=at_start.loss if at_start is not None else loss(start),
        loss_end=at_end.loss if at_end is not None else loss(end),
        evaluations=line.evaluations,
        end=at_end,
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
    gradient = {name: entries * weights[0] for name, entries in parts[0].gradient.items()}
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        for name, entries in part.gradient.items():
            gradient[name].add_(entries, alpha=weight)
    pairs = list(zip(parts, weights, strict=True))
    return Allocation(
        gradient=gradient,
        delta=parts[0].delta,
        loss_start=sum(part.loss_start * weight for part, weight in pairs),
        loss_end=sum(part.loss_end * weight for part, weight in pairs),
        evaluations=sum(part.evaluations for part in parts),
        end=None,
        counts=tuple(count for part in parts for count in part.counts),
    )


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
        self._start, self._end, self._evaluate = start, end, evaluate
        self._middle, self._along = middle, along
        self.counts: tuple[float, ...] = () if first is None else first.counts
        self.spread: Mapping[str, torch.Tensor] | None = None
        self.delta = {name: end[name].double() - start[name].double() for name in start}
        self.ends: tuple[Evaluation | None, Evaluation | None] = (first, None)
        self.evaluations = 0

    def zeros(self) -> dict[str, torch.Tensor]:
        return {name: torch.zeros_like(entries) for name, entries in self.delta.items()}

    def add(self, total: Mapping[str, torch.Tensor], node: float, weight: float) -> None:
        """Add a weighted gradient, in float64."""
        for name, gradient in self._at(node).gradient.items():
            total[name].add_(gradient, alpha=weight)

    def _at(self, node: float) -> Evaluation:
        at_start, at_end = self.ends
        if node == 0 and at_start is not None:
            return at_start
        if self._along is not None and node == self._middle:
            point = self._along(self._between(node), self.delta)
            self.spread = point.along
        else:
            point = self._evaluate(self._between(node))
        self.counts = point.counts
        self.evaluations += 1
        if node in (0, 1):
            self.ends = (point, at_end) if node == 0 else (at_start, point)
        return point

    def _between(self, node: float) -> Theta:
        # The ends are taken as they were recorded: start + 1·Δ need not round to end.
        if node == 0:
            return self._start
        if node == 1:
            return self._end
        return {
            name: (entries.double() + node * self.delta[name]).to(entries.dtype)
            for name, entries in self._start.items()
        }


def _once(line: _Line, rule: Rule) -> dict[str, torch.Tensor]:
    mean = line.zeros()
    for node, weight in zip(rule.nodes, rule.weights, strict=True):
        line.add(mean, node, weight)
    return mean


def _halved(line: _Line, rule: AdaptiveRule, tolerance: Tolerance) -> dict[str, torch.Tensor]:
    # Both sums are kept without their weights, which change with the number of pieces.
    borders, middles, pieces = line.zeros(), line.zeros(), 1
    line.add(borders, 0, 1)
    for node in rule.middles(1):
        line.add(middles, node, 1)
    line.add(borders, 1, 1)
    at_start, at_end = line.ends
    assert at_start is not None
    assert at_end is not None
    while pieces < rule.most_pieces:
        total = (_dot(borders, line.delta) + 4 * _dot(middles, line.delta)) / (6 * pieces)
        residual = total - (at_end.loss - at_start.loss)
        if tolerance.status(residual, at_start.loss, at_end.loss) is not Status.TOLERANCE_NOT_MET:
            break
        pieces *= 2
        for name, entries in middles.items():
            borders[name].add_(entries, alpha=2)
            entries.zero_()
        for node in rule.middles(pieces):
            line.add(middles, node, 1)
    return {name: borders[name].add_(middles[name], alpha=4).div_(6 * pieces) for name in borders}


def _dot(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> float:
    sums = [float(torch.dot(left[name].reshape(-1), right[name].reshape(-1))) for name in left]
    # fsum raises where infinities of both signs meet; a diverged step has them.
    return math.fsum(sums) if all(map(math.isfinite, sums)) else sum(sums)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class UnitSums:
    """LCA of one parameter summed over each of its units.

    Parameters
    ----------
    sum, positive_sum
        float64 of shape (units,), in nats: over all entries, and over those with LCA > 0.
    positive_count, zero_count
        int64 of shape (units,): the number of entries with LCA > 0, and of those with LCA = 0 exactly.
    """

    sum: torch.Tensor
    positive_sum: torch.Tensor
    positive_count: torch.Tensor
    zero_count: torch.Tensor


def sum_over_units(lca: torch.Tensor, parameter: Parameter) -> UnitSums:
    """Sum the entries of one parameter over each of its units.

    Parameters
    ----------
    lca
        float64 in the parameter's shape.
    parameter
        Says which axis is the unit axis.

    Returns
    -------
    UnitSums
        Four arrays of shape (units,).
    """
    rows = lca.movedim(parameter.unit_axis, 0) if lca.dim() else lca
    # The length of a row is not left to reshape: a parameter without entries has none to infer it from.
    rows = rows.reshape(parameter.units, parameter.size // max(parameter.units, 1))
    positive = rows > 0
    return UnitSums(
        sum=rows.sum(dim=1),
        positive_sum=torch.where(positive, rows, 0.0).sum(dim=1),
        positive_count=positive.sum(dim=1),
        zero_count=(rows == 0).sum(dim=1),
    )
