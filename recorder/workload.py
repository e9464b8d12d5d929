"""What a training supplies to replay: its model, its batches by index, its loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from recorder.steps import Step


@runtime_checkable
class Workload(Protocol):
    """The four things replay cannot know by itself."""

    def model(self) -> nn.Module:
        """Build the model afresh; replay sets its parameters."""
        ...

    def indices(self, split: str) -> Sequence[int]:
        """List the examples of a split, ``train`` or ``valid``: what ``probe`` is drawn from."""
        ...

    def batch(self, indices: Sequence[int], *, split: str, epoch: int) -> Any:
        """Collate examples as in training; deterministic for the same arguments."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Return the loss summed over predictions, in nats, and the number of predictions.

        ``model.training`` tells whether dropout is wanted; what else has a mode follows it.
        """
        ...


@runtime_checkable
class HalvesBatches(Protocol):
    """A workload that can cut a micro-batch in two: for one that does not fit into memory.

    Replay cuts a batch by itself where all its tensors have the examples along their first axis and it holds no number
    that depends on them.
    """

    def halve(self, batch: Any) -> tuple[Any, Any]:
        """Return two batches of half the examples each, whose losses and predictions add up to the batch's."""
        ...


@runtime_checkable
class CollatesAtRandom(Protocol):
    """A workload that may draw random numbers when it collates, such as masks: the training drew others.

    `Workload.batch` is deterministic all the same. What the training saw is known from the recorded tensors alone.
    """

    def collates_at_random(self, indices: Sequence[int], *, split: str) -> bool:
        """Say whether it does for these examples."""
        ...


@runtime_checkable
class WeighsMicroBatches(Protocol):
    """A workload whose training weighs the micro-batches of an update otherwise than by their predictions.

    Only who does an update again asks for it: the loss of a step is Σ sums / Σ counts in any case.
    """

    def weight(self, model: nn.Module, batch: Any) -> float:
        """Return the weight of a micro-batch's summed loss; a factor common to all makes no difference."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RepeatedUpdate:
    """A recorded update, done again.

    Parameters
    ----------
    losses
        For every micro-batch its loss summed over predictions, in nats, and the number of predictions.
    parameters
        All parameters after the update, by name, in host memory.
    """

    losses: tuple[tuple[float, float], ...]
    parameters: Mapping[str, torch.Tensor]


@runtime_checkable
class RepeatsUpdates(Protocol):
    """A workload that can do a recorded update again with the trainer's own code, bit for bit."""

    def repeat_updates(
        self,
        theta: Mapping[str, torch.Tensor],
        optimizer_state: Mapping[str, Any] | None,
        steps: Sequence[Step],
    ) -> Iterator[RepeatedUpdate]:
        """Redo consecutive updates from parameters `theta`, in training mode with the recorded seeds."""
        ...
