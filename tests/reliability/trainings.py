"""Small trainings whose every step is known beforehand, and what their runs must then hold."""

from __future__ import annotations

import atexit
import copy
import gc
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import recorder
from recorder import recording, tensorfile
from recorder.errors import LossledgerError, UsageError
from recorder.recording import RecorderWarning, Recording
from recorder.runformat import Run
from recorder.verify import verify
from recorder.writer import BackgroundWriter

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda tensors: SGD(tensors, lr=0.05, momentum=0.9),
    "adam": lambda tensors: Adam(tensors, lr=0.01),
    "adamw": lambda tensors: AdamW(tensors, lr=0.01, weight_decay=0.1),
}
DTYPES = ("float32", "bfloat16")
FILES = {"counts.py": Path(__file__).with_name("counts.py")}
"""What a trainer needs to be rebuilt; any file will do."""


def build(optimizer: str, dtype: str = "float32", width: int = 8) -> tuple[nn.Module, Optimizer]:
    """A model and an optimizer with a state, a buffer that training changes and a parameter that it does not."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 3))
    model.register_parameter("unused", nn.Parameter(torch.arange(3.0)))
    model.to(getattr(torch, dtype))
    made = OPTIMIZERS[optimizer](model.parameters())
    update(model, made, 10**6)  # not recorded: the optimizer's state at the first recorded step is
    return model, made


def update(model: nn.Module, optimizer: Optimizer, step: int, rec: Recording | None = None) -> None:
    """Update number `step`, which depends on nothing but its number and the parameters."""
    dtype = next(model.parameters()).dtype
    examples = torch.randn(5, 6, generator=torch.Generator().manual_seed(step)).to(dtype)
    if rec is not None:
        rec.batch(_indices(step), examples)
    loss = model(examples).square().sum()
    if rec is not None:
        rec.loss(loss, 15)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _indices(step: int) -> list[int]:
    return [step, 7 * step % 11]


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensorfile.content(tensor.cpu()))
    return digest.hexdigest()


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a run holds as θ of this model."""
    return {name: tensor.detach() for name, tensor in model.named_parameters() if name != "unused"}


def expected_states(optimizer: str, dtype: str, steps: int, width: int = 8) -> list[str]:
    """Fingerprints of θ_0 to θ_steps of an undisturbed training without recorder."""
    model, made = build(optimizer, dtype, width)
    states = [fingerprint(trained(model))]
    for step in range(steps):
        update(model, made, step)
        states.append(fingerprint(trained(model)))
    return states


class InlineWriter(BackgroundWriter):
    """Codes and writes in the training's own thread, so that every call to the system is of one thread."""

    def put(self, state: Any, step: Any) -> None:
        self._add(state, step)

    def flush(self) -> None:
        if self.failure is None:
            self._segments.sync()

    def close(self) -> None:
        self._segments.seal()


def in_one_thread() -> None:
    """Let all recordings of this process write in the training's thread."""
    recording.BackgroundWriter = InlineWriter  # type: ignore[misc]


