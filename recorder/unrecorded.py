"""What no step records: buffers and untrained parameters, compared with what they were before the first step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

from recorder import tensorfile
from recorder.sharded import local

if TYPE_CHECKING:
    import torch
    from torch import nn


class Unrecorded:
    """The checksums of what must not change, for the loss depends on it.

    Parameters
    ----------
    model
        The model in training, whose buffers are looked at.

    Attributes
    ----------
    changes : set of str
        Names of buffers and untrained parameters found changed so far.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._checksums: dict[str, int] = {}
        self._moved_before_first_gradient: set[str] = set()
        self._recorded_buffers: Collection[str] = ()
        self.changes: set[str] = set()

    def remember(self, untrained: Mapping[str, torch.Tensor], *, recorded_buffers: Collection[str]) -> None:
        """Remember, just before the first step, what must not change.

        Parameters
        ----------
        untrained
            Name to tensor of the parameters that no step records.
        recorded_buffers
            Names of buffers that are recorded with every step, and so may change.
        """
        self._recorded_buffers = recorded_buffers
        self._checksums = self._checksums_of(untrained)

    def leave(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Look a last time at parameters that are about to be recorded.

        Parameters
        ----------
        tensors
            Name to tensor of those that now have their first gradient.
        """
        # Weight decay moves a master without a gradient, and until now no step recorded it.
        self._moved_before_first_gradient |= {
            name for name, tensor in tensors.items() if _checksum(tensor) != self._checksums[name]
        }

    def find(self, untrained: Mapping[str, torch.Tensor], *, may_change: Callable[[], Collection[str]]) -> bool:
        """Compare with what was remembered.

        Parameters
        ----------
        untrained
            Name to tensor of the parameters that no step records.
        may_change
            Names those that may change all the same; asked only where there is something to compare with.

        Returns
        -------
        bool
            Whether `changes` has grown.
        """
        if not self._checksums:
            return False  # nothing to compare with: no step yet, or nothing that no step records
        changed = self._moved_before_first_gradient | {
            name
            for name, checksum in self._checksums_of(untrained, leave_out=may_change()).items()
            if checksum != self._checksums.get(name)
        }
        grown = bool(changed - self.changes)
        self.changes |= changed
        return grown

    def _checksums_of(self, untrained: Mapping[str, torch.Tensor], leave_out: Collection[str] = ()) -> dict[str, int]:
        buffers = {name: tensor for name, tensor in self._model.named_buffers() if name not in self._recorded_buffers}
        tensors = {**buffers, **untrained}
        return {name: _checksum(tensor) for name, tensor in tensors.items() if name not in leave_out}


def _checksum(tensor: torch.Tensor) -> int:
    # Of the bytes: a NaN that stays is no change (fairseq keeps a buffer of memory that it never fills).
    # Of this process's shard: a checksum speaks with no other process.
    return tensorfile.checksum(local(tensor).detach().cpu())
