"""Which tensors the optimizer updates, whose they are, and which gradients it has for them.

Told afresh only where the optimizer's tensors have changed. With masters, the gradients are the masters' for the
update itself, but the model's own say which parameters took part: a master without a gradient is given zeros.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from recorder.errors import UsageError
from recorder.masters import gradient_within, names_within
from recorder.sharded import is_sharded, whole

if TYPE_CHECKING:
    from torch.optim import Optimizer

SIXTEEN_BIT = frozenset({torch.float16, torch.bfloat16})


class Ownership:
    """An optimizer's tensors and the parameters that they are, or are the masters of.

    Parameters
    ----------
    optimizer
        The optimizer.
    tensors
        Name to parameter of the model.
    masters
        Name to master, for those parameters that have one.

    Attributes
    ----------
    recorded : dict of str to torch.Tensor
        Name to the tensor that is recorded: the master, or the parameter itself.
    """

    def __init__(
        self, optimizer: Optimizer, tensors: Mapping[str, torch.Tensor], masters: Mapping[str, torch.Tensor]
    ) -> None:
        self._optimizer = optimizer
        self._tensors = tensors
        self._masters = masters
        self.recorded = {name: masters.get(name, tensor) for name, tensor in tensors.items()}
        self._places: list[tuple[int, int]] = []
        self._names: list[tuple[str, ...]] = []
        self._holders: dict[str, torch.Tensor] = {}

    def names(self) -> list[tuple[str, ...]]:
        """List the parameters behind each tensor of the optimizer.

        Returns
        -------
        list of tuple of str
            For every tensor, through all groups, its names.

        Raises
        ------
        UsageError
            If the optimizer updates tensors, or parts of them, that are neither the model's nor its masters.
        """
        updated = self._updated()
        places = [(id(tensor), tensor.data_ptr() if self._masters else 0) for tensor in updated]
        if places == self._places:
            return self._names
        names = names_within(updated, self.recorded)
        unknown = sum(not entry for entry in names)
        if unknown:
            message = (
                f"the optimizer updates {unknown} tensors that are no parameters of the model given to watch "
                "(a float32 copy kept for 16-bit training, or another model's). Copies are recorded where "
                "watch(..., masters={name: copy}) says which parameter each belongs to"
            )
            raise UsageError(message)
        for tensor, entry in zip(updated, names, strict=True):
            covered = sum(self.recorded[name].numel() for name in entry)
            if covered != tensor.numel():
                message = (
                    f"the optimizer updates a tensor of {tensor.numel()} entries, of which only {covered} belong to "
                    f"parameters of the model (first {entry[0]!r}); give masters the views of all its parts"
                )
                raise UsageError(message)
        self._holders = {name: tensor for tensor, entry in zip(updated, names, strict=True) for name in entry}
        self._names, self._places = names, places
        return names

    def holders(self) -> dict[str, torch.Tensor]:
        """Find for every parameter that the optimizer updates the tensor that it updates.

        Returns
        -------
        dict of str to torch.Tensor
            Name to the parameter, its master, or the flat tensor that its master is a part of.
        """
        self.names()
        return self._holders

    def with_master(self) -> set[str]:
        """Name the parameters that the optimizer updates through a master.

        Returns
        -------
        set of str
            Names.
        """
        return self._masters.keys() & self.holders().keys()

    def with_gradient(self, names: Iterable[str]) -> set[str]:
        """Find the parameters that are about to be updated with a gradient of theirs.

        Parameters
        ----------
        names
            Where to look.

        Returns
        -------
        set of str
            Those that the optimizer updates and whose gradient is not None. Where the loop has dropped the model's
            gradients once they were copied to the masters, those whose master has a gradient other than zero.
        """
        holders = self.holders()
        updated = {name for name in names if name in holders}
        found = {name for name in updated if self._tensors[name].grad is not None}
        if all(self._tensors[name].grad is None for name in self._masters):
            for name in self._masters.keys() & updated:
                gradient = gradient_within(holders[name], self._masters[name])
                if gradient is not None and bool(gradient.any()):
                    found.add(name)
        return found

    def gradient_norm(self) -> float:
        """Measure the gradients that the optimizer is about to use.

        Returns
        -------
        float
            Euclidean norm over all of them, without the scale that a gradient scaler leaves to the optimizer.
        """
        holders = self.holders()
        used = {id(tensor): tensor for tensor in (holders.get(name, own) for name, own in self._tensors.items())}
        gradients = [_entries(whole(tensor.grad)) for tensor in used.values() if tensor.grad is not None]
        wide = [entries.float() if entries.dtype in SIXTEEN_BIT else entries for entries in gradients]
        norm = float(torch.nn.utils.get_total_norm(wide))
        scale = getattr(self._optimizer, "grad_scale", None)
        return norm if scale is None else norm / float(scale)

    def gradients_dropped(self) -> bool:
        """Tell whether all gradients are gone.

        Returns
        -------
        bool
            Whether neither a parameter that the optimizer updates nor a master holds a gradient other than zero. Where
            parameters are sharded it cannot be told, and is False: gradients gather elsewhere, and a shard may be
            empty.
        """
        holders = self.holders()
        if any(is_sharded(tensor) for tensor in holders.values()):
            return False
        tensors = {id(tensor): tensor for name in holders for tensor in (self._tensors[name], holders[name])}
        gradients = [tensor.grad for tensor in tensors.values() if tensor.grad is not None]
        return not any(bool(_entries(gradient).any()) for gradient in gradients)

    def gradients_finite(self) -> bool:
        """Tell whether the model's gradients hold neither infinity nor NaN.

        Returns
        -------
        bool
            Of those parameters that the optimizer updates. Of sharded ones it is not asked, and True: processes would
            differ.
        """
        if any(is_sharded(tensor) for tensor in self.holders().values()):
            return True
        gradients = [self._tensors[name].grad for name in self.holders()]
        largest = [
            torch.linalg.vector_norm(_entries(gradient), ord=math.inf).float()
            for gradient in gradients
            if gradient is not None and gradient.numel()
        ]
        # One answer from the device, not one for each parameter.
        return not largest or bool(torch.stack([norm.to(largest[0].device) for norm in largest]).isfinite().all())

    def _updated(self) -> list[torch.Tensor]:
        return [tensor for group in self._optimizer.param_groups for tensor in group["params"]]


def _entries(gradient: torch.Tensor) -> torch.Tensor:
    # torch takes no norm of a sparse gradient (nn.Embedding(sparse=True)).
    return gradient.coalesce().values() if gradient.is_sparse else gradient
