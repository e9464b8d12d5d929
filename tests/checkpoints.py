"""One small training, recorded at every update and with checkpoints now and then, in the files of many trainers."""

from __future__ import annotations

import argparse
import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import recorder
from tests import cases

State = Mapping[str, torch.Tensor]
WORKLOAD = "tests.cases:workload"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """What a training left: its run, and updates done to the model's state then."""

    run: Path
    states: Mapping[int, State]


def train(run: Path, *, updates: int, every: int, buffered: bool = False) -> Training:
    """Train `cases.LanguageModelling` with the recorder on, and keep the model's state every few updates."""
    torch.manual_seed(1)
    task = cases.workload()
    model = task.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    examples = torch.Generator().manual_seed(2)
    states = {}
    with recorder.watch(model, optimizer, run=run, workload=WORKLOAD) as rec:
        for t in range(updates + 1):
            if t % every == 0:
                states[t] = copied(model)
            if t == updates:
                break
            indices = torch.randperm(48, generator=examples)[:16]
            batch = task.batch(indices.tolist(), split="train", epoch=1)
            rec.batch(indices, batch)
            loss_sum, predictions = task.loss(model, batch)
            rec.loss(loss_sum, predictions)
            (loss_sum / predictions).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
    return Training(run=run, states=states)


def copied(model: nn.Module) -> State:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def untied(state: State) -> dict[str, torch.Tensor]:
    """Safetensors files hold no tensor twice."""
    return {name: tensor for name, tensor in state.items() if "output_projection" not in name}


# --- The same checkpoints as each kind has them ---------------------------------------------------------------------


def as_huggingface(folder: Path, states: Mapping[int, State]) -> Path:
    for t, state in states.items():
        place = folder / f"checkpoint-{t}"
        place.mkdir(parents=True)
        save_file(untied(state), place / "model.safetensors")
        facts = {"global_step": t, "epoch": t / 10}
        (place / "trainer_state.json").write_text(json.dumps(facts))
    return folder


def as_huggingface_pickles(folder: Path, states: Mapping[int, State]) -> Path:
    for t, state in states.items():
        place = folder / f"checkpoint-{t}"
        place.mkdir(parents=True)
        torch.save(dict(state), place / "pytorch_model.bin")
    return folder


def as_shards(folder: Path, states: Mapping[int, State]) -> Path:
    for t, state in states.items():
        place = folder / f"checkpoint-{t}"
        place.mkdir(parents=True)
        names = list(untied(state))
        halves = [names[::2], names[1::2]]
        where: dict[str, str] = {}
        for number, half in enumerate(halves, start=1):
            file = f"model-{number:05d}-of-00002.safetensors"
            save_file({name: state[name] for name in half}, place / file)
            where |= dict.fromkeys(half, file)
        (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def as_hub_cache(folder: Path, states: Mapping[int, State]) -> Path:
    """As huggingface_hub lays it out: refs, snapshots, and blobs that the snapshots link to."""
    place = folder / "models--ours--tiny"
    for name in ("refs", "blobs"):
        (place / name).mkdir(parents=True)
    for t, state in states.items():
        blob = place / "blobs" / f"{t:064x}"
        save_file(untied(state), blob)
        snapshot = place / "snapshots" / f"{t:040x}"
        snapshot.mkdir(parents=True)
        (snapshot / "model.safetensors").symlink_to(Path("../../blobs") / blob.name)
        (place / "refs" / f"step{t}").write_text(f"{t:040x}")
    (place / "refs" / "main").write_text(f"{t:040x}")
    return place


def as_fairseq(folder: Path, states: Mapping[int, State]) -> Path:
    folder.mkdir(parents=True)
    for number, (t, state) in enumerate(states.items()):
        document = {
            "args": None,
            "cfg": {"model": argparse.Namespace(arch="tiny")},
            "model": dict(state),
            "optimizer_history": [{"num_updates": t}],
            "extra_state": {"train_iterator": {"epoch": 1 + number}},
            "last_optimizer_state": {"state": {0: {"exp_avg": torch.ones(3)}}},
        }
        torch.save(document, folder / f"checkpoint{number + 1}.pt")
    torch.save(document, folder / "checkpoint_last.pt")
    return folder


def as_lightning(folder: Path, states: Mapping[int, State]) -> Path:
    folder.mkdir(parents=True)
    for t, state in states.items():
        weights = {f"model.{name}": tensor for name, tensor in state.items()}
        document = {
            "state_dict": weights | {"criterion.weight": torch.ones(2)},
            "global_step": t,
            "epoch": 0,
            "pytorch-lightning_version": "2.5.0",
        }
        torch.save(document, folder / f"epoch=0-step={t}.ckpt")
    return folder


def as_distributed(folder: Path, states: Mapping[int, State]) -> Path:
    import torch.distributed.checkpoint as dcp

    for t, state in states.items():
        document = {"model": dict(state), "optimizer": {"step": t, "exp_avg": torch.ones(3)}}
        with warnings.catch_warnings():
            # That one process saves, which is what is wanted.
            warnings.simplefilter("ignore")
            dcp.save(document, checkpoint_id=str(folder / f"step-{t}"))  # type: ignore[attr-defined]
    return folder


def as_list(folder: Path, states: Mapping[int, State]) -> Path:
    folder.mkdir(parents=True)
    lines = ["step,path"]
    for t, state in states.items():
        save_file({f"module.{name}": tensor for name, tensor in untied(state).items()}, folder / f"w{t}.safetensors")
        lines.append(f"{t},w{t}.safetensors")
    (folder / "checkpoints.csv").write_text("\n".join(lines) + "\n")
    return folder / "checkpoints.csv"


def as_numbered_files(folder: Path, states: Mapping[int, State]) -> Path:
    folder.mkdir(parents=True)
    for t, state in states.items():
        compiled = {name.replace("layers.", "layers._orig_mod.", 1): tensor for name, tensor in state.items()}
        torch.save({"model": compiled, "iter_num": t}, folder / f"ckpt_{t}.pt")
    return folder


KINDS: dict[str, Callable[[Path, Mapping[int, State]], Path]] = {
    "huggingface": as_huggingface,
    "huggingface, pickles": as_huggingface_pickles,
    "huggingface, shards": as_shards,
    "hub cache": as_hub_cache,
    "fairseq": as_fairseq,
    "lightning": as_lightning,
    "distributed": as_distributed,
    "list": as_list,
    "numbered files": as_numbered_files,
}
LINKED = ("huggingface", "huggingface, shards", "hub cache", "list")


def facts(run: Path) -> dict[str, Any]:
    """The manifest as JSON."""
    document: dict[str, Any] = json.loads((run / "manifest.json").read_text())
    return document
