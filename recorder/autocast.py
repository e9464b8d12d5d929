"""In which dtype torch computes: where the loop is now, and in the model's first forward passes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.hooks import RemovableHandle


class Autocast:
    """`torch.autocast` around a model, as far as it can be seen.

    Parameters
    ----------
    model
        The model in training.
    device
        Where it is.

    Attributes
    ----------
    seen : str or None
        What `now` said in a forward pass of the model, after `watch_first_forward`.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._released = False
        self._hook: RemovableHandle | None = None
        self.seen: str | None = None

    def now(self) -> str | None:
        """Say whether torch computes in 16 bit now, on the model's device.

        Returns
        -------
        str or None
            The dtype without the prefix ``torch.``; None outside `torch.autocast`.
        """
        kind = self._device.type
        return str(torch.get_autocast_dtype(kind)).removeprefix("torch.") if torch.is_autocast_enabled(kind) else None

    def watch_first_forward(self) -> None:
        """Look into the model's forward passes until `release`: loops announce a batch outside of autocast."""
        # No longer than that: a hook would travel with copies of the model, and closes torch's fast path to some.
        if self._hook is None and not self._released:
            self._hook = self._model.register_forward_pre_hook(self._notice)

    def release(self) -> None:
        """Take the hook off the model, for good."""
        self._released = True
        if self._hook is not None:
            self._hook.remove()

    def _notice(self, model: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling() and model.training and torch.is_grad_enabled():
            self.seen = self.now() or self.seen
