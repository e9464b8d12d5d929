"""Small trainings whose every step is known beforehand, and what their runs must then hold."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import recorder
from recorder import tensorfile
from recorder.recording import Recording

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
        rec.batch(indices(step), examples)
    loss = model(examples).square().sum()
    if rec is not None:
        rec.loss(loss, 15)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def indices(step: int) -> list[int]:
    """What stands for the examples of an update."""
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


def record_twice(run: Path) -> None:
    """A small run with every kind of file, and two attempts of which the second replaces steps of the first."""
    for first_step, stop in ((0, 3), (2, 4)):
        model, optimizer = build("adam", width=4)
        for step in range(first_step):
            update(model, optimizer, step)
        with recorder.watch(model, optimizer, run=run, first_step=first_step, segment_steps=2, files=FILES) as rec:
            for step in range(first_step, stop):
                update(model, optimizer, step, rec)
