"""Micro-batches announced for a step that has not happened yet, held as they were when announced.

Announcing only copies. Checksums and numbers are made when the step is written, outside the training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from recorder import batches, tensorfile
from recorder.errors import UsageError
from recorder.steps import MicroBatch, Step
from recorder.watched import Watched


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


class Pending:
    """The micro-batches announced since the last step, and the doubt whether they still belong to the next.

    A gradient scaler may skip an update, and no hook tells. Then their gradients are gone when the next micro-batch is
    announced; or, where the loop zeroes them only after that, they are not finite then and will be at the next step.

    Parameters
    ----------
    watched
        Model and optimizer.

    Attributes
    ----------
    autocast : str or None
        The dtype that torch computed in, where it was another than the parameters'.
    """

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self._entries: list[Announced] = []
        self._doubted = 0
        self._passed_over = False
        self.autocast: str | None = None

    def announce(self, indices: Iterable[int] | torch.Tensor | None, batch: Any) -> bool:
        """Add a micro-batch, just before its forward pass.

        Parameters
        ----------
        indices, batch
            As for `Announced.of`.

        Returns
        -------
        bool
            Whether it is the first of its step.
        """
        self.autocast = self._watched.autocast.now() or self.autocast
        # Several forward passes may share one backward pass: only gradients that were there can be dropped.
        if self._entries and self._watched.backward_seen:
            if self._watched.gradients_dropped():
                self.clear()
            elif not self._watched.gradients_finite():
                self._doubted = len(self._entries)
        self._watched.backward_seen = False
        self._watched.autocast.watch_first_forward()
        self._entries.append(Announced.of(indices, batch, self._watched.random_state()))
        return len(self._entries) == 1

    def pass_over(self) -> None:
        """Note a micro-batch of a step that is not recorded."""
        self._passed_over = True

    def tell_loss(self, loss_sum: torch.Tensor | float, predictions: torch.Tensor | float) -> None:
        """Add the loss of the micro-batch announced last.

        Parameters
        ----------
        loss_sum, predictions
            Summed over predictions, in nats; and their number.

        Raises
        ------
        UsageError
            If no micro-batch was announced.
        """
        if self._passed_over and not self._entries:
            return
        if not self._entries:
            message = "Recording.loss was called before Recording.batch announced a micro-batch"
            raise UsageError(message)
        self.autocast = self._watched.autocast.now() or self.autocast
        self._entries[-1].loss_sum = to_host(loss_sum)
        self._entries[-1].predictions = to_host(predictions)

    def settle_doubt(self) -> None:
        """Drop, just before the optimizer steps, those whose gradients are no longer in what it uses."""
        if self._doubted and self._watched.gradients_finite():
            del self._entries[: self._doubted]
        self._doubted = 0

    def take(self) -> list[Announced]:
        """Give those of the step that has just happened.

        Returns
        -------
        list of Announced
            In their order; none are left.
        """
        taken = self._entries
        self.clear()
        return taken

    def clear(self) -> None:
        """Drop all of them."""
        self._entries = []
        self._doubted = 0
        self._passed_over = False


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
