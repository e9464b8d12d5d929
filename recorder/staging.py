"""Copies of θ in host memory, taken while the training goes on.

All tensors of a θ go into flat vectors allocated once. On the CPU that is one pass; from a GPU the copy runs on a
stream of its own into pinned memory, and only the next optimizer step waits for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np
import torch

from recorder.layout import Layout, bits
from recorder.segmentwriter import State

COPIES = 4
"""Two that the codec compares with, one that it codes, one that is being filled."""

_THREADED_ABOVE = 1 << 15  # entries; smaller tensors torch copies without its other threads


class Staging:
    """A fixed number of copies, taken and given back.

    Parameters
    ----------
    layout
        What a copy holds.
    device
        Where the tensors live.
    copies
        How many; when all are in use, the training waits.

    Attributes
    ----------
    waited : float
        Seconds that the training has waited for a free copy.
    """

    def __init__(self, layout: Layout, device: torch.device, copies: int = COPIES) -> None:
        self.layout = layout
        self.waited = 0.0
        self._cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._cuda else None  # type: ignore[no-untyped-call]
        self._copied: torch.cuda.Event | None = None
        self._free = [layout.allocate(pinned=self._cuda) for _ in range(copies)]
        self._freed = threading.Condition()

    def copy(self, number: int, tensors: Sequence[torch.Tensor]) -> State:
        """Copy the tensors of a θ; waits while all copies are in use.

        Parameters
        ----------
        number
            The t of θ_t.
        tensors
            One for each slot of the layout, in its dtype and shape.

        Returns
        -------
        State
            The copy. From a GPU it is whole once `wait` has returned.
        """
        vectors = self._take()
        views = self.layout.views(vectors)
        with torch.no_grad():
            if self._stream is None:
                _copy_by_one_thread(views, [tensor.detach() for tensor in tensors])
                return State(number, self.layout, vectors, lambda: self._give_back(vectors))
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            with torch.cuda.stream(self._stream):
                for view, tensor in zip(views, tensors, strict=True):
                    view.copy_(tensor.detach(), non_blocking=True)
                    tensor.record_stream(self._stream)  # one put together from shards is dropped by its owner now
                copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
                copied.record(self._stream)
        self._copied = copied
        return State(number, self.layout, vectors, lambda: self._give_back(vectors), copied.synchronize)

    def before_update(self) -> None:
        """Let the device finish the last copy before it overwrites what is copied."""
        if self._copied is not None and self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._copied)

    def _take(self) -> dict[str, torch.Tensor]:
        with self._freed:
            if not self._free:
                began = time.perf_counter()
                self._freed.wait_for(lambda: self._free)
                self.waited += time.perf_counter() - began
            return self._free.pop()

    def _give_back(self, vectors: dict[str, torch.Tensor]) -> None:
        with self._freed:
            self._free.append(vectors)
            self._freed.notify()


def _copy_by_one_thread(views: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]) -> None:
    # torch's threads wait for each other after each large tensor, and for the writer that has the core of one of them:
    # with both cores busy, one copy in ten took ten times as long. A single thread nearly fills the memory's bandwidth.
    rest = []
    for view, tensor in zip(views, tensors, strict=True):
        if tensor.numel() > _THREADED_ABOVE and tensor.is_cpu and tensor.is_contiguous():
            np.copyto(bits(view.view(-1)), bits(tensor.view(-1)))
        else:
            rest.append((view, tensor))
    if rest:
        torch._foreach_copy_([view for view, _ in rest], [tensor for _, tensor in rest])
