"""Micro-batches announced for a step that has not happened yet, held as they were when announced.

Announcing only copies. Checksums and numbers are made when the step is written, outside the training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from recorder import batches, tensorfile
from recorder.steps import MicroBatch, Step


@dataclasses.dataclass(kw_only=True, slots=True)
class Announced:
    """One micro-batch as the loop announced it.

    Parameters
    ----------
    indices
        The data set indices, int64.
    nest, tensors
        As `recorder.batches.take_apart` gives them.
    random_state
        States of the random generators.
    loss_sum, predictions
        What the loop told, in host memory or still on its way there.
    """

    indices: torch.Tensor
    nest: Any
    tensors: Mapping[str, torch.Tensor]
    random_state: Mapping[str, torch.Tensor]
    loss_sum: torch.Tensor | float | None = None
    predictions: torch.Tensor | float | None = None

    @classmethod
    def of(
        cls, indices: Iterable[int] | torch.Tensor | None, batch: Any, random_state: Mapping[str, torch.Tensor]
    ) -> Announced:
        """Copy what the loop announces.

        Parameters
        ----------
        indices
            Data set indices; None where there are none.
        batch
            The micro-batch, or None.
        random_state
            States of the random generators.

        Returns
        -------
        Announced
            The copy.
        """
        entry = indices if isinstance(indices, torch.Tensor) else list(() if indices is None else indices)
        nest, tensors = (None, {}) if batch is None else batches.take_apart(batch)
        return cls(
            indices=batches.to_host(torch.as_tensor(entry, dtype=torch.int64).detach().reshape(-1)),
            nest=nest,
            tensors=tensors,
            random_state=random_state,
        )

    @property
    def has_examples(self) -> bool:
        """Whether it is one at all: a process of several may have none to give."""
        return self.nest is not None or self.indices.numel() > 0

    def finished(self, *, store: bool) -> MicroBatch:
        """Make the micro-batch that is recorded.

        Parameters
        ----------
        store
            Whether with its tensors, or with their checksums only.

        Returns
        -------
        MicroBatch
            The micro-batch.
        """
        return MicroBatch(
            indices=self.indices,
            nest=self.nest,
            tensors=self.tensors if store else {},
            checksums={path: tensorfile.checksum(tensor) for path, tensor in self.tensors.items()},
            random_state=self.random_state,
            loss_sum=None if self.loss_sum is None else float(self.loss_sum),
            predictions=None if self.predictions is None else float(self.predictions),
        )


def finisher(announced: Iterable[Announced], *, store: bool, **facts: Any) -> Callable[[], Step]:
    """Put off the making of a step until it is written.

    Parameters
    ----------
    announced
        Its micro-batches.
    store
        Whether their tensors are stored.
    **facts
        The other fields of `recorder.steps.Step`.

    Returns
    -------
    callable
        Makes the step.
    """
    kept = tuple(announced)
    return lambda: Step(micro_batches=tuple(entry.finished(store=store) for entry in kept), **facts)


def to_host(value: torch.Tensor | float) -> torch.Tensor | float:
    """Bring a number to host memory without waiting for the device.

    Parameters
    ----------
    value
        A number, or a tensor of one entry.

    Returns
    -------
    torch.Tensor or float
        A copy.
    """
    return batches.to_host(value.detach()) if isinstance(value, torch.Tensor) else value
