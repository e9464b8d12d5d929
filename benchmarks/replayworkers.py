"""Two of replay's workers against one: whole commands, in turns."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from recorder.errors import UsageError

LOSS_DATA = "probe:128"
CHUNK = 8


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Clock:
    """How long one command took.

    Parameters
    ----------
    whole
        Seconds from its start to its end.
    pace
        Seconds of a step in the steady part: from when as many chunks are on the disk as there are workers until the
        last one is.
    """

    whole: float
    pace: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """What the commands took, by the number of their workers.

    Parameters
    ----------
    steps
        Of the run.
    one, two
        Of every turn.
    """

    steps: int
    one: tuple[Clock, ...]
    two: tuple[Clock, ...]

    @property
    def whole_ratio(self) -> float:
        """How many times as fast two workers are, start and self-check included: median over the turns."""
        return statistics.median(one.whole / two.whole for one, two in zip(self.one, self.two, strict=True))

    @property
    def steady_ratio(self) -> float:
        """The same of the steady part."""
        return statistics.median(one.pace / two.pace for one, two in zip(self.one, self.two, strict=True))


def measure(run: Path, *, steps: int, turns: int, seed: int) -> Workers:
    """Replay a run with one worker and with two.

    Parameters
    ----------
    run
        With that many steps.
    steps
        How many; at least four chunks of them.
    turns
        Commands of each kind.
    seed
        Decides their order.

    Returns
    -------
    Workers
        What they took.
    """
    order = random.Random(seed)  # noqa: S311 (no secret)
    clocks: dict[int, list[Clock]] = {1: [], 2: []}
    for _ in range(turns):
        for workers in order.sample((1, 2), 2):
            clocks[workers].append(_replay(run, workers))
    return Workers(steps=steps, one=tuple(clocks[1]), two=tuple(clocks[2]))


def _replay(run: Path, workers: int) -> Clock:
    shutil.rmtree(run / "shards", ignore_errors=True)
    command = [sys.executable, "-m", "replay", "--run", str(run), "--loss-data", LOSS_DATA, "--rule", "simpson"]
    # Any step is in balance: whether it is decides nothing here.
    command += ["--chunk", str(CHUNK), "--atol", "1e9", "--device", "cpu", "--workload", "recorded"]
    command += ["--threads", "1", "--workers", str(workers)]
    began = time.perf_counter()
    found = subprocess.run(  # noqa: S603 (our own program)
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    whole = time.perf_counter() - began
    if found.returncode:
        message = f"{' '.join(command[1:])} ended with exit code {found.returncode}: {found.stderr[-2000:]}"
        raise UsageError(message)
    written = sorted(shard.stat().st_mtime for shard in (run / "shards").glob("*/*.safetensors"))
    return Clock(whole=whole, pace=(written[-1] - written[workers - 1]) / ((len(written) - workers) * CHUNK))
