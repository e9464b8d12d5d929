"""How small and how fast: consecutive steps of a real training through the recorder's own writer and its codec."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.trainings import Training
from recorder.capture import NARROW_SEGMENT_STEPS, SEGMENT_STEPS
from recorder.codec import StepCoder
from recorder.layout import PARAMETERS, Layout, Slot, bits
from recorder.segments import Segment, list_segments, segment_file
from recorder.segmentwriter import SegmentWriter, State
from recorder.steps import Step

SEGMENT_LENGTHS = {"float32": SEGMENT_STEPS, "bfloat16": NARROW_SEGMENT_STEPS, "float16": NARROW_SEGMENT_STEPS}
"""Steps to a segment, as a recording would have them."""

FEWEST_STEPS = 2
"""The first step has no prediction, and its speed does not count."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredShare:
    """What one dtype gave.

    Parameters
    ----------
    dtype
        The dtype that was recorded: float32 as trained, or a copy rounded after each step.
    steps
        Consecutive steps recorded.
    raw_bytes
        Bytes of one step's parameters.
    share
        Bytes of the segments, keyframes included, to the raw bytes of the steps.
    encode, decode
        MB of raw parameters coded and decoded in a second of one core's time, by the codec alone.
    write
        The same for everything the writer's thread does: coding, checksums, writing.
    """

    dtype: str
    steps: int
    raw_bytes: int
    share: float
    encode: float
    decode: float
    write: float


def measure(training: Training, *, first: int, steps: int, scratch: Path) -> list[StoredShare]:
    """Train, then record steps in every dtype; what is decoded and what is read back must be what was recorded.

    Parameters
    ----------
    training
        A fresh training.
    first
        Updates before the first recorded step.
    steps
        Steps to record: a multiple of the segments' lengths gives the share of a long training.
    scratch
        A folder for the runs.

    Returns
    -------
    list of StoredShare
        One for each dtype.
    """
    for _ in range(first):
        training.step(_ignore)
    records = [_Record(training, dtype, first, scratch / dtype) for dtype in SEGMENT_LENGTHS]
    for _ in range(steps):
        training.step(_ignore)
        for record in records:
            record.add()
    return [record.close() for record in records]


class _Record:
    def __init__(self, training: Training, dtype: str, first: int, run: Path) -> None:
        self._weights = list(training.model.named_parameters())
        self._dtype = dtype
        self._run = run
        self._first = self._number = first
        self._layout = Layout(
            tuple(Slot(PARAMETERS, name, dtype, tuple(weight.shape)) for name, weight in self._weights)
        )
        self._writer = SegmentWriter(run, "benchmark", 1, 0, SEGMENT_LENGTHS[dtype])
        self._coder = StepCoder(dtype, self._layout.sizes[dtype])
        self._decoded = torch.empty(self._layout.sizes[dtype], dtype=getattr(torch, dtype))
        self._seconds = dict.fromkeys(("encode", "decode", "write"), 0.0)
        self._states = [self._copy()]
        self._writer.add(self._states[0], None)

    def _copy(self) -> State:
        vectors = self._layout.allocate()
        with torch.no_grad():
            for view, (_, weight) in zip(self._layout.views(vectors), self._weights, strict=True):
                view.copy_(weight)
        return State(self._number, self._layout, vectors)

    def add(self) -> None:
        self._number += 1
        state = self._copy()
        step = Step(step=self._number - 1, epoch=1, seed=1, learning_rates=(), micro_batches=())
        with self._timed("write"):
            self._writer.add(state, step)
        self._states = [*self._states[-2:], state]
        if len(self._states) == 3:
            before, previous, current = (bits(state.vectors[self._dtype]) for state in self._states)
            with self._timed("encode"):
                coded = self._coder.encode(current, previous, before)
            with self._timed("decode"):
                self._coder.decode(coded, previous, before, bits(self._decoded))
            assert np.array_equal(bits(self._decoded), current)

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        # The time that the thread had a core: others may want it too.
        began = time.thread_time()
        yield
        self._seconds[what] += time.thread_time() - began

    def close(self) -> StoredShare:
        with self._timed("write"):
            self._writer.seal()
        names = list_segments(self._run)
        files = [segment_file(self._run, name.start, name.stop) for name in names]
        last = Segment(files[-1]).parameters(self._number)
        assert all(torch.equal(last[name], weight.to(last[name].dtype)) for name, weight in self._weights)
        steps = self._number - self._first
        megabytes = self._layout.bytes / 1e6
        return StoredShare(
            dtype=self._dtype,
            steps=steps,
            raw_bytes=self._layout.bytes,
            share=sum(file.stat().st_size for file in files) / (steps * self._layout.bytes),
            encode=(steps - 1) * megabytes / self._seconds["encode"],
            decode=(steps - 1) * megabytes / self._seconds["decode"],
            write=steps * megabytes / self._seconds["write"],
        )


def _ignore(batch: Any) -> None:
    del batch