class Oracle:
    """An append-only log outside the run: which states were safe, told once they were."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._waiting: list[tuple[int, str]] = []

    def made(self, number: int, model: nn.Module) -> None:
        """The training has made θ_number; that is not yet to say that it is safe."""
        self._waiting.append((number, fingerprint(trained(model))))

    def safe(self) -> None:
        """All that was made is safe."""
        os.write(self._file, "".join(f"{number} {digest}\n" for number, digest in self._waiting).encode())
        os.fsync(self._file)
        self._waiting.clear()

    @staticmethod
    def read(path: Path) -> dict[int, str]:
        """Every state that was safe: number to fingerprint."""
        lines = path.read_text().splitlines() if path.exists() else []
        return {int(number): digest for number, digest in map(str.split, lines)}


def train(
    run: str,
    oracle: str,
    optimizer: str,
    dtype: str,
    first_step: int = 0,
    stop: int = 10**9,
    segment_steps: int = 5,
    *,
    inline: bool = False,
    flush_every: int = 3,
) -> None:
    """Record updates up to `stop`, or for ever, telling the oracle what is safe."""
    if inline:
        in_one_thread()
    model, made = build(optimizer, dtype)
    for step in range(first_step):
        update(model, made, step)
    log = Oracle(Path(oracle))
    with recorder.watch(
        model, made, run=run, first_step=first_step, segment_steps=segment_steps, files=FILES
    ) as rec:
        for step in range(first_step, stop):
            update(model, made, step, rec)
            log.made(step + 1, model)
            if step % flush_every == flush_every - 1:
                rec.flush()
                log.safe()
    log.safe()


def train_inline(run: str, oracle: str, first_step: int, stop: int) -> None:
    """Record a few updates in one thread, once told to."""
    os.kill(os.getpid(), signal.SIGSTOP)
    train(run, oracle, "adam", "float32", first_step, stop, 2, inline=True, flush_every=1)


def train_threaded(run: str, oracle: str, first_step: int, stop: int) -> None:
    """Record a few updates as a training does, once told to."""
    os.kill(os.getpid(), signal.SIGSTOP)
    train(run, oracle, "adam", "float32", first_step, stop, 2, flush_every=1)


def assert_prefix(path: Path, states: Sequence[str], safe: Mapping[int, str] | None = None) -> int:
    """The run is whole, holds steps 0 to n without gap, each as the training made it; return n."""
    verdict = verify(path)
    assert not verdict.damages, verdict
    assert not verdict.unfinished, verdict
    run = Run(path)
    steps = run.steps
    assert steps == list(range(len(steps)))
    for step in steps:
        (micro_batch,) = run.step(step).micro_batches
        assert micro_batch.indices.tolist() == _indices(step)
        assert micro_batch.stored
        assert fingerprint(run.parameters(step)) == states[step], f"θ_{step} differs"
    if steps:
        assert fingerprint(run.parameters(len(steps))) == states[len(steps)], "the last θ differs"
    for number, digest in (safe or {}).items():
        assert number <= len(steps), f"θ_{number} was safe, the run ends with θ_{len(steps)}"
        assert digest == states[number]
    return len(steps)


def full_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """All that a training leaves behind, copied."""
    return copy.deepcopy(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
        }
    )


def content_of(path: Path) -> str:
    """SHA-256 of all that reading a run can give."""
    run = Run(path)
    digest = hashlib.sha256(json.dumps(run.manifest.to_dict()).encode())
    digest.update(fingerprint(run.untrained()).encode())
    digest.update(repr(sorted(_flat(run.optimizer_state() or {}))).encode())
    for name in sorted(run.manifest.files):
        digest.update((path / "trainer" / name).read_bytes())
    for attempt in run.manifest.attempts:
        of_attempt = Run(path, attempt.number)
        for step in of_attempt.steps:
            digest.update(fingerprint(of_attempt.parameters(step)).encode())
            digest.update(fingerprint(of_attempt.buffers(step)).encode())
            digest.update(repr(of_attempt.step(step)).encode())
        if of_attempt.steps:
            digest.update(fingerprint(of_attempt.parameters(of_attempt.steps[-1] + 1)).encode())
    return digest.hexdigest()


def _flat(state: Mapping[Any, Mapping[str, Any]]) -> list[tuple[str, str]]:
    return [
        (f"{index}/{key}", fingerprint({"": value}) if isinstance(value, torch.Tensor) else repr(value))
        for index, entries in state.items()
        for key, value in entries.items()
    ]


def is_noticed(path: Path) -> bool:
    """Whether `verify` finds something, or reading ends in an error of ours; any other error is raised."""
    try:
        return bool(verify(path).damages)
    except LossledgerError:
        return True


WIDE = 400
"""Width of the model that fills disks: 20 kB a state."""


def train_to_the_end(run: str, result: str, steps: int, width: int = WIDE) -> None:
    """Record updates, and write down what has become of the model and of the recording."""
    model, optimizer = build("adam", width=width)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rec = None
        refusal = ""
        try:
            rec = recorder.watch(model, optimizer, run=run, segment_steps=8)
        except UsageError as error:
            refusal = str(error)
        for step in range(steps):
            update(model, optimizer, step, rec)
        if rec is not None:
            rec.close()
    warned = [str(entry.message) for entry in caught if entry.category is RecorderWarning]
    outcome = {"model": fingerprint(trained(model)), "refusal": refusal, "warned": warned}
    Path(result).write_text(json.dumps(outcome))


def train_on_a_disk_of_its_own(options: str, disk: str, saved: str, result: str, steps: int) -> None:
    """Record onto a disk of some size, and save what is on it when the training has ended."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", disk], check=True)
    try:
        train_to_the_end(f"{disk}/run", result, steps)
        if Path(disk, "run").exists():
            shutil.copytree(f"{disk}/run", saved)
    finally:
        subprocess.run(["umount", disk], check=True)


