"""The entries of a chunk's steps, added up window by window while they are computed; imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from replay.allocation import Allocation
    from replay.chunks import Range


class Collector:
    """Adds up the entries of one chunk's steps, window by window.

    Parameters
    ----------
    wanted
        The window and the steps of each part, in the order of steps.
    write
        Called with window, steps and sums of each part that is complete.
    sharers
        Rows of the ledger to the parameters whose entries they share (`replay.ledger.sharers`): the LCA of an entry of
        a tied parameter is the sum over its uses.
    """

    def __init__(
        self,
        wanted: Sequence[tuple[Range, Range]],
        write: Callable[[Range, Range, dict[str, torch.Tensor]], None],
        sharers: Mapping[str, str] | None = None,
    ) -> None:
        self._wanted = list(wanted)
        self._write = write
        self._sharers = dict(sharers or {})
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, t: int, allocation: Allocation) -> None:
        """Add the entries of a step, if it is in a window; what is complete with it is written.

        Parameters
        ----------
        t
            The step.
        allocation
            Its ledger.
        """
        if not any(start <= t < stop for _, (start, stop) in self._wanted):
            return
        for name in allocation.gradient:
            lca = allocation.lca(name)
            owner = self._sharers.get(name, name)
            self._sums[owner] = self._sums[owner].add_(lca) if owner in self._sums else lca
        window, (_, stop) = self._wanted[0]
        if stop == t + 1:
            _, piece = self._wanted.pop(0)
            self._write(window, piece, {name: entries.cpu() for name, entries in self._sums.items()})
            self._sums = {}
