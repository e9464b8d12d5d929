"""Dropout as recorded: the first gradient is the one the optimizer saw, and nothing else of the process changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import recorder
from recorder.loading import load_workload
from recorder.runformat import Run
from recorder.workload import Workload
from replay.gradients import LossSurface
from replay.precision import PRECISIONS
from replay.shards import ShardFolder
from tests.replay.test_recorded_variants import Classification, Normalised
from tests.replay.variants import record

Command = Callable[..., int]
Find = Callable[[Path, str], ShardFolder]
Gradients = list[dict[str, torch.Tensor]]
Captured = pytest.CaptureFixture[str]


def _keeping(gradients: list[list[torch.Tensor | None]]) -> Callable[[Any], torch.optim.Optimizer]:
    """An optimizer that notes what it is about to use."""

    def make(parameters: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.Adam(parameters, lr=1e-2)

        def note(*_: Any) -> None:
            tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
            gradients.append([None if tensor.grad is None else tensor.grad.clone() for tensor in tensors])

        optimizer.register_step_pre_hook(note)
        return optimizer

    return make


def _surface(run: Run, workload: Workload) -> LossSurface:
    names = [row.name for row in run.manifest.trained]
    surface = LossSurface(workload, names, run.untrained(), torch.device("cpu"), PRECISIONS["float32"])
    return surface


def _states(run: Run, t: int) -> list[Any]:
    return [micro_batch.random_state for micro_batch in run.step(t).micro_batches]


def _batches(run: Run, t: int) -> list[Any]:
    return [micro_batch.batch() for micro_batch in run.step(t).micro_batches]


def test_the_gradient_at_the_start_of_every_step_is_the_optimizers_bit_for_bit(tmp_path: Path) -> None:
    seen: list[list[torch.Tensor | None]] = []
    record(tmp_path, make_optimizer=_keeping(seen), steps=3)  # two micro-batches to an update
    run = Run(tmp_path)
    workload = load_workload(run.path, run.manifest, "recorded", None)
    names = [name for name, _ in workload.model().named_parameters()]
    surface = _surface(run, workload)
    for t in run.steps:
        found = surface.evaluate(run.parameters(t), _batches(run, t), states=_states(run, t))
        expected = {name: entry for name, entry in zip(names, seen[t], strict=True) if entry is not None}
        assert found.gradient.keys() == expected.keys()
        assert all(torch.equal(found.gradient[name], expected[name]) for name in expected)
        without = surface.evaluate(run.parameters(t), _batches(run, t))
        assert not any(torch.equal(without.gradient[name], expected[name]) for name in expected)


def test_along_the_segment_the_loss_is_one_fixed_function_of_the_parameters(tmp_path: Path) -> None:
    record(tmp_path, steps=1)
    run = Run(tmp_path)
    surface = _surface(run, load_workload(run.path, run.manifest, "recorded", None))
    batches, states, end = _batches(run, 0), _states(run, 0), run.parameters(1)
    torch.manual_seed(99)
    one = surface.evaluate(end, batches, states=states)
    torch.manual_seed(100)
    surface.evaluate(run.parameters(0), batches)
    other = surface.evaluate(end, batches, states=states)
    assert surface.loss(end, batches, states=states) == one.loss == other.loss != surface.loss(end, batches)
    assert all(torch.equal(one.gradient[name], other.gradient[name]) for name in one.gradient)


def test_the_random_generators_of_the_process_are_left_as_they_were(tmp_path: Path) -> None:
    record(tmp_path, steps=1)
    run = Run(tmp_path)
    surface = _surface(run, load_workload(run.path, run.manifest, "recorded", None))
    before = torch.get_rng_state()
    surface.evaluate(run.parameters(0), _batches(run, 0), states=_states(run, 0))
    surface.loss(run.parameters(0), _batches(run, 0), states=_states(run, 0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("rule", ["adaptive", "gauss2"])
def test_replayed_as_recorded_a_step_starts_at_the_loss_that_training_measured(
    tmp_path: Path, rule: str, replay: Command, folder: Find
) -> None:
    record(tmp_path, steps=4)
    run = Run(tmp_path)
    assert replay(tmp_path, "--dropout", "recorded", "--rule", rule, "--rtol", "1e-2") == 0
    found = folder(tmp_path, "batch")
    assert found.settings.dropout == "recorded"
    shard = found.read(0, 4)
    for t in run.steps:
        micro_batches = run.step(t).micro_batches
        measured = [float(micro_batch.loss_sum or 0) for micro_batch in micro_batches]
        assert shard.per_step["loss_start"][t] == sum(measured) / float(run.step(t).predictions)
    change = shard.per_step["loss_end"] - shard.per_step["loss_start"]
    total = sum(array.sum(axis=1) for array in shard.per_unit["sum"].values())
    np.testing.assert_allclose(total - change, shard.per_step["residual"], rtol=0, atol=1e-14)


def test_dropout_stays_off_on_examples_that_no_random_state_was_recorded_for(
    tmp_path: Path, replay: Command, folder: Find, capsys: Captured
) -> None:
    record(tmp_path, steps=2)
    both = ("batch", "probe:16")
    assert replay(tmp_path, "--dropout", "recorded", loss_data=both) == 0
    assert "dropout as recorded on batch, off on probe" in capsys.readouterr().err
    probe = folder(tmp_path, "probe")
    assert probe.settings.dropout == "off"
    before = {file: file.read_bytes() for file in tmp_path.rglob("shards/*/*")}
    # Off: another folder for the batches, and the very same one for the probe.
    assert replay(tmp_path, loss_data=both) == 0
    after = {file: file.read_bytes() for file in tmp_path.rglob("shards/*/*")}
    assert before.items() < after.items()
    assert len({file.parent for file in after}) == 3


def test_where_nothing_was_drawn_dropout_as_recorded_asks_for_the_batches(
    tmp_path: Path, replay: Command, capsys: Captured
) -> None:
    record(tmp_path, steps=1)
    assert replay(tmp_path, "--dropout", "recorded", loss_data=("probe:16",)) == 2
    assert (
        "--dropout recorded: random states are recorded for the training's own batches, and the loss data is probe"
        in (capsys.readouterr().err)
    )


def _rewrite_recipe(run: Path, device: str) -> None:
    manifest = recorder.manifest.Manifest.read(run)
    dataclasses.replace(manifest, recipe={**manifest.recipe, "device": device}).write(run)


def test_another_kind_of_device_would_draw_other_numbers_and_is_refused(
    tmp_path: Path, replay: Command, capsys: Captured
) -> None:
    record(tmp_path, steps=1)
    _rewrite_recipe(tmp_path, "cuda")
    assert replay(tmp_path, "--dropout", "recorded", "--device", "cpu") == 2
    assert (
        "--dropout recorded: the training drew its random numbers on cuda, and cpu draws others from the same state; "
        "pass --device cuda, or --dropout off"
    ) in capsys.readouterr().err


class NormalisedAndDroppingOut(Normalised):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = super().forward(functional.dropout(x, 0.2, self.training))
        return out


class Classifying(Classification):
    def model(self) -> nn.Module:
        return NormalisedAndDroppingOut()


def classifying() -> Classifying:
    """What ``--workload tests.replay.test_dropout:classifying`` names."""
    return Classifying()


@pytest.mark.filterwarnings("ignore::recorder.parameters.UnmappedParameterWarning")
def test_batch_normalisation_uses_the_statistics_of_the_batch_and_keeps_its_buffers(
    tmp_path: Path, replay: Command, folder: Find
) -> None:
    torch.manual_seed(0)
    task = classifying()
    model = task.model()
    seen: list[list[torch.Tensor | None]] = []
    optimizer = _keeping(seen)(model.parameters())
    named = "tests.replay.test_dropout:classifying"
    with recorder.watch(model, optimizer, run=tmp_path / "run", workload=named, strict=True) as rec:
        for step in range(3):
            for half in range(2):
                indices = list(range(step * 8 + half * 4, step * 8 + half * 4 + 4))
                batch = task.batch(indices, split="train", epoch=1)
                rec.batch(indices, batch)
                loss_sum, count = task.loss(model, batch)
                rec.loss(loss_sum, count)
                loss_sum.backward()  # type: ignore[no-untyped-call]
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad.div_(8)
            optimizer.step()
            optimizer.zero_grad()
    run = Run(tmp_path / "run")
    held = task.model()
    surface = _surface(run, _Given(held))
    for t in run.steps:
        surface.hold(run.buffers(t))
        before = {name: buffer.clone() for name, buffer in held.named_buffers()}
        found = surface.evaluate(run.parameters(t), _batches(run, t), states=_states(run, t))
        expected = dict(zip([name for name, _ in held.named_parameters()], seen[t], strict=True))
        assert found.gradient.keys() == expected.keys()
        for name, gradient in found.gradient.items():
            optimizers = expected[name]
            assert optimizers is not None
            assert torch.equal(gradient, optimizers)
        assert {name for name, _ in held.named_buffers()} == set(run.manifest.buffers)
        assert all(torch.equal(buffer, before[name]) for name, buffer in held.named_buffers())
    assert replay(tmp_path / "run", "--dropout", "recorded", workload=named) in {0, 3}
    loss_start = folder(tmp_path / "run", "batch").read(0, 3).per_step["loss_start"]
    for t in run.steps:
        measured = sum(float(micro_batch.loss_sum or 0) for micro_batch in run.step(t).micro_batches)
        assert loss_start[t] == measured / 8


class _Given(Classification):
    """A workload whose model the test holds in its hands."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def model(self) -> nn.Module:
        return self._model


class _Replacing(nn.Module):
    """Puts a new tensor in its buffer's place at every pass in training mode, and fails when told to."""

    passes: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)
        self.register_buffer("passes", torch.zeros(()))
        self.fails = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.passes = self.passes + 1
        if self.fails:
            raise RuntimeError
        out: torch.Tensor = self.inner(x)
        return out


def test_buffers_and_mode_come_back_also_when_replaced_or_when_the_pass_fails() -> None:
    model = _Replacing()
    workload = _Given(model)
    surface = LossSurface(workload, ["inner.weight", "inner.bias"], {}, torch.device("cpu"), PRECISIONS["float32"])
    buffer = dict(model.named_buffers())["passes"]
    theta = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    batch, states = workload.batch([0, 1], split="train", epoch=1), [{"rng_cpu": torch.get_rng_state()}]
    surface.evaluate(theta, [batch], states=states)
    assert dict(model.named_buffers())["passes"] is buffer
    assert buffer == 0
    model.fails = True
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        surface.evaluate(theta, [batch], states=states)
    assert buffer == 0
    assert not model.training
    assert torch.equal(torch.get_rng_state(), before)
