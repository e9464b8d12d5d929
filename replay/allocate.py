"""Allocate the change of the loss over one step to every entry of every parameter.

    LCA_i = Δθ_i · Σ_k w_k · ∂L/∂θ_i (θ_t + a_k·Δθ)          Δθ = θ_{t+1} - θ_t

Lan et al. 2019, section 2 (equations 2 and 3, with their Runge-Kutta weights as the rule); Vázquez et al. 2022,
section 2.3. Nothing here knows of models or files: a step is two parameter sets and a function for the gradient.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import torch

from recorder.table import Parameter
from replay.gradients import Evaluation
from replay.quadrature import Rule
from replay.shards import Status

Theta = Mapping[str, torch.Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """When the books balance: |residual| ≤ max(rtol · |ΔL|, atol).

    Parameters
    ----------
    rtol
        Relative to the measured change of the loss.
    atol
        In nats.
    """

    rtol: float
    atol: float

    def status(self, residual: float, change: float) -> Status:
        """Judge one entry.

        Parameters
        ----------
        residual
            Σ LCA - ΔL, in nats.
        change
            ΔL, in nats.

        Returns
        -------
        Status
            Converged, tolerance not met, or not finite.
        """
        if not (math.isfinite(residual) and math.isfinite(change)):
            return Status.NOT_FINITE
        within = abs(residual) <= max(self.rtol * abs(change), self.atol)
        return Status.CONVERGED if within else Status.TOLERANCE_NOT_MET


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    """One step's ledger on one loss data.

    Parameters
    ----------
    lca
        Parameter name to LCA of each entry, float64 in the parameter's shape, in nats.
    loss_start, loss_end
        Measured at θ_t and θ_{t+1}, in nats.
    evaluations
        Gradient evaluations used.
    end
        The evaluation at θ_{t+1} where the rule has one: on a fixed loss data, the next step's first.
    """

    lca: Mapping[str, torch.Tensor]
    loss_start: float
    loss_end: float
    evaluations: int
    end: Evaluation | None

    @property
    def change(self) -> float:
        """ΔL, the measured change of the loss, in nats."""
        return self.loss_end - self.loss_start

    @property
    def residual(self) -> float:
        """Σ LCA - ΔL, in nats."""
        sums = [float(entries.sum()) for entries in self.lca.values()]
        # fsum raises where infinities of both signs meet; a diverged step has them.
        total = math.fsum(sums) if all(map(math.isfinite, sums)) else sum(sums)
        return total - self.change


def allocate(
    start: Theta,
    end: Theta,
    rule: Rule,
    evaluate: Callable[[Theta], Evaluation],
    loss: Callable[[Theta], float],
    first: Evaluation | None = None,
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

    Returns
    -------
    Allocation
        Accumulated in float64.
    """
    delta = {name: end[name].double() - start[name].double() for name in start}
    weighted = {name: torch.zeros_like(entries) for name, entries in delta.items()}
    evaluations = 0
    at_start, at_end = first, None
    for node, weight in zip(rule.nodes, rule.weights, strict=True):
        if node == 0 and first is not None:
            point = first
        else:
            point = evaluate(_between(start, end, delta, node))
            evaluations += 1
        if node == 0:
            at_start = point
        if node == 1:
            at_end = point
        for name, gradient in point.gradient.items():
            weighted[name].add_(gradient.double(), alpha=weight)
    return Allocation(
        lca={name: weighted[name].mul_(delta[name]) for name in delta},
        loss_start=at_start.loss if at_start is not None else loss(start),
        loss_end=at_end.loss if at_end is not None else loss(end),
        evaluations=evaluations,
        end=at_end,
    )


def _between(start: Theta, end: Theta, delta: Theta, node: float) -> Theta:
    # The ends are taken as they were recorded: start + 1·Δ need not round to end.
    if node == 0:
        return start
    if node == 1:
        return end
    return {name: (start[name].double() + node * delta[name]).to(start[name].dtype) for name in start}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class UnitSums:
    """LCA of one parameter summed over each of its units.

    Parameters
    ----------
    sum, positive_sum
        float64 of shape (units,), in nats: over all entries, and over those with LCA > 0.
    positive_count
        int64 of shape (units,): the number of entries with LCA > 0.
    """

    sum: torch.Tensor
    positive_sum: torch.Tensor
    positive_count: torch.Tensor


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
        Three arrays of shape (units,).
    """
    rows = lca.movedim(parameter.unit_axis, 0) if lca.dim() else lca
    # The length of a row is not left to reshape: a parameter without entries has none to infer it from.
    rows = rows.reshape(parameter.units, parameter.size // max(parameter.units, 1))
    positive = rows > 0
    return UnitSums(
        sum=rows.sum(dim=1),
        positive_sum=torch.where(positive, rows, 0.0).sum(dim=1),
        positive_count=positive.sum(dim=1),
    )
