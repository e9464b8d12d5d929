"""accelerate's prepared loop under `recorder.watch`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

import recorder
from recorder.runformat import Run
from tests.external.whole_way import go_the_whole_way

os.environ["HF_HUB_OFFLINE"] = "1"
accelerate: Any = pytest.importorskip("accelerate")

# The small network has names that no naming rule knows.
pytestmark = pytest.mark.filterwarnings("ignore::recorder.parameters.UnmappedParameterWarning")

EXAMPLES, EPOCHS, ACCUMULATED = 22, 2, 3


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    # The accelerator's state is one for the whole process.
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def dataset() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(5)
    return [{"index": i, "x": torch.randn(4, generator=generator), "y": i % 3} for i in range(EXAMPLES)]


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))


def train(run: Path | None, *, workers: int = 0, mixed_precision: str | None = None) -> dict[str, torch.Tensor]:
    """Three micro-batches of 4 to an update, the last of an epoch incomplete: 2 epochs of 2 updates."""
    settings = {"gradient_accumulation_steps": ACCUMULATED, "cpu": True, "mixed_precision": mixed_precision}
    accelerator = accelerate.Accelerator(**settings)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loader: Any = DataLoader(dataset(), batch_size=4, shuffle=True, num_workers=workers)  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    rec = None if run is None else recorder.watch(accelerator.unwrap_model(model), optimizer, run=run, strict=True)
    for epoch in range(EPOCHS):
        if rec is not None:
            rec.epoch = epoch + 1
        for batch in loader:
            with accelerator.accumulate(model):
                if rec is not None:
                    with accelerator.autocast():
                        rec.batch(batch["index"], batch)
                loss = functional.cross_entropy(model(batch["x"]), batch["y"])
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
    if rec is not None:
        rec.close()
    return {name: tensor.detach().clone() for name, tensor in accelerator.unwrap_model(model).named_parameters()}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_real_updates_are_recorded_and_nothing_changes(tmp_path: Path, workers: int) -> None:
    without = train(None, workers=workers)
    trained = train(tmp_path / "run", workers=workers)
    assert all(torch.equal(without[name], trained[name]) for name in without)
    run = Run(tmp_path / "run")
    # 22 examples are six micro-batches, the last of two; accelerate steps after three and at an epoch's end.
    assert list(run.steps) == [0, 1, 2, 3]
    assert [run.step(t).epoch for t in run.steps] == [1, 1, 2, 2]
    sizes = [[len(micro_batch.indices) for micro_batch in run.step(t).micro_batches] for t in run.steps]
    assert sizes == [[4, 4, 4], [4, 4, 2]] * 2
    data = dataset()
    for t in run.steps:
        for micro_batch in run.step(t).micro_batches:
            given = torch.stack([data[i]["x"] for i in micro_batch.indices.tolist()])
            assert torch.equal(micro_batch.batch()["x"], given)
    for epoch in (0, 2):
        seen = [i for t in (epoch, epoch + 1) for part in run.step(t).micro_batches for i in part.indices.tolist()]
        assert sorted(seen) == list(range(EXAMPLES))
    final = run.parameters(4)
    assert all(torch.equal(final[name], trained[name]) for name in final)
    assert run.manifest.optimizer.name == "torch.optim.adamw.AdamW"


def test_mixed_precision_is_part_of_the_recipe(tmp_path: Path) -> None:
    train(tmp_path / "run", mixed_precision="bf16")
    assert Run(tmp_path / "run").manifest.recipe["autocast"] == "bfloat16"


def test_announced_takes_the_index_from_the_batches_of_a_prepared_loader(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader: Any = DataLoader(dataset(), batch_size=4, shuffle=True)  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    seen = []
    with recorder.watch(model, optimizer, run=tmp_path / "run", strict=True) as rec:
        for batch in recorder.announced(rec, loader, indices="index"):
            seen.append(batch["index"].tolist())
            accelerator.backward(functional.cross_entropy(model(batch["x"]), batch["y"]))
            optimizer.step()
            optimizer.zero_grad()
    run = Run(tmp_path / "run")
    assert [run.step(t).micro_batches[0].indices.tolist() for t in run.steps] == seen
    assert len(seen) == 6


def test_the_example_goes_the_whole_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cube = go_the_whole_way("accelerate_loop.py", "runs/accelerate", tmp_path / "run", capsys, steps=30)
    assert float((cube["loss_end"] - cube["loss_start"]).sel(data="probe").sum()) < 0
    assert cube["epoch"].values.tolist() == [1] * 15 + [2] * 15
