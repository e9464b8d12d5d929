"""The model's buffers: which of them change in training, and their values before a step's first forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from recorder import tensorfile

if TYPE_CHECKING:
    from torch import nn


class ModelBuffers:
    """The buffers of a live model, such as the running statistics of batch normalisation.

    A forward pass in training mode changes them, so those of a step's start are copied when its first micro-batch is
    announced.

    Parameters
    ----------
    model
        The model in training.

    Attributes
    ----------
    changing : tuple of str
        Names of those that every θ is recorded with; `settle` finds them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._at_start: dict[str, torch.Tensor] = {}
        self._settled = False
        self.changing: tuple[str, ...] = ()

    def keep(self) -> None:
        """Copy them, just before the first forward pass of a step."""
        buffers = dict(self._model.named_buffers())
        names = self.changing if self._settled else buffers
        self._at_start = {name: buffers[name].detach().clone() for name in names}

    def settle(self) -> None:
        """Find out, after the first forward and backward pass, which of them training changes."""
        now = dict(self._model.named_buffers())
        # By their bytes: a NaN that stays is no change.
        self.changing = tuple(
            name for name, before in self._at_start.items() if _checksum(now[name]) != _checksum(before)
        )
        self._settled = True

    def at_start(self) -> dict[str, torch.Tensor]:
        """Give the changing ones as `keep` found them.

        Returns
        -------
        dict of str to torch.Tensor
            Name to tensor on the model's device.
        """
        return {name: self._at_start[name] for name in self.changing}

    def now(self) -> dict[str, torch.Tensor]:
        """Give the changing ones as they are.

        Returns
        -------
        dict of str to torch.Tensor
            Name to the model's own tensor.
        """
        buffers = dict(self._model.named_buffers())
        return {name: buffers[name] for name in self.changing}


def _checksum(buffer: torch.Tensor) -> int:
    return tensorfile.checksum(buffer.detach().cpu())
