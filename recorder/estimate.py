"""What a recording will cost, before it has cost anything: bytes, disk, time."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from recorder.codec import StepCoder, bit_dtype
from recorder.layout import Layout
from recorder.selection import StepSelection

STORED_SHARE = {"float32": 0.55, "bfloat16": 0.17, "float16": 0.28}
"""Stored bytes to raw bytes, keyframes included, at most: what `benchmarks/recorder.py` checks. Else 1."""

BATCH_SHARE = 0.01
"""Batch tensors, indices and random states, to raw bytes."""

_SAMPLE_ENTRIES = 1 << 18
_SAMPLE_ROUNDS = 3


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """The expected cost of a recording.

    Parameters
    ----------
    raw_bytes
        Bytes of one θ.
    step_bytes
        Expected bytes of a recorded step on the disk.
    steps
        Steps to be recorded; None where the training's length is not known.
    coding_seconds
        Seconds of one core to code a step, beside the training.
    copy_seconds
        Seconds to copy a θ, which the training waits for on a CPU.
    free_bytes
        Free space on the disk of the run; None where no folder is known.
    """

    raw_bytes: int
    step_bytes: float
    steps: int | None
    coding_seconds: float
    copy_seconds: float
    free_bytes: int | None

    @property
    def total_bytes(self) -> float | None:
        """Expected bytes of the whole run; None where the number of steps is not known."""
        return None if self.steps is None else self.steps * self.step_bytes

    def slowdown(self, step_seconds: float) -> float:
        """Say by what factor training slows down, at most.

        Parameters
        ----------
        step_seconds
            Duration of a step without recorder.

        Returns
        -------
        float
            1 means not at all. Coding counts only as far as it takes longer than the step, for it runs beside it; a
            training that fills all cores loses what the coding takes of them.
        """
        return max(step_seconds + self.copy_seconds, self.coding_seconds) / step_seconds

    def text(self) -> str:
        """Say it in one line.

        Returns
        -------
        str
            Bytes per step, in all, free; seconds.
        """
        total = "" if self.total_bytes is None else f", {_size(self.total_bytes)} for {self.steps:,} steps"
        free = "" if self.free_bytes is None else f" ({_size(self.free_bytes)} free)"
        if self.total_bytes is not None and self.free_bytes is not None and self.total_bytes > self.free_bytes:
            free = f" (more than the {_size(self.free_bytes)} that are free: select fewer steps, or set a quota)"
        return (
            f"a step has {_size(self.raw_bytes)} of parameters and takes about {_size(self.step_bytes)} on the disk"
            f"{total}{free}; copying it takes {self.copy_seconds * 1e3:.3g} ms of the training, coding it "
            f"{self.coding_seconds * 1e3:.3g} ms of one core beside it: steps shorter than that wait for it"
        )


def estimate(
    entries: Mapping[str, int],
    *,
    selection: StepSelection,
    first_step: int = 0,
    updates: int | None = None,
    folder: Path | None = None,
) -> Estimate:
    """Estimate what a recording costs; the codec and a copy are timed on a sample, for a few milliseconds.

    Parameters
    ----------
    entries
        Dtype to number of recorded entries.
    selection
        Which steps are recorded.
    first_step
        Where the recording begins.
    updates
        Where the training ends; None if that is not known.
    folder
        Where the run will stand, or a folder above it.

    Returns
    -------
    Estimate
        The expected cost.
    """
    raw = {dtype: size * bit_dtype(dtype).itemsize for dtype, size in entries.items()}
    stop = updates if updates is not None else None if selection.last is None else selection.last + 1
    copied, coded = _seconds_per_byte()
    total = sum(raw.values())
    return Estimate(
        raw_bytes=total,
        step_bytes=sum(size * (STORED_SHARE.get(dtype, 1.0) + BATCH_SHARE) for dtype, size in raw.items()),
        steps=None if stop is None else selection.count(first_step, stop),
        coding_seconds=total * coded,
        copy_seconds=total * copied,
        free_bytes=None if folder is None else shutil.disk_usage(_existing(folder)).free,
    )


def describe_cost(
    layout: Layout,
    selection: StepSelection,
    first_step: int,
    run: Path,
    *,
    updates: int | None = None,
    step_seconds: float | None = None,
) -> str:
    """Say what a recording that begins will cost.

    Parameters
    ----------
    layout
        What is recorded with every step.
    selection
        Which steps are recorded.
    first_step
        The first one.
    run
        The run's folder.
    updates
        Where the training ends, if that is known.
    step_seconds
        How long the first step has taken so far, if that is known.

    Returns
    -------
    str
        One line.
    """
    cost = estimate(layout.sizes, selection=selection, first_step=first_step, updates=updates, folder=run)
    slowdown = ""
    if step_seconds:
        slowdown = (
            f"; expected slowdown, at the pace of the first step ({step_seconds:.3g} s): "
            f"a factor of {cost.slowdown(step_seconds):.3f}"
        )
    return f"recording {selection.text} steps from {first_step} into {run}: {cost.text()}{slowdown}"


def _seconds_per_byte() -> tuple[float, float]:
    # A copy and the codec, on parameters that move as in training: by a thousandth of themselves.
    random = np.random.default_rng(0)
    before = random.normal(0.0, 0.02, _SAMPLE_ENTRIES).astype(np.float32)
    now = before * random.normal(1.0, 1e-3, _SAMPLE_ENTRIES).astype(np.float32)
    coder = StepCoder("float32", _SAMPLE_ENTRIES)
    target = np.empty_like(now)
    copies, codings = [], []
    for _ in range(_SAMPLE_ROUNDS):
        began = time.perf_counter()
        np.copyto(target, now)
        copied = time.perf_counter()
        coder.encode(now.view(np.uint32), before.view(np.uint32), None)
        copies.append(copied - began)
        codings.append(time.perf_counter() - copied)
    return min(copies) / now.nbytes, min(codings) / now.nbytes


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _size(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
