"""Allocate the change of the loss over one step to every entry of every parameter.

    LCA_i = Δθ_i · Σ_k w_k · ∂L/∂θ_i (θ_t + a_k·Δθ)          Δθ = θ_{t+1} - θ_t

Lan et al. 2019, section 2 (equations 2 and 3, with their Runge-Kutta weights as the rule); Vázquez et al. 2022,
section 2.3. Nothing here knows of models or files: a step is two parameter sets and a function for the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from replay.allocation import Allocation
from replay.between import Between
from replay.blocks import Combination
from replay.columns import Status
from replay.evaluation import Evaluation, Theta
from replay.products import dot
from replay.quadrature import AdaptiveRule, Rule
from replay.tolerance import Tolerance


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
    # Where no decision needs it, the total is left to whoever sums over units anyway.
    mean, total = _halved(line, rule, tolerance) if isinstance(rule, AdaptiveRule) else (_once(line, rule), None)
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
        pieces=line.pieces,
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
        self.start, self._end, self._evaluate = start, end, evaluate
        self._middle, self._along = middle, along
        self.counts: tuple[float, ...] = () if first is None else first.counts
        self.spread: Mapping[str, torch.Tensor] | None = None
        self.delta = Combination([(1.0, end), (-1.0, start)], like=start)
        self.ends: tuple[Evaluation | None, Evaluation | None] = (first, None)
        self.evaluations = 0
        self.pieces = 1 if first is None else first.pieces

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
        self.pieces = max(self.pieces, point.pieces)
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


def _once(line: _Line, rule: Rule) -> Combination:
    return line.sum(*((weight, line.at(node)) for node, weight in zip(rule.nodes, rule.weights, strict=True)))


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
    predictions = at_end.predictions
    while (
        pieces < rule.most_pieces
        and tolerance.status(total - change, at_start.loss, at_end.loss, predictions) is Status.TOLERANCE_NOT_MET
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
