"""The steps of a range in order, each read and decoded while the one before it is being computed on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
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
    """

    def __init__(self, run: Run, device: torch.device, precision: Precision) -> None:
        self._run, self._device, self._precision = run, device, precision
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

        Yields
        ------
        RecordedStep
            In order. What goes wrong with reading a step is raised in its place.
        """
        states = self._ahead(start, stop) if self.ahead else self._in_turn(start, stop)
        here = next(states)
        theta = self._on_device(here.theta)
        for following in states:
            end = self._on_device(following.theta)
            assert here.record is not None
            yield RecordedStep(record=here.record, start=theta, end=end, buffers=here.buffers)
            here, theta = following, end

    def _in_turn(self, start: int, stop: int) -> Iterator[_Read]:
        return (self._read(t, t < stop) for t in range(start, stop + 1))

    def _ahead(self, start: int, stop: int) -> Iterator[_Read]:
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="lossledger-reader") as reader:
            following = reader.submit(self._read, start, True)
            for t in range(start + 1, stop + 1):
                read = following.result()
                following = reader.submit(self._read, t, t < stop)
                yield read
            yield following.result()

    def _read(self, t: int, is_step: bool) -> _Read:
        theta = {name: self._precision.converted(tensor) for name, tensor in self._run.parameters(t).items()}
        if self._device.type == "cuda":
            # From pinned memory the copy goes on beside the computing.
            theta = {name: tensor.pin_memory() for name, tensor in theta.items()}
        # Buffers before the segment moves on: it decodes forward only.
        buffers = self._run.buffers(t) if is_step and self._held else {}
        return _Read(theta, self._run.step(t) if is_step else None, buffers)

    def _on_device(self, theta: Tensors) -> Tensors:
        return {name: tensor.to(self._device, non_blocking=True) for name, tensor in theta.items()}