def train_with_a_largest_file(size: int, run: str, result: str, steps: int) -> None:
    """Record where no file may have more than `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    train_to_the_end(run, result, steps)


def train_with_checkpoints(
    run: str, checkpoint: str, optimizer: str, dtype: str, stop: int, kill_at: int, where: str
) -> None:
    """Go on from the checkpoint, if there is one, saving it every few updates; be killed somewhere in one of them."""
    model, made = build(optimizer, dtype)
    first_step = 0
    if Path(checkpoint).exists():
        first_step = load(checkpoint, model, made)
    with recorder.watch(model, made, run=run, first_step=first_step, segment_steps=4) as rec:
        for step in range(first_step, stop):
            if step == kill_at and where == "before the update":
                os.kill(os.getpid(), signal.SIGKILL)
            update(model, made, step, rec)
            if step == kill_at and where == "after the update":
                os.kill(os.getpid(), signal.SIGKILL)
            if (step + 1) % 5 == 0:
                rec.flush()
                if step >= kill_at - 4 and where == "before the checkpoint":
                    os.kill(os.getpid(), signal.SIGKILL)
                save(checkpoint, model, made, step + 1)


def save(checkpoint: str, model: nn.Module, optimizer: Optimizer, updates: int) -> None:
    """Write a checkpoint as trainers do."""
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
    torch.save({**content, "updates": updates}, f"{checkpoint}.new")
    Path(f"{checkpoint}.new").replace(checkpoint)


def load(checkpoint: str, model: nn.Module, optimizer: Optimizer) -> int:
    """Take up a checkpoint; return how many updates were made before it."""
    content = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    torch.set_rng_state(content["rng"])
    return int(content["updates"])


def hold(run: str, ready: str, children: int) -> None:
    """Record a step into a run and keep it open, with processes forked as a DataLoader forks its workers."""
    model, optimizer = build("adam")
    rec = recorder.watch(model, optimizer, run=run)
    update(model, optimizer, 0, rec)
    rec.flush()
    pids = []
    for _ in range(children):
        pid = os.fork()
        if pid == 0:
            signal.pause()
        pids.append(pid)
    Path(f"{ready}.new").write_text(json.dumps(pids))
    Path(f"{ready}.new").rename(ready)
    signal.pause()


def hold_after_children(run: str, ready: str) -> None:
    """The same, with children that have ended in every way a child can end."""
    model, optimizer = build("adam")
    rec = recorder.watch(model, optimizer, run=run)
    update(model, optimizer, 0, rec)
    rec.flush()
    for ending in (sys.exit, os._exit, lambda _: rec.close(), lambda _: gc.collect()):
        pid = os.fork()
        if pid == 0:
            try:
                ending(0)
                atexit._run_exitfuncs()
            except SystemExit:
                atexit._run_exitfuncs()
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
    Path(ready).write_text("[]")
    signal.pause()


def race(run: str, start: str, result: str) -> None:
    """Begin to record at the same moment as others."""
    model, optimizer = build("adam")
    while not Path(start).exists():
        time.sleep(0.0001)
    try:
        rec = recorder.watch(model, optimizer, run=run)
    except UsageError as error:
        Path(result).write_text(str(error))
        return
    update(model, optimizer, 0, rec)
    rec.flush()
    Path(result).write_text("recording")
    signal.pause()
