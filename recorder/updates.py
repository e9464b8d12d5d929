"""When an optimizer's update begins and ends, told from its hooks, through closures and steps that call steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from recorder.closures import Arguments, noticed

if TYPE_CHECKING:
    from torch.optim import Optimizer


class Updates:
    """The updates of an optimizer, as they happen.

    Parameters
    ----------
    optimizer
        The optimizer; it is left alone but for its hooks.
    entered
        Called first of all.
    before_closure
        Called before a closure that the optimizer was given, when the gradients are still to come.
    before_update
        Called with the optimizer when its gradients are there: once in each update.
    after_update
        Called when the parameters have moved.
    after_outer_step
        Called where a step ends within which another one has ended: a subclass whose step calls that of its base. torch
        calls the hooks of both, and the inner one was the update.

    Attributes
    ----------
    measuring_again : bool
        Whether the optimizer has called its closure once more, at other parameters than the step began with.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        entered: Callable[[], None],
        before_closure: Callable[[], None],
        before_update: Callable[[Optimizer], None],
        after_update: Callable[[], None],
        after_outer_step: Callable[[], None],
    ) -> None:
        self._entered = entered
        self._before_closure = before_closure
        self._before_update = before_update
        self._after_update = after_update
        self._after_outer_step = after_outer_step
        self._within_step = False
        self._gradients_due = False
        self.measuring_again = False
        self._hooks = [
            optimizer.register_step_pre_hook(self._enter_step),
            optimizer.register_step_post_hook(self._leave_step),
        ]

    def release(self) -> None:
        """Take the hooks off the optimizer."""
        for hook in self._hooks:
            hook.remove()

    def _enter_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Arguments | None:
        self._entered()
        self._within_step = True
        arguments = noticed(args, kwargs, first=lambda: self._gradients_come(optimizer), again=self._measured_again)
        if arguments is None:
            self._gradients_come(optimizer)
        else:
            self._gradients_due = True
            self._before_closure()
        return arguments

    def _gradients_come(self, optimizer: Optimizer) -> None:
        self._gradients_due = False
        self._before_update(optimizer)

    def _leave_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._within_step:
            self._after_outer_step()
            return
        self._within_step = False
        if self._gradients_due:  # the optimizer had no use for the closure
            self._gradients_come(optimizer)
        self._after_update()

    @contextmanager
    def _measured_again(self) -> Iterator[None]:
        self.measuring_again = True
        try:
            yield
        finally:
            self.measuring_again = False
