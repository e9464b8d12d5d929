"""Loss and gradient at one point, and what measures them there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from replay.dropout import RandomStates
    from replay.products import Projection

Theta = Mapping[str, torch.Tensor]
"""Parameter name to value."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Loss and gradient at one point.

    Parameters
    ----------
    loss
        Mean loss in nats.
    gradient
        Parameter name to ∂loss/∂parameter, in the parameter's shape and dtype. A parameter that the loss does not
        depend on is left out: its gradient is zero.
    counts
        Number of predictions of every micro-batch.
    along
        Where a direction was given: parameter name to the derivative along it of every micro-batch's summed loss,
        float64 of shape (micro-batches,), or (micro-batches, parts) where one tensor holds several components.
    pieces
        Number of pieces of the micro-batch that was cut most to fit into memory; 1 where all fitted.
    """

    loss: float
    gradient: Mapping[str, torch.Tensor]
    counts: tuple[float, ...] = (1.0,)
    along: Mapping[str, torch.Tensor] | None = None
    pieces: int = 1

    @property
    def predictions(self) -> float:
        """What the loss is averaged over."""
        return sum(self.counts)


class Surface(Protocol):
    """What measures loss and gradient, as `replay.gradients.LossSurface` does."""

    def evaluate(
        self,
        theta: Theta,
        micro_batches: Sequence[Any],
        direction: Projection | None = None,
        *,
        states: RandomStates | None = None,
    ) -> Evaluation:
        """Compute loss and gradient."""
        ...

    def loss(self, theta: Theta, micro_batches: Sequence[Any], *, states: RandomStates | None = None) -> float:
        """Compute the mean loss alone."""
        ...
