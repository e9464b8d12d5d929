"""The processes of a data-parallel training, seen from one of them."""

from __future__ import annotations

from typing import Any

import torch.distributed as distributed


def this_process() -> tuple[int, int]:
    """Say which process this is.

    Returns
    -------
    rank : int
        From 0.
    processes : int
        How many there are; 1 where nothing is distributed.
    """
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def from_first(value: Any) -> Any:
    """Give every process what process 0 has; all of them call this at the same moment of the training.

    Parameters
    ----------
    value
        Plain JSON types; ignored in the other processes.

    Returns
    -------
    Any
        The value of process 0.
    """
    _, processes = this_process()
    if processes == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]
