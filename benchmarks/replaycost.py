"""Replay against a bare loop that does only the same forward and backward passes, step by step in one process.

A turn is a chunk of steps: the engine's own `Replayer.replay`, from the run's segments to shards on the disk. After
each step, with replay's clock stopped, the bare loop does one forward and backward pass, and one forward pass alone,
over the same micro-batches in memory. The ratio of a turn is replay's seconds to those that its evaluations and losses
take in the bare loop, so that what else slows the machine slows both.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peak import peak_bytes, reset_peak, resident_bytes
from recorder.runformat import Run
from replay.job import Job, Task
from replay.shards import Status
from replay.work import Replayer


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One way to replay.

    Parameters
    ----------
    loss_data, rule, check_every
        As on the command line.
    reach
        The most that its ratio should be; None where none is promised.
    """

    loss_data: str
    rule: str
    check_every: int = 1
    reach: float | None = None

    @property
    def name(self) -> str:
        """As on the command line."""
        check = f" --check-every {self.check_every}" if self.check_every > 1 else ""
        return f"{self.rule} on {self.loss_data}{check}"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What one variant gave.

    Parameters
    ----------
    variant
        Its name.
    steps
        Steps replayed.
    seconds
        Seconds of all of them.
    evaluations
        Gradient evaluations of a step.
    residual_median, residual_worst
        Relative to |ΔL|, of the steps that were checked.
    unmet
        Steps that missed the tolerance.
    peak
        Bytes that the process held at most, beside what it held before; for the first variant those of the bare loop's
        model are among them.
    ratio, cpu_ratio
        Median over the turns, of wall time and of the processor time of all threads.
    ratios
        Of every turn, wall time.
    reach
        What `ratio` should be at most.
    spent
        Where the time went: what to seconds of a step.
    """

    variant: str
    steps: int
    seconds: float
    evaluations: float
    residual_median: float
    residual_worst: float
    unmet: int
    peak: int
    ratio: float
    cpu_ratio: float
    ratios: tuple[float, ...]
    reach: float | None
    spent: Mapping[str, float]


@dataclasses.dataclass(slots=True)
class _Clock:
    wall: float = 0.0
    cpu: float = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu


class _Bare:
    """Forward and backward passes, and nothing else."""

    def __init__(self, opened: Replayer) -> None:
        self._workload = opened.workload
        self._device = opened.device
        self._model = self._workload.model().to(self._device).eval()

    def gradients(self, batches: list[list[Any]]) -> None:
        for micro_batches in batches:
            self.forget()
            for micro_batch in micro_batches:
                loss, _ = self._workload.loss(self._model, micro_batch)
                loss.backward()  # type: ignore[no-untyped-call]
        self.wait()

    @torch.no_grad()
    def losses(self, batches: list[list[Any]]) -> None:
        for micro_batches in batches:
            for micro_batch in micro_batches:
                self._workload.loss(self._model, micro_batch)
        self.wait()

    def forget(self) -> None:
        """Let go of the gradients."""
        for parameter in self._model.parameters():
            parameter.grad = None

    def wait(self) -> None:
        """Wait until what is under way on a GPU is done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()


