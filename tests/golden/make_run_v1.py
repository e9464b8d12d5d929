"""Make the runs in tests/golden/run-v1, with what they must read as: ``python -m tests.golden.make_run_v1 FOLDER``.

They are for one purpose: whatever this version wrote must open in every later one. So they are made once, by this
program as it was then, and only ever added to. Parameters move by numbers that are drawn and added, one rounding each,
so that every machine makes the same θ.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

import recorder
from recorder.manifest import Trainer
from recorder.tensorfile import content

HASHES_FILE = "hashes.json"
SEGMENT_STEPS = 3

Theta = dict[str, torch.Tensor]


class Model(nn.Module):
    """A few parameters: one joins late, one never gets a gradient, two are one; its buffers change in the forward."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.decoder = nn.Module()
        self.decoder.embed_tokens = nn.Embedding(11, 8)
        self.decoder.output_projection = nn.Linear(8, 11, bias=False)
        self.decoder.output_projection.weight = self.decoder.embed_tokens.weight
        self.decoder.layers = nn.ModuleList([nn.Module()])
        layer = self.decoder.layers[0]
        layer.fc1, layer.fc2 = nn.Linear(8, 40), nn.Linear(40, 8)
        layer.final_layer_norm = nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.ones(()))
        self.never = nn.Parameter(torch.ones(2))
        self.to(dtype)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("odd", torch.tensor([True, False]))

    def change_buffers(self, step: int) -> None:
        """Do to the buffers what a forward pass might."""
        self.get_buffer("mean").mul_(0.5).add_(torch.tensor([step, 0.25, -1.0]))
        self.get_buffer("count").add_(1)
        self.get_buffer("odd").logical_not_()


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """Say in 64 digits what tensors are: their order, names, dtypes, shapes and bits."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(content(tensor))
    return digest.hexdigest()


def plain(value: Any) -> Any:
    """Put a batch in JSON types, tensors as fingerprints; tuples, lists and NaN stay apart."""
    if isinstance(value, torch.Tensor):
        return fingerprint({"": value})
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [type(value).__name__, *map(plain, value)]
    return repr(value)


def describe_step(epoch: int, seed: int, learning_rates: Iterable[float], micro_batches: Iterable[Any]) -> str:
    """Say in 64 digits what a step is besides its parameters."""
    text = json.dumps([epoch, seed, list(learning_rates), list(micro_batches)])
    return hashlib.sha256(text.encode()).hexdigest()


def describe_micro_batch(
    indices: torch.Tensor, batch: Any, loss_sum: float | None, predictions: float | None, random_state: torch.Tensor
) -> list[Any]:
    """Put a micro-batch in JSON types."""
    return [indices.tolist(), plain(batch), repr(loss_sum), repr(predictions), fingerprint({"": random_state})]


class Training:
    """A training without a loss: its gradients are drawn."""

    def __init__(self, run: Path, *, dtype: torch.dtype = torch.float32, buffers: bool = False) -> None:
        self.run = run
        torch.manual_seed(0)
        self.model = Model(dtype)
        self._draws = np.random.Philox(7)
        with torch.no_grad():
            for tensor in self.model.parameters():
                tensor.copy_(self._draw(tensor, 1.0))
        self._change_buffers = buffers
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0, momentum=0.5)

    def _draw(self, tensor: torch.Tensor, size: float) -> torch.Tensor:
        drawn = self._draws.random_raw(tensor.numel()) >> np.uint64(40)  # 24 bits: exact in float32
        return torch.from_numpy((drawn.astype(np.float64) * (2.0**-23 * size) - size).astype(np.float32)).reshape(
            tensor.shape
        )

    def update(self, step: int, *, late_from: int = 2) -> None:
        """Make the update of a step."""
        for name, tensor in self.model.named_parameters():
            if name == "never" or (name == "scale" and step < late_from):
                continue
            # In the sizes of a training that settles; a power of two, so that the momentum is exact.
            tensor.grad = self._draw(tensor, 2.0 ** -(6 + step // 2)).to(tensor.dtype)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def theta(self) -> Theta:
        """Copy what the run must read as θ."""
        return {name: tensor.detach().clone() for name, tensor in self.model.named_parameters() if name != "never"}

    def buffers(self) -> Theta:
        """Copy what the run must read as buffers."""
        return {name: tensor.clone() for name, tensor in self.model.named_buffers()} if self._change_buffers else {}

    def record(self, first: int, stop: int, *, steps: str = "all", batches: Any = "store") -> dict[str, Any]:
        """Record steps; return what they must read as: the fingerprints of θ, buffers and steps by their number."""
        told: dict[str, dict[str, str]] = {"parameters": {}, "buffers": {}, "steps": {}}
        with recorder.watch(
            self.model,
            self.optimizer,
            run=self.run,
            workload="project.train:workload",
            first_step=first,
            steps=steps,
            batches=batches,
            segment_steps=SEGMENT_STEPS,
            trainer=Trainer(name="torch", version="2"),
        ) as rec:
            for step in range(first, stop):
                torch.manual_seed(step)
                rec.epoch = 1 + step // 4
                told["parameters"][str(step)] = fingerprint(self.theta())
                told["buffers"][str(step)] = fingerprint(self.buffers())
                micro_batches = [
                    self._announce(rec, step, position, batches) for position in range(2 if step in (1, 5) else 1)
                ]
                told["steps"][str(step)] = describe_step(rec.epoch, step, [1.0], micro_batches)
                self.update(step)
            told["parameters"][str(stop)] = fingerprint(self.theta())
            told["buffers"][str(stop)] = fingerprint(self.buffers())
        (self.run / ".lock").unlink(missing_ok=True)
        return told

    def _announce(self, rec: Any, step: int, position: int, batches: str) -> list[Any]:
        indices = torch.arange(3) + 10 * step + position
        loss_sum = float("nan") if step == 1 else 2.5 * step
        batch = {
            "tokens": torch.arange(6).reshape(2, 3) + step,
            "net input": [torch.tensor([True, step % 2 == 0]), (None, "größe", float("-inf"), 0.1)],
        }
        random_state = torch.get_rng_state()
        rec.batch(indices, batch)
        rec.loss(loss_sum, 6)
        if self._change_buffers:
            self.model.change_buffers(step)
        return describe_micro_batch(indices, batch if batches == "store" else None, loss_sum, 6.0, random_state)


def make(folder: Path) -> dict[str, Any]:
    """Make all runs in a folder.

    Returns
    -------
    dict
        Run → what it must read as; two attempts are told apart by the number after the run's name.
    """
    expected = {}
    first = Training(folder / "attempts")
    expected["attempts@1"] = first.record(0, 6)
    again = Training(folder / "attempts")
    for step in range(4):
        again.update(step)
    before = {kind: {t: told for t, told in of.items() if int(t) < 4} for kind, of in expected["attempts@1"].items()}
    again._draws = np.random.Philox(8)  # other data than the first time
    now = again.record(4, 8)
    expected["attempts"] = {kind: before[kind] | now[kind] for kind in now}

    resumed = Training(folder / "selected")
    resumed.update(0)
    told = resumed.record(1, 9, steps="1:3,5::3")
    kept = {1, 2, 5, 8}
    ends = {*kept, *(step + 1 for step in kept)}
    expected["selected"] = {
        kind: {t: one for t, one in of.items() if int(t) in (kept if kind == "steps" else ends)}
        for kind, of in told.items()
    }
    expected["bfloat16"] = Training(folder / "bfloat16", dtype=torch.bfloat16).record(0, 4, batches="indices")
    expected["buffers"] = Training(folder / "buffers", buffers=True).record(0, 4)
    return expected


def made_alike(folder: Path) -> dict[str, Any]:
    """Make all runs with an identity, a date and a machine that are always the same.

    Parameters
    ----------
    folder
        Where.

    Returns
    -------
    dict
        As `make`.
    """
    recipe = {"device": "cpu", "device_name": "", "threads": 1, "torch": "2", "cpu_capability": "", "tf32": False}
    provenance = {"created": "2020-01-01T00:00:00+00:00", "lossledger": "0.1.0", "torch": "2", "python": "3.11"}
    clock, identity = mock.Mock(), mock.Mock()
    clock.now.return_value = datetime(2020, 1, 1, tzinfo=UTC)
    identity.uuid4.return_value.hex = "0123456789abcdef" * 2
    with ExitStack() as patches:
        for name, value in {
            "recorder.runfolder.current_recipe": lambda device: recipe,
            "recorder.runfolder._provenance": lambda: provenance,
            "recorder.runfolder.datetime": clock,
            "recorder.runfolder.uuid": identity,
        }.items():
            patches.enter_context(mock.patch(name, value))
        return make(folder)


def main() -> None:
    """Make the runs in the folder that the command line names."""
    folder = Path(sys.argv[1])
    expected = made_alike(folder)
    (folder / HASHES_FILE).write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
