"""The steps of a range in order, each read and decoded while the one before it is being computed on."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from recorder.runformat import Run
    from recorder.steps import Step
    from replay.precision import Precision

Tensors = Mapping[str, torch.Tensor]

WORTH_A_THREAD = 1 << 22
"""Bytes of θ below which it is read in less time than two threads take to wait for each other."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RecordedStep:
    """All that a run holds of one step.

    Parameters
    ----------
    record
        Its batches, losses, learning rates.
    start, end
        θ_t and θ_{t+1}, on the device. The start of a step is the end of the one before: the same object.
    buffers
        Those that change in training, as they were before the step, in host memory; none where none changes.
    """

    record: Step
    start: Tensors
    end: Tensors
    buffers: Tensors


@dataclasses.dataclass(frozen=True, slots=True)
class _Read:
    theta: Tensors
    record: Step | None
    buffers: Tensors

    def step(self, start: Tensors, end: Tensors) -> RecordedStep:
        assert self.record is not None
        return RecordedStep(record=self.record, start=start, end=end, buffers=self.buffers)


class _Awaited(Mapping[str, torch.Tensor]):
    """Parameters that may still be on their way; whoever looks at them waits."""

    def __init__(self, read: Future[_Read], on_device: Callable[[Tensors], Tensors]) -> None:
        self._read, self._on_device = read, on_device
        self._tensors: Tensors | None = None

    def _there(self) -> Tensors:
        if self._tensors is None:
            self._tensors = self._on_device(self._read.result().theta)
            del self._read  # and with it the copy in host memory
        return self._tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._there()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._there())

    def __len__(self) -> int:
        return len(self._there())


class ReadAhead:
    """A run as a stream of steps.

    One thread reads, so that the run's open segment has one reader; it is one step ahead, so that the memory is that of
    one more θ.

    Parameters
    ----------
    run
        The run.
    device
        Where θ goes.
    precision
        In which numbers.
    sharers
        Further names to the parameters whose values they share (`replay.ledger.sharers`): both have the same
        tensor.
    """

    def __init__(
        self, run: Run, device: torch.device, precision: Precision, sharers: Mapping[str, str] | None = None
    ) -> None:
        self._run, self._device, self._precision = run, device, precision
        self._sharers = dict(sharers or {})
        self._held = bool(run.manifest.buffers)
        self._bytes: int = sum(row.size * getattr(torch, row.dtype).itemsize for row in run.manifest.trained)

    @property
    def ahead(self) -> bool:
        """Whether a step is read while the one before it is computed on: worth it only where θ is large."""
        return self._bytes >= WORTH_A_THREAD

    def steps(self, start: int, stop: int) -> Iterator[RecordedStep]:
        """Read consecutive steps.

        Parameters
        ----------
        start, stop
            The range of steps; all of them recorded.

        Returns
        -------
        iterator of RecordedStep
            In order. What goes wrong with reading a step is raised in its place.
        """
        return self._ahead(start, stop) if self.ahead else self._in_turn(start, stop)

    def _in_turn(self, start: int, stop: int) -> Iterator[RecordedStep]:
        here = self._read(start, is_step=True)
        theta = self._on_device(here.theta)
        for t in range(start + 1, stop + 1):
            following = self._read(t, is_step=t < stop)
            end = self._on_device(following.theta)
            yield here.step(theta, end)
            here, theta = following, end

    def _ahead(self, start: int, stop: int) -> Iterator[RecordedStep]:
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="lossledger-reader") as reader:
            coming = deque(reader.submit(self._read, t, is_step=t < stop) for t in (start, start + 1))
            here = coming.popleft().result()
            theta: Tensors = self._on_device(here.theta)
            for t in range(start + 2, stop + 2):
                if t <= stop:
                    coming.append(reader.submit(self._read, t, is_step=t < stop))
                following = coming.popleft()
                # The first gradient needs the start alone: it is computed while the end is being read.
                end = _Awaited(following, self._on_device)
                yield here.step(theta, end)
                here, theta = following.result(), end
                del following

    def _read(self, t: int, *, is_step: bool) -> _Read:
        theta = {name: self._precision.converted(tensor) for name, tensor in self._run.parameters(t).items()}
        if self._device.type == "cuda":
            # From pinned memory the copy goes on beside the computing.
            theta = {name: tensor.pin_memory() for name, tensor in theta.items()}
        # Buffers before the segment moves on: it decodes forward only.
        buffers = self._run.buffers(t) if is_step and self._held else {}
        return _Read(theta, self._run.step(t) if is_step else None, buffers)

    def _on_device(self, theta: Tensors) -> Tensors:
        there = {name: tensor.to(self._device, non_blocking=True) for name, tensor in theta.items()}
        return there | {name: there[owner] for name, owner in self._sharers.items()}
