"""The tensors that the optimizer updates, where they are not the model's own: float32 masters of 16-bit parameters.

Training in 16 bit often keeps a float32 copy of every parameter, updates that, and rounds it into the model. Such a
master is a tensor of its own or a part of one flat tensor; so who belongs to whom is told by the memory they share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from recorder.errors import UsageError

if TYPE_CHECKING:
    from torch import nn


def views_of(flat: torch.Tensor, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Cut one flat master into a view for each parameter.

    Parameters
    ----------
    flat
        One-dimensional and contiguous: the masters of all `parameters`, one behind the other in their order.
    parameters
        Name to parameter, whose shape its view takes.

    Returns
    -------
    dict of str to torch.Tensor
        Name to view: it shares the memory of `flat`, without its gradient.

    Raises
    ------
    UsageError
        If `flat` does not have exactly the entries of all parameters.

    Examples
    --------
    >>> weight, bias = torch.zeros(2, 3), torch.zeros(2)
    >>> flat = torch.arange(8.0)
    >>> views_of(flat, {"weight": weight, "bias": bias})["bias"]
    tensor([6., 7.])
    """
    entries = sum(parameter.numel() for parameter in parameters.values())
    if flat.dim() != 1 or flat.numel() != entries:
        message = (
            f"a flat master of shape {tuple(flat.shape)} is not that of {len(parameters)} parameters: "
            f"they have {entries} entries, so its shape should be ({entries},)"
        )
        raise UsageError(message)
    views, offset = {}, 0
    for name, parameter in parameters.items():
        views[name] = flat.detach()[offset : offset + parameter.numel()].view(parameter.shape)
        offset += parameter.numel()
    return views


def masters_by_first_name(model: nn.Module, masters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Check masters against the model they are for.

    Parameters
    ----------
    model
        The model in training.
    masters
        Parameter name to the tensor that the optimizer updates for it, or to a view of its part of a flat one. Of tied
        weights any of the names.

    Returns
    -------
    dict of str to torch.Tensor
        The same masters under the names of ``model.named_parameters()``.

    Raises
    ------
    UsageError
        If a name is no parameter of the model, or a master has another shape than its parameter.
    """
    first_names: dict[int, str] = {}
    aliases: dict[str, str] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        aliases[name] = first_names.setdefault(id(parameter), name)
    unknown = sorted(set(masters) - set(aliases))
    if unknown:
        message = (
            f"masters holds {len(unknown)} names that are no parameters of the model given to watch, first "
            f"{unknown[0]!r}; its keys are the names of model.named_parameters()"
        )
        raise UsageError(message)
    for name, master in masters.items():
        if master.shape != parameters[name].shape:
            message = (
                f"the master of {name!r} has shape {tuple(master.shape)}, the parameter {tuple(parameters[name].shape)}"
                "; give a view of the parameter's shape, see recorder.masters.views_of"
            )
            raise UsageError(message)
    return {aliases[name]: master for name, master in masters.items()}


def names_within(updated: Sequence[torch.Tensor], recorded: Mapping[str, torch.Tensor]) -> list[tuple[str, ...]]:
    """Find for every tensor of an optimizer the recorded tensors that it is, or that lie in its memory.

    Parameters
    ----------
    updated
        The optimizer's tensors.
    recorded
        Name to recorded tensor.

    Returns
    -------
    list of tuple of str
        For each of `updated` the names, in the order of their places in it; empty where there are none.
    """
    by_identity = {id(tensor): name for name, tensor in recorded.items()}
    places: dict[tuple[torch.device, int], list[tuple[int, int, str]]] = {}
    if any(id(tensor) not in by_identity for tensor in updated):
        taken = {id(tensor) for tensor in updated}
        for name, tensor in recorded.items():
            if id(tensor) not in taken:
                places.setdefault(_storage(tensor), []).append((*_place(tensor), name))
    found: list[tuple[str, ...]] = []
    for tensor in updated:
        if id(tensor) in by_identity:
            found.append((by_identity[id(tensor)],))
            continue
        start, stop = _place(tensor)
        inside = sorted(place for place in places.get(_storage(tensor), ()) if start <= place[0] and place[1] <= stop)
        found.append(tuple(name for _, _, name in inside))
    return found


def gradient_within(updated: torch.Tensor, recorded: torch.Tensor) -> torch.Tensor | None:
    """Take a recorded tensor's part of the gradient of the optimizer's tensor that holds it.

    Parameters
    ----------
    updated
        The optimizer's tensor.
    recorded
        The same tensor, or a view of a part of it.

    Returns
    -------
    torch.Tensor or None
        Its entries in one dimension; None where `updated` has no gradient.
    """
    if updated.grad is None:
        return None
    offset = (recorded.data_ptr() - updated.data_ptr()) // updated.element_size()
    return updated.grad.reshape(-1)[offset : offset + recorded.numel()]


def _storage(tensor: torch.Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    # The bytes from the first entry to the last, within the storage.
    if not tensor.numel():
        return 0, 0
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset()) * tensor.element_size()
    return start, start + (int(last) + 1) * tensor.element_size()
