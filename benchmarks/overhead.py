"""What the recorder costs: the same training with it, without it, and with a bare ``save_file`` every step."""

from __future__ import annotations

import itertools
import shutil
import statistics
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import recorder
from benchmarks.interleaved import Arm, interleave
from benchmarks.trainings import Training
from recorder.parameters import UnmappedParameterWarning

WRITER_THREAD = "lossledger-recorder"


@dataclass(frozen=True, kw_only=True, slots=True)
class Overhead:
    """What one case gave.

    Parameters
    ----------
    steps
        Steps of each training, all blocks together.
    raw_bytes
        Bytes of all parameters.
    stored_bytes
        Bytes the recorder wrote for a step, on average.
    step, recorded_step, saved_step
        Median seconds of a step without the recorder, with it, with ``save_file``.
    ratio, saved_ratio
        ``recorded_step`` and ``saved_step`` to ``step``.
    whole_ratio
        Seconds of all recorded steps, and of waiting after each block until everything was on the disk, to those of all
        steps without the recorder.
    hooks
        Median seconds of a step that the training spends in the recorder's own calls; the copy is in there.
    waited
        Seconds of those in which it waited for the writer, per step on average.
    writer_cpu
        Processor seconds of the writer's thread, per step on average.
    cpu, recorded_cpu
        Median processor seconds of a step, all threads, without and with the recorder.
    drain
        Seconds to end the recording after the last step.
    same
        Whether all three trainings ended with the same parameters, bit for bit.
    """

    steps: int
    raw_bytes: int
    stored_bytes: float
    step: float
    recorded_step: float
    saved_step: float
    ratio: float
    saved_ratio: float
    whole_ratio: float
    hooks: float
    waited: float
    writer_cpu: float
    cpu: float
    recorded_cpu: float
    drain: float
    same: bool


def measure(make: Callable[[], Training], *, steps: int, block: int, seed: int, scratch: Path) -> Overhead:
    """Measure one case.

    Parameters
    ----------
    make
        Makes the training; called three times.
    steps, block, seed
        As for `benchmarks.interleaved.interleave`.
    scratch
        A folder on the disk that runs are recorded to; what is written there is removed again.

    Returns
    -------
    Overhead
        The result.
    """
    plain, recorded, saved = make(), make(), make()
    spy = _Recorded(recorded, scratch / "run")
    arms = {
        "plain": Arm(step=lambda: plain.step(_ignore)),
        "recorded": Arm(step=spy.step, drain=spy.drain, end=spy.end),
        "saved": _saving(saved, scratch / "saved"),
    }
    # The parameters need no place in a network's anatomy here.
    with warnings.catch_warnings(action="ignore", category=UnmappedParameterWarning):
        timings = interleave(arms, steps=steps, block=block, seed=seed)
    without, with_recorder, with_save = (timings[name] for name in ("plain", "recorded", "saved"))
    result = Overhead(
        steps=len(without.steps) + len(without.first_steps),
        raw_bytes=sum(weight.nbytes for weight in plain.model.parameters()),
        stored_bytes=spy.stored_bytes,
        step=without.median,
        recorded_step=with_recorder.median,
        saved_step=with_save.median,
        ratio=with_recorder.median / without.median,
        saved_ratio=with_save.median / without.median,
        whole_ratio=with_recorder.seconds / without.seconds,
        hooks=statistics.median(spy.hooks),
        waited=spy.waited,
        writer_cpu=spy.writer_cpu,
        cpu=without.median_cpu,
        recorded_cpu=with_recorder.median_cpu,
        drain=with_recorder.end,
        same=_same(plain, recorded) and _same(plain, saved),
    )
    shutil.rmtree(scratch / "run")
    return result


class _Recorded:
    # Hooks registered around the recorder's own, before and after it, tell how long a step spends in them.
    def __init__(self, training: Training, run: Path) -> None:
        self._training = training
        self._stamps: list[float] = []
        self._steps = 0
        self._cpu = (0.0, 0)
        self.hooks: list[float] = []
        self._stamped()
        self.recording = recorder.watch(training.model, training.optimizer, run=run, strict=True)
        self._stamped()

    def _stamped(self) -> None:
        self._training.optimizer.register_step_pre_hook(self._stamp)
        self._training.optimizer.register_step_post_hook(self._stamp)

    def _stamp(self, *_: Any) -> None:
        self._stamps.append(time.perf_counter())

    def step(self) -> None:
        self._stamps.clear()
        self._training.step(self._announce)
        announced, announced_end, before, before_end, after, after_end = self._stamps
        self.hooks.append((announced_end - announced) + (before_end - before) + (after_end - after))
        self._steps += 1

    def _announce(self, batch: Any) -> None:
        self._stamp()
        self.recording.batch(None, batch)
        self._stamp()

    def drain(self) -> None:
        self.recording.flush()
        self._cpu = (_cpu_seconds(WRITER_THREAD), self._steps)

    def end(self) -> None:
        # The thread ends, and its clock with it: its last block is taken to be like those before.
        self.recording.close()

    @property
    def writer_cpu(self) -> float:
        seconds, steps = self._cpu
        return seconds / steps

    @property
    def waited(self) -> float:
        return self.recording.waited / self._steps

    @property
    def stored_bytes(self) -> float:
        return sum(file.stat().st_size for file in self.recording.run.rglob("*.safetensors")) / self._steps


def _cpu_seconds(thread_name: str) -> float:
    idents = [thread.ident for thread in threading.enumerate() if thread.name == thread_name]
    return sum(time.clock_gettime(time.pthread_getcpuclockid(ident)) for ident in idents if ident is not None)


def _saving(training: Training, folder: Path) -> Arm:
    folder.mkdir()
    numbers = itertools.count()

    def step() -> None:
        training.step(_ignore)
        save_file(_parameters(training), folder / f"{next(numbers)}.safetensors")

    def drain() -> None:
        # Before the disk has them: what is written in the background then would slow the others.
        for file in folder.iterdir():
            file.unlink()

    return Arm(step=step, drain=drain, end=drain)


def _ignore(batch: Any) -> None:
    del batch


def _parameters(training: Training) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in training.model.named_parameters()}


def _same(one: Training, other: Training) -> bool:
    theirs = _parameters(other)
    return all(torch.equal(weight, theirs[name]) for name, weight in _parameters(one).items())
