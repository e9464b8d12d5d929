from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

import recorder
from recorder.parameters import UnmappedParameterWarning
from recorder.recording import RecorderWarning
from recorder.runformat import Run

# The small models below have names that no naming rule knows.
pytestmark = pytest.mark.filterwarnings("ignore::recorder.parameters.UnmappedParameterWarning")

Tensors = dict[str, torch.Tensor]
STATISTICS = ("1.running_mean", "1.running_var", "1.num_batches_tracked")


def normalised() -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    model.register_buffer("constant", torch.tensor([1.0, float("nan")]))
    return model


def buffers(model: nn.Module) -> Tensors:
    return {name: tensor.detach().clone() for name, tensor in model.named_buffers()}


def train(
    run: Path, model: nn.Module, *, steps: int = 6, micro_batches: int = 2, selection: str = "all", **arguments: Any
) -> list[Tensors]:
    """Train; return the buffers as they were before the first forward pass of every step, and at the end."""
    optimizer = SGD(model.parameters(), lr=0.1)
    seen = []
    with recorder.watch(model, optimizer, run=run, segment_steps=4, steps=selection, **arguments) as rec:
        for step in range(steps):
            seen.append(buffers(model))
            for position in range(micro_batches):
                rec.batch([step, position])
                generator = torch.Generator().manual_seed(10 * step + position)
                model(torch.randn(5, 4, generator=generator)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return [*seen, buffers(model)]


def assert_buffers(run: Run, t: int, seen: Tensors) -> None:
    found = run.buffers(t)
    assert tuple(found) == STATISTICS
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (seen[name].dtype, seen[name].shape)
        assert torch.equal(tensor, seen[name])


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_buffers_are_recorded_as_they_were_before_the_first_forward_pass_of_every_step(
    tmp_path: Path, micro_batches: int
) -> None:
    seen = train(tmp_path / "run", normalised(), micro_batches=micro_batches)
    run = Run(tmp_path / "run")
    assert run.manifest.buffers == STATISTICS
    assert run.manifest.unrecorded_changes == ()
    for t, expected in enumerate(seen):
        assert_buffers(run, t, expected)
    assert [run.buffers(t)[STATISTICS[2]].item() for t in range(7)] == [micro_batches * t for t in range(7)]
    assert not torch.equal(seen[1]["1.running_mean"], seen[0]["1.running_mean"])


def test_buffers_of_selected_steps_are_those_of_both_their_ends(tmp_path: Path) -> None:
    seen = train(tmp_path / "run", normalised(), steps=9, selection="2:4,6:7")
    run = Run(tmp_path / "run")
    assert run.steps == [2, 3, 6]
    for t in (2, 3, 4, 6, 7):
        assert_buffers(run, t, seen[t])


def test_buffers_are_those_of_the_steps_start_also_where_a_parameter_joins_late(tmp_path: Path) -> None:
    model = normalised()
    late = nn.Linear(3, 3)
    model.append(late)
    joined = 3
    optimizer = SGD(model.parameters(), lr=0.1)
    seen = []
    with recorder.watch(model, optimizer, run=tmp_path / "run") as rec:
        for step in range(6):
            seen.append(buffers(model))
            rec.batch([step])
            batch = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
            (model if step >= joined else model[:-1])(batch).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    run = Run(tmp_path / "run")
    assert run.segments == [(0, joined), (joined, 6)]
    for t, expected in enumerate(seen):
        assert_buffers(run, t, expected)


def test_recording_the_buffers_does_not_change_them(tmp_path: Path) -> None:
    model, twin = normalised(), normalised()
    seen = train(tmp_path / "run", model)
    optimizer = SGD(twin.parameters(), lr=0.1)
    for step in range(6):
        for position in range(2):
            generator = torch.Generator().manual_seed(10 * step + position)
            twin(torch.randn(5, 4, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in buffers(twin).items():
        torch.testing.assert_close(seen[-1][name], tensor, rtol=0, atol=0, equal_nan=True)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), twin.parameters(), strict=True))


def test_buffers_in_evaluation_mode_do_not_change_and_are_not_recorded(tmp_path: Path) -> None:
    train(tmp_path / "run", normalised().eval())
    run = Run(tmp_path / "run")
    assert run.manifest.buffers == ()
    assert run.buffers(0) == {}
    assert run.manifest.unrecorded_changes == ()


# --- Parameters left out --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patterns", [["3.*"], ["!0.*", "!1.*"]])
def test_a_parameter_left_out_is_in_the_table_and_in_no_theta(tmp_path: Path, patterns: list[str]) -> None:
    model = normalised()
    for name, tensor in model.named_parameters():
        tensor.requires_grad_(name.startswith("3."))
    train(tmp_path / "run", model, parameters=patterns)
    run = Run(tmp_path / "run")
    status = {parameter.name: parameter.status for parameter in run.manifest.parameters}
    left_out = {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert {name for name, word in status.items() if word == "not_recorded"} == left_out
    assert set(status) - left_out == {"3.weight", "3.bias"}
    assert list(run.parameters(0)) == ["3.weight", "3.bias"]
    assert set(run.untrained()) == left_out  # constant, so that replay can set them
    assert run.manifest.unrecorded_changes == ()


def test_a_parameter_left_out_that_moves_is_a_warning_and_named_in_the_manifest(tmp_path: Path) -> None:
    with pytest.warns(RecorderWarning, match=r"0\.bias, 0\.weight change in training.*cannot be replayed"):
        train(tmp_path / "run", normalised(), parameters=["!0.*"])
    run = Run(tmp_path / "run")
    assert run.manifest.unrecorded_changes == ("0.bias", "0.weight")
    assert run.steps == [0, 1, 2, 3, 4, 5]


def test_the_warning_comes_while_the_training_runs_and_once(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(tmp_path / "run", normalised(), parameters=["!0.*"], steps=70)
    of_recorder = [entry for entry in caught if entry.category is not UnmappedParameterWarning]
    assert [entry.category for entry in of_recorder] == [RecorderWarning]
