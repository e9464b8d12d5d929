"""A training whose size is chosen, and its replay in a process of its own that tells how much memory it took."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import recorder
from recorder.parameters import UnmappedParameterWarning
from recorder.runformat import Run
from replay.cost import bytes_in_memory
from replay.job import Job, plan
from replay.work import Replayer

WIDTH = 512
CHUNK = 4


@dataclasses.dataclass(frozen=True)
class Stack:
    """Layers of a quarter of a million entries each, on so few examples that a pass takes next to nothing (A ≈ 0)."""

    layers: int

    def model(self) -> nn.Module:
        return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(self.layers)))

    def indices(self, split: str) -> Sequence[int]:
        return range(64)

    def batch(self, indices: Sequence[int], *, split: str, epoch: int) -> Any:
        return torch.randn(len(indices), WIDTH, generator=torch.Generator().manual_seed(int(sum(indices))))

    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, float]:
        # Each layer by itself: one upon the other, so many would lead to no gradient.
        errors = [(layer(batch).tanh() - batch).square().sum() for layer in model.children()]
        return torch.stack(errors).sum(), len(batch)


def tiny() -> Stack:
    return Stack(5)


def small() -> Stack:
    return Stack(16)


def middle() -> Stack:
    return Stack(48)


def large() -> Stack:
    return Stack(144)


def record(run: Path, size: str, steps: int) -> None:
    """Train and record; the updates are large, so that the adaptive rule refines."""
    torch.manual_seed(1)
    task: Stack = globals()[size]()
    model = task.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    with warnings.catch_warnings(action="ignore", category=UnmappedParameterWarning):
        watch = recorder.watch(model, optimizer, run=run, workload=f"{__name__}:{size}")
        with watch as recording:
            for step in range(steps):
                batch = task.batch([step, step + 1], split="train", epoch=1)
                recording.batch([step, step + 1], batch)
                loss, count = task.loss(model, batch)
                (loss / count).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def replay(run: Path, rule: str, loss_data: str, rtol: float) -> dict[str, Any]:
    """Replay all steps; say what was foretold, and what each chunk took at most."""
    torch.set_num_threads(1)
    layer = nn.Linear(64, 64)  # libraries that come with the first pass
    torch.autograd.grad(layer(torch.zeros(4, 64)).sum(), list(layer.parameters()))
    before = _resident("VmRSS")
    opened = Replayer(
        Job(
            run=str(run), run_id=Run(run).manifest.run_id, loss_data=(loss_data,), rule=rule, rtol=rtol, atol=0.0,
            chunk=CHUNK, device="cpu", dtype=None, threads=1, workload="recorded", data=None,
        )
    )  # fmt: skip
    tasks = plan(opened.job, opened.folders, opened.run)
    taken, evaluations = [], 0
    for task in tasks:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        opened.replay(task)
        (folder,) = opened.folders.values()
        evaluations += int(folder.read_per_step(task.start, task.stop)["evaluations"].sum())
        taken.append(_resident("VmHWM") - before)
    foretold = max(bytes_in_memory(opened, task) for task in tasks)
    return {"foretold": foretold, "taken": taken, "evaluations": evaluations}


if __name__ == "__main__":
    path, asked_rule, asked_loss_data, asked_rtol = sys.argv[1:]
    sys.stdout.write(json.dumps(replay(Path(path), asked_rule, asked_loss_data, float(asked_rtol))))
