"""Trainings of two processes, told to start by the tests: ``python -m tests.two_processes FOLDER RANK SCENARIO...``.

Both processes meet through a file, so that no port can clash. What each saw stands in FOLDER/SCENARIO-RANK.pt.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import recorder
from recorder.errors import UsageError
from recorder.recording import Recording
from tests.cases import LanguageModelling

PROCESSES = 2
STEPS = 5
KILLED_AT = 3
QUOTA = 250_000

Theta = dict[str, torch.Tensor]


class Training:
    """`LanguageModelling` on two processes; process 1 has a micro-batch more than process 0 in every step."""

    def __init__(self, rank: int, *, sharded: bool = False) -> None:
        torch.manual_seed(1)
        self.rank = rank
        self.task = LanguageModelling()
        self.sharded = sharded
        if sharded:
            mesh = init_device_mesh("cpu", (PROCESSES,))
            inner: Any = self.task.model()
            for layer in inner.decoder.layers:
                fully_shard(layer, mesh=mesh)
            self.model: Any = fully_shard(inner, mesh=mesh)
        else:
            self.model = DistributedDataParallel(self.task.model())
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.examples = torch.Generator().manual_seed(10 + rank)
        torch.manual_seed(20 + rank)
        self.seen = [self.theta()]
        self.indices: list[list[torch.Tensor]] = []
        self.losses: list[list[float]] = []
        self.random: list[list[torch.Tensor]] = []
        self.norms: list[float] = []

    def theta(self) -> Theta:
        named = (self.model if self.sharded else self.model.module).named_parameters()
        return {name: (tensor.full_tensor() if self.sharded else tensor).detach().clone() for name, tensor in named}

    def step(self, rec: Recording | None) -> None:
        micro_batches = 2 if self.sharded else 2 + self.rank  # shards are exchanged in every forward pass
        self.indices.append([])
        self.losses.append([])
        self.random.append([])
        counts = torch.zeros(())
        for position in range(micro_batches):
            torch.rand(1)  # as dropout would, so that every micro-batch has a random state of its own
            indices = torch.randperm(48, generator=self.examples)[: 4 + position]
            batch = self.task.batch(indices.tolist(), split="train", epoch=1)
            self.indices[-1].append(indices)
            self.random[-1].append(torch.get_rng_state())
            if rec is not None:
                rec.batch(indices, batch)
            last = position == micro_batches - 1
            if self.sharded:
                self.model.set_requires_gradient_sync(last)
            with contextlib.nullcontext() if last or self.sharded else self.model.no_sync():
                loss_sum, predictions = self.task.loss(self.model, batch)
                loss_sum.backward()  # type: ignore[no-untyped-call]
            if rec is not None:
                rec.loss(loss_sum, predictions)
            self.losses[-1].append(loss_sum.item())
            counts += float(predictions)
        distributed.all_reduce(counts)
        gradients = [parameter.grad for parameter in self.model.parameters()]
        for gradient in gradients:
            gradient.mul_(PROCESSES / counts.item())  # both kinds of data parallelism average over processes
        norm = torch.nn.utils.get_total_norm(gradients)
        self.norms.append(float(norm.full_tensor() if self.sharded else norm))  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seen.append(self.theta())

    def told(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("seen", "indices", "losses", "random", "norms")}


def watch(training: Training, run: Path, **arguments: Any) -> Recording:
    given = {"workload": "tests.cases:workload", **arguments}
    return recorder.watch(training.model, training.optimizer, run=run, **given)


def whole(folder: Path, rank: int) -> dict[str, Any]:
    """A training from beginning to end; its processes seal their segments at different steps."""
    training = Training(rank)
    with watch(training, folder / "run", segment_steps=2 + rank) as rec:
        for _ in range(STEPS):
            training.step(rec)
    return training.told()


def unrecorded(folder: Path, rank: int) -> dict[str, Any]:
    """The same without the recorder."""
    training = Training(rank)
    for _ in range(STEPS):
        training.step(None)
    return training.told()


def restarted(folder: Path, rank: int) -> dict[str, Any]:
    """A training that is restarted from its state before step 3, after it had done step 3 too."""
    training = Training(rank)
    with watch(training, folder / "run") as rec:
        for step in range(4):
            if step == 3:
                saved = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
            training.step(rec)
    training.model.load_state_dict(saved)
    training.seen[4:] = []
    for told in (training.indices, training.losses, training.random):
        told[3:] = []
    with watch(training, folder / "run", first_step=3) as rec:
        training.step(rec)
        training.step(rec)
    return training.told()


def refused(folder: Path, rank: int) -> dict[str, Any]:
    """A folder that process 0 refuses."""
    run = folder / "run"
    run.mkdir(exist_ok=True)
    (run / "thesis.tex").touch()
    return {"error": _error(lambda: watch(Training(rank), run))}


def joined_wrongly(folder: Path, rank: int) -> dict[str, Any]:
    """A restart with other parameters: process 0 notices at the first step, and both end there."""
    training = Training(rank)
    with watch(training, folder / "run") as rec:
        training.step(rec)
    training.step(None)
    with watch(training, folder / "run", first_step=1) as rec:
        return {"error": _error(lambda: training.step(rec))}


def failed_before_the_first_step(folder: Path, rank: int) -> dict[str, Any]:
    """Process 1 tells something wrong and records no more; the training goes on in both."""
    training = Training(rank)
    with warnings.catch_warnings(record=True) as caught, watch(training, folder / "run") as rec:
        if rank == 1:
            rec.loss(1.0, 1)
        for _ in range(STEPS):
            training.step(rec)
    return {**training.told(), "warnings": [str(warning.message) for warning in caught]}


def stopped_early(folder: Path, rank: int) -> dict[str, Any]:
    """Process 1 closes its recording after three steps."""
    training = Training(rank)
    with watch(training, folder / "run") as rec:
        for step in range(STEPS):
            if rank == 1 and step == 3:
                rec.close()
            training.step(rec)
    return training.told()


def within_quota(folder: Path, rank: int) -> dict[str, Any]:
    """A training whose run may not grow to its whole length."""
    training = Training(rank)
    recording = watch(training, folder / "run", segment_steps=1, quota=QUOTA)
    with warnings.catch_warnings(record=True) as caught, recording as rec:
        for _ in range(2 * STEPS):
            training.step(rec)
    return {**training.told(), "warnings": [str(warning.message) for warning in caught]}


def without_examples(folder: Path, rank: int) -> dict[str, Any]:
    """Process 1 has no example left in the last step, and says so."""
    training = Training(rank)
    with watch(training, folder / "run") as rec:
        training.step(rec)
        if rank == 1:
            rec.batch(())
            training.step(None)
        else:
            training.step(rec)
    return training.told()


def sharded(folder: Path, rank: int) -> dict[str, Any]:
    """A training whose parameters are shards, recorded in two attempts and with a gap."""
    training = Training(rank, sharded=True)
    with watch(training, folder / "run", steps="0:2,3:", segment_steps=2) as rec:
        for _ in range(4):
            training.step(rec)
    with watch(training, folder / "run", steps="0:2,3:", first_step=4) as rec:
        training.step(rec)
    return training.told()


def sharded_unrecorded(folder: Path, rank: int) -> dict[str, Any]:
    """The same without the recorder."""
    training = Training(rank, sharded=True)
    for _ in range(STEPS):
        training.step(None)
    return training.told()


def sharded_failing(folder: Path, rank: int) -> dict[str, Any]:
    """Process 0 cannot record step 2: neither records on, and neither waits for the other."""
    training = Training(rank, sharded=True)
    with warnings.catch_warnings(record=True) as caught, watch(training, folder / "run") as rec:
        for step in range(STEPS):
            if rank == 0 and step == 2:
                rec.batch([0], {"not": object()})
            training.step(rec)
    return {**training.told(), "warnings": [str(warning.message) for warning in caught]}


def sharded_too_large(folder: Path, rank: int) -> dict[str, Any]:
    """More bytes than are gathered."""
    from recorder import sharded as room

    setattr(room, "GATHERED_BYTES", 1000)  # noqa: B010 (a constant)
    return {"error": _error(lambda: watch(Training(rank, sharded=True), folder / "run"))}


def killed(folder: Path, rank: int) -> dict[str, Any]:
    """Process 1 is killed; process 0 then fails in the training's own exchange."""
    training = Training(rank)
    with contextlib.suppress(RuntimeError), watch(training, folder / "run", segment_steps=2) as rec:
        for step in range(STEPS):
            if rank == 1 and step == KILLED_AT:
                rec.flush()  # a step of which this process has told nobody yet may be lost
                os._exit(0)
            training.step(rec)
    return training.told()


