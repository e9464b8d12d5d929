"""Parameters that are cut into shards, one for each process (FSDP2), and put together for the record.

Every θ is gathered in every process and recorded by process 0. That is for models that a single process could hold;
larger ones are refused. Imports of torch's sharding are the training's: where it made no shards, none is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from recorder.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.optim import Optimizer

GATHERED_BYTES = 1 << 30
"""The largest θ that is gathered. Each process holds it whole for a moment, and it passes the network at every step."""


def is_sharded(tensor: torch.Tensor) -> bool:
    """Say whether a tensor is spread over processes.

    Parameters
    ----------
    tensor
        The tensor.

    Returns
    -------
    bool
        True for a DTensor, however it is placed.
    """
    return _is_a(tensor, "torch.distributed.tensor", "DTensor")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Put a tensor together; if it is sharded, all its processes call this at the same moment.

    Parameters
    ----------
    tensor
        The tensor.

    Returns
    -------
    torch.Tensor
        All entries, on the device of the shards; the tensor itself if it is not sharded.
    """
    if not is_sharded(tensor):
        return tensor
    gathered: torch.Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]  # a DTensor's
    return gathered


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Take this process's part of a tensor; it speaks with nobody.

    Parameters
    ----------
    tensor
        The tensor.

    Returns
    -------
    torch.Tensor
        Its shard, which may have no entry; the tensor itself if it is not sharded.
    """
    if not is_sharded(tensor):
        return tensor
    shard: torch.Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]  # a DTensor's
    return shard


def refuse_what_cannot_be_gathered(
    model: nn.Module, optimizer: Optimizer, recorded: Mapping[str, torch.Tensor]
) -> None:
    """Refuse a training whose parameters or optimizer are sharded in a way that cannot be recorded.

    Parameters
    ----------
    model
        The model in training.
    optimizer
        Its optimizer.
    recorded
        Name to parameter, those to be recorded with every step.

    Raises
    ------
    UsageError
        If the model is wrapped by the older FullyShardedDataParallel, the optimizer is a ZeroRedundancyOptimizer, or a
        sharded θ is larger than `GATHERED_BYTES`.
    """
    if any(_is_a(module, "torch.distributed.fsdp", "FullyShardedDataParallel") for module in model.modules()):
        message = (
            "the parameters of a FullyShardedDataParallel model are flat shards without names or shapes, and are not "
            "recorded; shard it with torch.distributed.fsdp.fully_shard, or train with DistributedDataParallel"
        )
        raise UsageError(message)
    if _is_a(optimizer, "torch.distributed.optim", "ZeroRedundancyOptimizer"):
        message = (
            "a ZeroRedundancyOptimizer keeps its state in shards, without which no update can be done again; record "
            "the training with the optimizer itself"
        )
        raise UsageError(message)
    size = sum(tensor.numel() * tensor.element_size() for tensor in recorded.values() if is_sharded(tensor))
    if size > GATHERED_BYTES:
        message = (
            f"the recorded parameters are sharded, and together have {size:,} bytes; they are gathered at every "
            f"recorded step, which is done up to {GATHERED_BYTES:,} bytes. Record fewer of them with parameters=, or "
            "leave the recorder off and save checkpoints"
        )
        raise UsageError(message)


def _is_a(thing: Any, module: str, name: str) -> bool:
    # What was never imported has no instances.
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(thing, kind)
