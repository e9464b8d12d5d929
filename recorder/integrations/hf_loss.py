"""The loss of a language model of transformers as a sum over predictions; how a Trainer's number relates to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from transformers.models.auto import modeling_auto  # isort: skip

if TYPE_CHECKING:
    from torch import nn

IGNORED = -100
"""The label of a position where nothing is to be predicted."""

SAME = 1e-4
"""Relative; two ways to sum the same cross-entropy in float32 differ by some 1e-6, a forgotten prediction by more."""


def unwrapped(model: nn.Module) -> nn.Module:
    """Look through an adapter around a model.

    Parameters
    ----------
    model
        A model of transformers, or one of peft around it.

    Returns
    -------
    torch.nn.Module
        The model of transformers.
    """
    inner: nn.Module = model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model  # type: ignore[operator]
    return inner


def shifts_labels(model: nn.Module) -> bool | None:
    """Say whether the label at a position is to be predicted from the positions before it.

    Parameters
    ----------
    model
        A model of transformers.

    Returns
    -------
    bool or None
        True for causal language models, False for masked ones and for a decoder with an encoder, whose input is
        shifted already; None where the model's class does not tell.
    """
    model = unwrapped(model)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    names = {kind.__name__ for kind in type(model).__mro__}
    if names & set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        return True
    return False if names & set(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()) else None


def targets(labels: torch.Tensor, *, shifted: bool) -> torch.Tensor:
    """Lay labels beside the logits that predict them.

    Parameters
    ----------
    labels
        int64 of shape (examples, positions), `IGNORED` where nothing is to be predicted.
    shifted
        As `shifts_labels` says.

    Returns
    -------
    torch.Tensor
        Of the same shape.
    """
    return functional.pad(labels, (0, 1), value=IGNORED)[..., 1:] if shifted else labels


def summed_cross_entropy(logits: torch.Tensor, expected: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Sum the cross-entropy over all predictions.

    Parameters
    ----------
    logits
        Of shape (examples, positions, classes). 16-bit ones are made float32, as transformers does.
    expected
        What `targets` returned.
    label_smoothing
        As in ``TrainingArguments.label_smoothing_factor``.

    Returns
    -------
    torch.Tensor
        A number, in nats.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(
        wide.reshape(-1, wide.shape[-1]),
        expected.reshape(-1).to(wide.device),
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=label_smoothing,
    )


class LossReader:
    """Reads the summed loss off the number that a Trainer's step returns, without computing it again.

    A model divides by the predictions of the whole accumulation, or by those of its micro-batch, whatever it was asked
    for; the Trainer may divide by the micro-batches on top, and an overridden method may do anything. So in the first
    micro-batch the sum is computed from the logits, once, to see which of these it is.

    Parameters
    ----------
    model
        The model in training.
    accumulation
        Micro-batches to an update, as planned.
    """

    def __init__(self, model: nn.Module, accumulation: int) -> None:
        self._model = model
        self._accumulation = accumulation
        self._shifted = shifts_labels(model)
        self._kind: str | None = None
        self._known = self._shifted is not None
        self._logits: Any = None
        self._expected: torch.Tensor | None = None

    @contextmanager
    def listening(self, batch: Any) -> Iterator[None]:
        """Look at a micro-batch, and while its kind is not known at the logits of the pass that follows.

        Parameters
        ----------
        batch
            The micro-batch.

        Yields
        ------
        None
            For the pass.
        """
        labels = batch.get("labels") if hasattr(batch, "get") else None
        self._expected = None
        if self._known and isinstance(labels, torch.Tensor) and not labels.is_floating_point():
            # Now, for the loss function may take the labels out of the batch.
            self._expected = targets(labels, shifted=bool(self._shifted))
        if self._expected is None or self._kind is not None:
            yield
            return
        hook = self._model.register_forward_hook(self._keep_logits)
        try:
            yield
        finally:
            hook.remove()

    def _keep_logits(self, model: nn.Module, arguments: Any, outputs: Any) -> None:
        logits = getattr(outputs, "logits", None)
        self._logits = logits.detach() if isinstance(logits, torch.Tensor) else None

    def read(
        self, loss: torch.Tensor, items: torch.Tensor | float | None, micro_batches: int
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Read the summed loss of the micro-batch listened to last.

        Parameters
        ----------
        loss
            What the Trainer's step returned.
        items
            By how many predictions it may have divided.
        micro_batches
            By how many micro-batches it may have divided.

        Returns
        -------
        loss_sum, predictions : torch.Tensor
            Numbers, where the loss is; None for both where it is not known how they relate.
        """
        expected, logits, self._logits = self._expected, self._logits, None
        if expected is None or not isinstance(loss, torch.Tensor):
            return None
        predictions = expected.ne(IGNORED).sum()
        mean = loss.detach().double()
        sums = {"of the mean": mean * predictions, "of a part of the mean": mean * predictions * micro_batches}
        if items is not None:
            sums = {"of the sum": mean * items, **sums}
        if self._kind is not None:
            return (sums[self._kind], predictions) if self._kind in sums else None
        alike = self._alike(sums, logits, expected)
        if not alike:
            self._known = False
            return None
        # With a single micro-batch they cannot be told apart, and need not be if there never are more.
        if len(alike) == 1 or self._accumulation == 1:
            self._kind = alike[0]
        return sums[alike[0]], predictions

    def _alike(self, sums: dict[str, torch.Tensor], logits: torch.Tensor | None, expected: torch.Tensor) -> list[str]:
        if logits is None or logits.shape[:-1] != expected.shape:
            return []
        try:
            with torch.no_grad():
                # One example at a time: beside the training's own, no room for all may be left.
                true = sum(float(summed_cross_entropy(*pair)) for pair in zip(logits, expected, strict=True))
        except (RuntimeError, ValueError, IndexError):  # no room at all, or numbers that are no labels
            return []
        errors = {kind: abs(float(value) - true) for kind, value in sums.items()}
        nearest = min(errors.values())
        if not nearest <= SAME * abs(true):
            return []
        return [kind for kind, error in errors.items() if error <= max(10 * nearest, 1e-6 * abs(true))]
