"""One step's ledger on one loss data, and the ledger of groups of examples put together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch

from recorder.table import Parameter
from replay.blocks import Combination
from replay.columns import Status
from replay.evaluation import Evaluation
from replay.products import dot
from replay.tolerance import Tolerance
from replay.unitsums import ParameterSums, sum_parameters


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
        the rule's node in the middle of the step; float64 of shape (micro-batches,), or (micro-batches, parts) where
        one tensor holds several components.
    pieces
        Number of pieces of the micro-batch that was cut most to fit into memory, in any gradient evaluation; 1 where
        all fitted.
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
    pieces: int = 1

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
        return tolerance.status(self.residual, self.loss_start, self.loss_end, self.predictions)

    @property
    def _total(self) -> float:
        return dot(self.gradient, self.delta) if self.total is None else self.total


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
        pieces=max(part.pieces for part in parts),
    )
