"""Several trainings that are the same but for one thing, timed in turns in one process.

Blocks of steps of one training follow blocks of another, in an order drawn anew for every round, so that whatever else
slows the machine slows all of them. What a training leaves to be done in the background is waited for after its block,
so that none of it falls into the next one's; that time is kept apart, as `Timing.drains`.

The first step of a block does not count for the median: the background has nothing to do yet, and the processor's
cache is full of another training's parameters. From the second on a block is what a long training is. All steps and
all drains count for `Timing.seconds`, the strictest sum: a real training drains only once.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One of the trainings.

    Parameters
    ----------
    step
        Make one update.
    drain
        Wait for what is left to be done in the background.
    end
        Called instead of `drain` after the last block.
    """

    step: Callable[[], None]
    drain: Callable[[], None] = lambda: None
    end: Callable[[], None] = lambda: None


@dataclass(kw_only=True, slots=True)
class Timing:
    """How long the steps of one training took.

    Parameters
    ----------
    steps
        Seconds of every step but the first of each block.
    cpu
        Processor seconds of the whole process in the same steps.
    first_steps
        Seconds of the first step of each block.
    drains
        Seconds to wait after each block but the last.
    end
        Seconds to wait after the last block.
    """

    steps: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    first_steps: list[float] = field(default_factory=list)
    drains: list[float] = field(default_factory=list)
    end: float = 0.0

    @property
    def median(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.steps)

    @property
    def median_cpu(self) -> float:
        """Median processor seconds of a step, all threads together."""
        return statistics.median(self.cpu)

    @property
    def seconds(self) -> float:
        """Seconds of everything, drains included."""
        return sum(self.steps) + sum(self.first_steps) + sum(self.drains) + self.end


def interleave(arms: Mapping[str, Arm], *, steps: int, block: int, seed: int) -> dict[str, Timing]:
    """Time trainings in turns.

    Parameters
    ----------
    arms
        Name to training. Each makes one more step before the timing, in which memory is allocated.
    steps
        Steps of each.
    block
        Steps in a row of the same training, at least 2.
    seed
        Decides the order of the blocks within each round.

    Returns
    -------
    dict of str to Timing
        By the names of `arms`.
    """
    order = random.Random(seed)  # noqa: S311 (no secret)
    names = list(arms)
    timings = {name: Timing() for name in names}
    for name in names:
        arms[name].step()
        arms[name].drain()
    rounds = max(steps // block, 1)
    for turn in range(rounds):
        order.shuffle(names)
        for name in names:
            _time_block(arms[name], timings[name], block, last=turn == rounds - 1)
    return timings


def _time_block(arm: Arm, timing: Timing, block: int, *, last: bool) -> None:
    for position in range(block):
        cpu, began = time.process_time(), time.perf_counter()
        arm.step()
        seconds = time.perf_counter() - began
        if position == 0:
            timing.first_steps.append(seconds)
        else:
            timing.steps.append(seconds)
            timing.cpu.append(time.process_time() - cpu)
    began = time.perf_counter()
    if last:
        arm.end()
        timing.end = time.perf_counter() - began
    else:
        arm.drain()
        timing.drains.append(time.perf_counter() - began)
