"""The processes of a data-parallel training, seen from one of them.

Whatever speaks with the other processes is called by all of them at the same moment of the training; a call that only
some make leaves the training hanging.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as distributed

from recorder.errors import LossledgerError, UsageError

T = TypeVar("T")


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


def in_first(action: Callable[[], T]) -> T:
    """Do something in process 0 alone; all processes get its result, or its error.

    Parameters
    ----------
    action
        What to do; its result is of plain types.

    Returns
    -------
    object
        What it returned in process 0. What it raised there is raised in every process: an error of lossledger's own
        as it is, any other in words, as a `UsageError`.
    """
    rank, processes = this_process()
    if processes == 1:
        return action()
    outcome: list[Any] = [None, None]
    failure: Exception | None = None
    if rank == 0:
        try:
            outcome[0] = action()
        except Exception as error:
            failure = error
            words = f"process 0 failed: {type(error).__name__}: {error}"
            outcome[1] = error if isinstance(error, LossledgerError) else UsageError(words)
    # The others wait for it, also where this process failed.
    distributed.broadcast_object_list(outcome, src=0)
    result, told = outcome
    if told is not None:
        raise failure or told
    return result  # type: ignore[no-any-return]


def in_all(action: Callable[[], T]) -> T:
    """Do something in every process; where it fails in one, it fails in all.

    Parameters
    ----------
    action
        What to do.

    Returns
    -------
    object
        What it returned in this process.

    Raises
    ------
    UsageError
        If an error of lossledger's own ended it in any process.
    """
    result, problem = None, ""
    try:
        result = action()
    except LossledgerError as error:
        problem = str(error)
    told = [f"process {rank}: {text}" for rank, text in enumerate(from_all(problem)) if text]
    if told:
        raise UsageError("; ".join(told))
    return result  # type: ignore[return-value]


def from_all(value: str) -> list[str]:
    """Tell all processes a text, and hear theirs.

    Parameters
    ----------
    value
        The text of this process.

    Returns
    -------
    list of str
        One for each process, by rank.
    """
    _, processes = this_process()
    if processes == 1:
        return [value]
    values = [""] * processes
    distributed.all_gather_object(values, value)
    return values
