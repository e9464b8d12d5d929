"""A run that is replayed within milliseconds a step, a workload that misbehaves at chosen steps, and the command."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import recorder
from replay.__main__ import main
from replay.work import replayer

Command = subprocess.Popen[str]

ROOT = Path(__file__).parents[2]
STEPS = 16
"""Of every run here; each is a chunk of its own, so that many can be lost."""
LOSS_DATA: tuple[str, ...] = ("batch", "probe:6")
DEEDS = "LOSSLEDGER_TEST_DEEDS"
"""Environment: what to do in a worker at which step, such as ``segfault 5, loop 7``."""
SECONDS = "LOSSLEDGER_TEST_SECONDS"
"""Environment: how long each loss takes in a worker."""
SIDE_LOG = "LOSSLEDGER_TEST_SIDE_LOG"
"""Environment: where each worker writes down the steps whose loss it has taken."""

_FIRST = 1000
"""Index of the first example of step 0, by which the batch of a step is known from any of the probe's."""


def _forever() -> None:
    while True:
        pass


def _too_much() -> None:
    torch.empty(1 << 46)


DEED: Mapping[str, Callable[[], Any]] = {
    "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "memory": _too_much,
    "exception": lambda: [][0],
    "loop": _forever,
}


@dataclasses.dataclass(frozen=True)
class Small:
    """Regression by five parameters on numbers that depend on nothing but their step."""

    examples: int = 12

    def model(self) -> nn.Module:
        torch.manual_seed(4)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def indices(self, split: str) -> Sequence[int]:
        return range(self.examples)

    def batch(self, indices: Sequence[int], *, split: str, epoch: int) -> Any:
        x = torch.stack([torch.randn(3, generator=torch.Generator().manual_seed(int(index))) for index in indices])
        return {"x": x, "step": torch.tensor(int(indices[0]) - _FIRST)}

    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, float]:
        if sys.argv[0] == "-c" or "dask" in sys.argv[0]:  # in a worker, of ours or of dask's own command
            _misbehave(int(batch["step"]))
        x = batch["x"]
        return (model(x).squeeze(-1) - x.prod(-1)).square().sum(), float(len(x))


def _misbehave(step: int) -> None:
    if SIDE_LOG in os.environ:
        with Path(os.environ[SIDE_LOG]).open("a") as log:
            log.write(f"{step}\n")
    time.sleep(float(os.environ.get(SECONDS, "0")))
    for deed in filter(None, os.environ.get(DEEDS, "").split(", ")):
        what, at = deed.split()
        if int(at) == step:
            DEED[what]()


def workload() -> Small:
    """What the runs name."""
    return Small()


def record(run: Path, steps: int = STEPS) -> None:
    """Record a short training."""
    task = workload()
    model = task.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with recorder.watch(
        model, optimizer, run=run, workload="tests.reliability.replays:workload", segment_steps=4
    ) as rec:
        for step in range(steps):
            indices = [_FIRST + step, 5 * step % 12]
            batch = task.batch(indices, split="train", epoch=1)
            rec.batch(indices, batch)
            loss_sum, count = task.loss(model, batch)
            rec.loss(loss_sum, count)
            (loss_sum / count).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()


def arguments(run: Path, *further: str) -> list[str]:
    """The command's arguments; what comes further wins."""
    loss_data = [text for name in LOSS_DATA for text in ("--loss-data", name)]
    chosen = ["--workload", "recorded", "--atol", "1", "--chunk", "1", *loss_data]
    return ["--run", str(run), *chosen, *further]


def start(run: Path, *further: str, **environment: str) -> Command:
    """Start the command in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "replay", *arguments(run, *further)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        start_new_session=True,
    )


def here(run: Path, *further: str) -> int:
    """The command in this process, which spares it the start."""
    replayer.cache_clear()
    try:
        return main(arguments(run, *further))
    finally:
        replayer.cache_clear()


def finish(process: Command, seconds: float) -> tuple[int, str]:
    """Wait until a command ends, which it must; return its exit code and what it said."""
    try:
        _, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _, said = process.communicate()
        message = f"still there after {seconds} s\n{said}"
        raise AssertionError(message) from None
    return process.returncode, said


def workers(driver: int) -> list[int]:
    """Process ids of the workers that a command has started and that are not dead."""
    found = []
    for pid in _children(driver):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"replay.cluster" in command and alive(pid):
            found.append(pid)
    return found


def alive(pid: int) -> bool:
    """Whether a process is there, and not only its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def told_missing(line: str) -> int:
    """How many steps a command says are missing."""
    ranges = line.partition("; missing: steps ")[2].partition(". What is finished")[0]
    return sum(int(stop) - int(start) + 1 for start, stop in (part.split("-") for part in ranges.split(", ")))


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A recorded run, and what an undisturbed replay in one process makes of it."""

    run: Path
    hashes: dict[str, str]

    def copy(self, to: Path) -> Path:
        """The run alone, to be replayed elsewhere."""
        return Path(shutil.copytree(self.run, to, ignore=shutil.ignore_patterns("shards")))


def _children(driver: int) -> Iterator[int]:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if int((process / "stat").read_text().rpartition(")")[2].split()[1]) == driver:
                yield int(process.name)
        except OSError:
            continue  # it has just gone


def shard_files(run: Path) -> list[Path]:
    """The shards that are there, of all loss data."""
    return sorted(run.glob("shards/*/*.safetensors"))


def hashes(run: Path) -> dict[str, str]:
    """SHA-256 of every shard and of the settings beside it."""
    files = sorted(file for file in run.glob("shards/*/*") if not file.name.startswith("."))
    return {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
