"""Small trainings whose every step is known beforehand, and what their runs must then hold."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import recorder
from recorder import recording, tensorfile
from recorder.errors import LossledgerError
from recorder.recording import Recording
from recorder.runformat import Run
from recorder.verify import verify
from recorder.writer import BackgroundWriter

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda tensors: SGD(tensors, lr=0.05, momentum=0.9),
    "adam": lambda tensors: Adam(tensors, lr=0.01),
    "adamw": lambda tensors: AdamW(tensors, lr=0.01, weight_decay=0.1),
}
DTYPES = ("float32", "bfloat16")


def build(optimizer: str, dtype: str = "float32", width: int = 8) -> tuple[nn.Module, Optimizer]:
    """A model at its first step, with a buffer that training changes and a parameter that it does not."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 3))
    model.register_parameter("unused", nn.Parameter(torch.arange(3.0)))
    model.to(getattr(torch, dtype))
    return model, OPTIMIZERS[optimizer](model.parameters())


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
    with recorder.watch(model, made, run=run, first_step=first_step, segment_steps=segment_steps) as rec:
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