SCENARIOS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    scenario.__name__: scenario
    for scenario in (
        *(whole, unrecorded, restarted, refused, joined_wrongly, failed_before_the_first_step, stopped_early),
        *(within_quota, without_examples, killed),
        *(sharded, sharded_unrecorded, sharded_failing, sharded_too_large),
    )
}


def _error(action: Callable[[], Any]) -> str:
    try:
        action()
    except UsageError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def start(folder: Path, scenarios: Sequence[str]) -> None:
    """Run scenarios, one after the other, in two processes; return when both have ended."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.two_processes", str(folder), str(rank), *scenarios],
            cwd=Path(__file__).parents[1],
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors[-4000:]
    finally:
        for process in processes:
            process.kill()


def told(folder: Path, scenario: str, rank: int) -> dict[str, Any]:
    """Load what a process saw in a scenario."""
    found: dict[str, Any] = torch.load(folder / scenario / f"{rank}.pt", weights_only=True)
    return found


def _main(folder: Path, rank: int, scenarios: Sequence[str]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=(folder / "meeting").absolute().as_uri(), rank=rank, world_size=PROCESSES
    )
    for name in scenarios:
        (folder / name).mkdir(exist_ok=True)
        torch.save(SCENARIOS[name](folder / name, rank), folder / name / f"{rank}.pt")
    if "killed" not in scenarios:
        distributed.barrier()
        distributed.destroy_process_group()


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
