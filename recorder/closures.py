"""Closures given to an optimizer's step: forward and backward pass happen inside it, after its pre-hooks.

What the recorder reads of an update's gradients it must then read when the closure returns for the first time. An
optimizer that calls it again (LBFGS in its line search) measures at other parameters than the step began with.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def noticed(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    first: Callable[[], None],
    again: Callable[[], AbstractContextManager[None]],
) -> Arguments | None:
    """Find the closure among the arguments of an optimizer's step, and put in its place one that tells of its calls.

    Parameters
    ----------
    args, kwargs
        As a step's pre-hook receives them, the optimizer first.
    first
        Called once, as soon as the closure has returned for the first time.
    again
        What all its later calls take place in.

    Returns
    -------
    tuple or None
        The arguments to go on with: the closure is called as before, and what it returns or raises comes back. None
        where there is none.
    """
    if callable(kwargs.get("closure")):
        return args, {**kwargs, "closure": _telling(kwargs["closure"], first, again)}
    if len(args) > 1 and callable(args[1]):
        return (args[0], _telling(args[1], first, again), *args[2:]), kwargs
    return None


def _telling(
    closure: Callable[..., Any], first: Callable[[], None], again: Callable[[], AbstractContextManager[None]]
) -> Callable[..., Any]:
    called = False

    @wraps(closure)
    def telling(*args: Any, **kwargs: Any) -> Any:
        nonlocal called
        if called:
            with again():
                return closure(*args, **kwargs)
        outcome = closure(*args, **kwargs)
        called = True
        first()
        return outcome

    return telling
