"""A micro-batch as data: any nest of dicts, lists and tuples with tensors at its leaves, taken apart and rebuilt.

The tensors go into the segment under their path in the nest; the nest itself becomes plain JSON. No pickle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from recorder.errors import FormatError


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to host memory; from a GPU without waiting for what it still has to do.

    Parameters
    ----------
    tensor
        Anywhere.

    Returns
    -------
    torch.Tensor
        A contiguous copy; from a GPU it is whole once the GPU's current stream has come so far.
    """
    if tensor.device.type != "cuda":
        return tensor.to("cpu", copy=True).contiguous()
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


def take_apart(batch: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Split a micro-batch into its nest, as JSON types, and its tensors, copied to host memory.

    Parameters
    ----------
    batch
        Dicts with text keys, lists, tuples, numbers, texts, None and tensors, nested in any way.

    Returns
    -------
    nest : JSON value
        The same nest, a tensor replaced by ``{"tensor": path}``.
    tensors : dict of str to torch.Tensor
        Path to tensor. Copies: the training may reuse its buffers.
    """
    tensors: dict[str, torch.Tensor] = {}

    def visit(value: Any, path: str) -> Any:
        if isinstance(value, torch.Tensor):
            while path in tensors:  # a key may itself hold a dot
                path += "'"
            tensors[path] = to_host(value.detach())
            return {"tensor": path}
        return _visit_nest(value, path, visit)

    return visit(batch, "batch"), tensors


def _visit_nest(value: Any, path: str, visit: Callable[[Any, str], Any]) -> Any:
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            message = f"a batch's dict at {path!r} has keys that are no text; it cannot be recorded"
            raise FormatError(message)
        return {"dict": {key: visit(entry, f"{path}.{key}") for key, entry in value.items()}}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [visit(entry, f"{path}.{position}") for position, entry in enumerate(value)]}
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a NumPy scalar
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    message = f"a batch holds a {type(value).__name__} at {path!r}; only tensors, numbers, text, None and nests of them"
    raise FormatError(message)


def put_together(nest: Any, tensor: Callable[[str], torch.Tensor]) -> Any:
    """Rebuild a micro-batch from its nest.

    Parameters
    ----------
    nest
        What `take_apart` returned.
    tensor
        Path to tensor.

    Returns
    -------
    Any
        The micro-batch, on whatever device the tensors are.

    Raises
    ------
    FormatError
        If the nest has a node of an unknown kind.
    """
    ((kind, content),) = nest.items()
    if kind == "tensor":
        return tensor(content)
    if kind == "dict":
        return {key: put_together(entry, tensor) for key, entry in content.items()}
    if kind == "list":
        return [put_together(entry, tensor) for entry in content]
    if kind == "tuple":
        return tuple(put_together(entry, tensor) for entry in content)
    if kind == "value":
        return content
    if kind == "float":
        return float(content)
    message = f"a recorded batch has a node of unknown kind {kind!r}"
    raise FormatError(message)


def to_device(batch: Any, device: torch.device) -> Any:
    """Copy a micro-batch with every tensor on `device`.

    Parameters
    ----------
    batch
        As for `take_apart`.
    device
        Where to.

    Returns
    -------
    Any
        The same nest.
    """
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(entry, device) for key, entry in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(entry, device) for entry in batch)
    return batch