class _Spent:
    """Seconds inside some of the engine's calls, gradients among them."""

    def __init__(self, opened: Replayer) -> None:
        self.seconds = dict.fromkeys(("gradients", "losses", "waiting for the reader", "sums", "writing shards"), 0.0)
        surface, reader = opened.surface, opened.reader
        watched: list[tuple[object, str, str]] = [(surface, "evaluate", "gradients"), (surface, "loss", "losses")]
        watched += [(folder, "write", "writing shards") for folder in opened.folders.values()]
        for owner, call, name in watched:
            setattr(owner, call, self._timed(name, getattr(owner, call)))
        reader.steps = self._streamed("waiting for the reader", reader.steps)  # type: ignore[method-assign]

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*given, **options)
            finally:
                self.seconds[name] += time.perf_counter() - began

        return timed

    def _streamed(self, name: str, call: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def streamed(*given: Any) -> Iterator[Any]:
            stream, end = call(*given), object()
            following = self._timed(name, next)
            while (item := following(stream, end)) is not end:
                yield item

        return streamed


class _Arm:
    """One variant, its engine, and what its turns gave."""

    def __init__(self, opened: Replayer, variant: Variant, bare: _Bare) -> None:
        self.variant, self._opened, self._bare = variant, opened, bare
        (self._name,) = opened.loss_data
        self.spent = _Spent(self._opened)
        self.clocks: list[_Clock] = []
        self.ratios: list[tuple[float, float]] = []
        self.entries: list[Mapping[str, Any]] = []

    def turn(self, start: int, stop: int) -> None:
        """Replay a chunk, and after each step the bare loop on its micro-batches, with replay's clock stopped."""
        gradients, losses, stopped = _Clock(), _Clock(), _Clock()

        def beside(t: int) -> None:
            self._bare.wait()
            with stopped.running():
                batches = self._batches(t, t + 1)
                with gradients.running():
                    self._bare.gradients(batches)
                if self._missing_ends:
                    with losses.running():
                        self._bare.losses(batches)
                self._bare.forget()

        whole = _Clock()
        self._opened.on_step = beside
        with whole.running():
            self._replay(start, stop)
        self._opened.on_step = lambda t: None
        entries = self._opened.folders[self._name].read_per_step(start, stop)
        steps = stop - start
        evaluations, forward = float(entries["evaluations"].sum()) / steps, self._losses(entries) / steps
        replay = _Clock(whole.wall - stopped.wall, whole.cpu - stopped.cpu)
        self.clocks.append(replay)
        self.entries.append(entries)
        self.ratios.append(
            (
                replay.wall / (evaluations * gradients.wall + forward * losses.wall),
                replay.cpu / (evaluations * gradients.cpu + forward * losses.cpu),
            )
        )

    def warm_up(self, step: int) -> None:
        """Allocate memory and load what is loaded at first use, untimed."""
        self._replay(step, step + 1)
        batches = self._batches(step, step + 1)
        self._bare.gradients(batches)
        self._bare.losses(batches)
        self.spent.seconds = dict.fromkeys(self.spent.seconds, 0.0)

    def _replay(self, start: int, stop: int) -> None:
        self._opened.replay(Task(start=start, stop=stop, loss_data=(self._name,)))

    def _batches(self, start: int, stop: int) -> list[list[Any]]:
        data = self._opened.loss_data[self._name]
        return [list(data.micro_batches(self._opened.run.step(t))) for t in range(start, stop)]

    @property
    def _missing_ends(self) -> int:
        # Of a step: where the rule has no node, and a forward pass gives the loss.
        return (not self._opened.rule.starts_at_start) + (not self._opened.rule.ends_at_end)

    def _losses(self, entries: Mapping[str, Any]) -> int:
        return self._missing_ends * int((entries["status"] != Status.NOT_CHECKED).sum())

    def cost(self, peak: int) -> Cost:
        column = {name: np.concatenate([entry[name] for entry in self.entries]) for name in self.entries[0]}
        checked = column["status"] != Status.NOT_CHECKED
        change = np.abs(column["loss_end"] - column["loss_start"])[checked]
        residual = np.abs(column["residual"][checked])
        relative = np.divide(residual, change, out=np.zeros_like(residual), where=change > 0)
        steps, seconds = len(checked), sum(clock.wall for clock in self.clocks)
        named = {name: spent / steps for name, spent in self.spent.seconds.items()}
        # What is left is the sums, and a little of everything.
        named["sums"] = seconds / steps - sum(named.values())
        return Cost(
            variant=self.variant.name,
            steps=steps,
            seconds=seconds,
            evaluations=float(column["evaluations"].sum()) / steps,
            residual_median=float(np.median(relative)) if relative.size else float("nan"),
            residual_worst=float(relative.max()) if relative.size else float("nan"),
            unmet=int(((column["status"] == Status.TOLERANCE_NOT_MET) | (column["status"] == Status.NOT_FINITE)).sum()),
            peak=peak,
            ratio=statistics.median(ratio for ratio, _ in self.ratios),
            cpu_ratio=statistics.median(ratio for _, ratio in self.ratios),
            ratios=tuple(ratio for ratio, _ in self.ratios),
            reach=self.variant.reach,
            spent=named,
        )


def measure(
    run: Path, variants: tuple[Variant, ...], *, chunk: int, turns: int, threads: int, device: str
) -> list[Cost]:
    """Measure the variants of one case.

    Parameters
    ----------
    run
        With chunk · turns + 1 steps.
    variants
        What to measure.
    chunk
        Steps of a turn, and of a shard.
    turns
        Of each variant.
    threads
        Of torch, for replay and for the bare loop.
    device
        ``cpu`` or ``cuda``.

    Returns
    -------
    list of Cost
        In the order of the variants.
    """
    run_id = Run(run).manifest.run_id
    bare: _Bare | None = None
    costs = []
    for variant in variants:
        before = resident_bytes()
        reset_peak()
        job = Job(
            run=str(run), run_id=run_id, loss_data=(variant.loss_data,), rule=variant.rule, rtol=1e-3, atol=0.0,
            chunk=chunk, device=device, dtype=None, threads=threads, workload="recorded", data=None,
            check_every=variant.check_every,
        )  # fmt: skip
        engine = Replayer(job)
        bare = bare or _Bare(engine)
        arm = _Arm(engine, variant, bare)
        arm.warm_up(chunk * turns)
        for turn in range(turns):
            arm.turn(turn * chunk, (turn + 1) * chunk)
        costs.append(arm.cost(peak_bytes() - before))
    return costs
