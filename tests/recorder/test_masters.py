"""What is recorded of a 16-bit training is what the optimizer updates, and a skipped update is no step."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import recorder
from recorder.errors import JoinError, UsageError
from recorder.masters import masters_by_first_name, names_within, views_of
from recorder.runformat import Run
from recorder.table import Parameter
from recorder.watched import Watched

# The small models below have names that no naming rule knows.
pytestmark = pytest.mark.filterwarnings("ignore::recorder.parameters.UnmappedParameterWarning")

Theta = dict[str, torch.Tensor]
shapes = st.lists(st.lists(st.integers(1, 4), max_size=3).map(tuple), min_size=1, max_size=6)


class Net(nn.Module):
    """Tied weights, and a layer that nothing reads."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.first, self.second, self.dead = (nn.Linear(4, 4, dtype=dtype) for _ in range(3))
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(torch.tanh(self.first(x)))
        return out


def backward(model: nn.Module, factor: float = 1.0) -> None:
    (model(torch.ones(3, 4, dtype=next(model.parameters()).dtype)).float().sum() * factor).backward()


class Masters:
    """A loop's float32 masters: one for each parameter, or one flat tensor for all of them."""

    def __init__(self, model: nn.Module, *, flat: bool) -> None:
        self.parameters = dict(model.named_parameters())
        copies = [parameter.detach().float() for parameter in self.parameters.values()]
        self.flat = torch.cat([copy.reshape(-1) for copy in copies]).requires_grad_() if flat else None
        self.by_name: Theta = (
            dict(zip(self.parameters, (copy.requires_grad_() for copy in copies), strict=True))
            if self.flat is None
            else views_of(self.flat, self.parameters)
        )

    @property
    def updated(self) -> list[torch.Tensor]:
        return list(self.by_name.values()) if self.flat is None else [self.flat]

    def take_gradients(self) -> None:
        """As trainers do: a parameter without a gradient has zeros in its master's."""
        gradients = [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for parameter in self.parameters.values()
        ]
        if self.flat is not None:
            self.flat.grad = torch.cat([gradient.reshape(-1) for gradient in gradients]).float()
            return
        for master, gradient in zip(self.by_name.values(), gradients, strict=True):
            master.grad = gradient.float()

    def give_parameters(self) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.by_name[name])


either_kind = pytest.mark.parametrize("flat", [False, True], ids=["a list", "one flat tensor"])

# --- Whose memory it is ---------------------------------------------------------------------------------------------


@given(shapes, st.data())
def test_the_parts_of_flat_masters_are_found_by_their_memory_in_their_order(
    shapes: list[tuple[int, ...]], data: st.DataObject
) -> None:
    parameters = {f"p{number}": torch.zeros(shape) for number, shape in enumerate(shapes)}
    names = list(parameters)
    cut = data.draw(st.integers(0, len(names)))
    groups = [group for group in (names[:cut], names[cut:]) if group]
    flats = [torch.arange(float(sum(parameters[name].numel() for name in group))) for group in groups]
    views: Theta = {}
    for flat, group in zip(flats, groups, strict=True):
        views |= views_of(flat, {name: parameters[name] for name in group})
    assert [views[name].shape for name in names] == [parameters[name].shape for name in names]
    shuffled = {name: views[name] for name in data.draw(st.permutations(names))}
    assert names_within(flats, shuffled) == [tuple(group) for group in groups]
    for flat, group in zip(flats, groups, strict=True):
        assert torch.equal(torch.cat([views[name].reshape(-1) for name in group]), flat)
    stranger = torch.zeros(3)
    assert names_within([stranger, views[names[0]]], shuffled) == [(), (names[0],)]


def test_a_flat_master_of_another_length_is_refused() -> None:
    with pytest.raises(UsageError, match=r"shape \(7,\) is not that of 1 parameters: .* its shape should be \(6,\)"):
        views_of(torch.zeros(7), {"weight": torch.zeros(2, 3)})


def test_masters_of_no_parameter_or_of_another_shape_are_refused_and_tied_weights_have_one() -> None:
    model = Net()
    master = torch.zeros(4, 4)
    assert masters_by_first_name(model, {"second.weight": master}) == {"first.weight": master}
    with pytest.raises(UsageError, match=r"1 names that are no parameters of the model.*first 'third\.weight'"):
        masters_by_first_name(model, {"third.weight": master})
    with pytest.raises(UsageError, match=r"master of 'first\.bias' has shape \(4, 4\), the parameter \(4,\)"):
        masters_by_first_name(model, {"first.bias": master})


# --- The model under watch ------------------------------------------------------------------------------------------


@either_kind
def test_the_masters_are_recorded_and_the_models_own_dtype_is_told(flat: bool) -> None:
    model = Net()
    masters = Masters(model, flat=flat)
    watched = Watched(model, SGD(masters.updated, lr=0.5), masters=masters.by_name)
    backward(model)
    masters.take_gradients()
    watched.settle_table()
    assert {(row.dtype, row.model_dtype) for row in watched.table} == {("float32", "bfloat16")}
    assert {row.name for row in watched.table if not row.trained} == {"dead.weight", "dead.bias"}
    live = watched.live()
    assert list(live) == ["first.weight", "first.bias", "second.bias"]
    assert all(live[name].data_ptr() == masters.by_name[name].data_ptr() for name in live)
    (group,) = watched.optimizer_facts().groups
    assert group["parameters"] == list(masters.parameters)
    assert group.get("names_per_tensor") == ([5] if flat else None)
    gradients = [parameter.grad.float() for parameter in masters.parameters.values() if parameter.grad is not None]
    assert watched.gradient_norm() == pytest.approx(float(torch.nn.utils.get_total_norm(gradients)), rel=1e-6)


def test_parameters_updated_in_16_bit_are_recorded_as_they_are() -> None:
    model = Net(torch.float16)
    watched = Watched(model, SGD(model.parameters(), lr=0.5))
    backward(model, factor=100.0)
    watched.settle_table()
    assert {(row.dtype, row.model_dtype) for row in watched.table} == {("float16", None)}
    assert all(tensor.dtype == torch.float16 for tensor in watched.copies(trained=True).values())


def test_a_row_of_the_table_keeps_the_models_dtype_and_leaves_it_out_where_there_is_none() -> None:
    row = Parameter(name="w", shape=(2,), dtype="float32", model_dtype="float16")
    assert Parameter.from_dict(row.to_dict()) == row
    assert row.computed_dtype == "float16"
    plain = dataclasses.replace(row, model_dtype=None)
    assert "model_dtype" not in plain.to_dict()
    assert Parameter.from_dict(plain.to_dict()) == plain
    assert plain.computed_dtype == "float32"


@either_kind
def test_where_the_loop_drops_the_models_gradients_the_masters_own_tell_who_is_trained(flat: bool) -> None:
    model = Net()
    masters = Masters(model, flat=flat)
    watched = Watched(model, SGD(masters.updated, lr=0.5), masters=masters.by_name)
    backward(model)
    masters.take_gradients()
    model.zero_grad()
    watched.settle_table()
    assert {row.name for row in watched.table if not row.trained} == {"dead.weight", "dead.bias"}


def test_an_optimizer_over_copies_is_refused_unless_masters_says_whose_they_are() -> None:
    model = Net()
    masters = Masters(model, flat=False)
    watched = Watched(model, SGD(masters.updated, lr=0.5))
    with pytest.raises(UsageError, match=r"updates 5 tensors that are no parameters.*masters=\{name: copy\}"):
        watched.settle_table()


def test_a_flat_tensor_with_entries_that_belong_to_nobody_is_refused() -> None:
    model = Net()
    masters = Masters(model, flat=True)
    del masters.by_name["second.bias"]
    watched = Watched(model, SGD(masters.updated, lr=0.5), masters=masters.by_name)
    with pytest.raises(UsageError, match=r"a tensor of 44 entries, of which only 40 belong .*first 'first\.weight'"):
        watched.settle_table()


def test_a_flat_master_moved_to_other_memory_is_noticed_before_anything_stale_is_recorded() -> None:
    model = Net()
    masters = Masters(model, flat=True)
    assert masters.flat is not None
    watched = Watched(model, SGD(masters.updated, lr=0.5), masters=masters.by_name)
    backward(model)
    masters.take_gradients()
    watched.settle_table()
    masters.flat.data = masters.flat.data.clone()
    with pytest.raises(UsageError, match="updates 1 tensors that are no parameters of the model"):
        watched.find_first_gradients()


@either_kind
def test_weight_decay_of_a_dead_parameters_master_is_no_unrecorded_change(flat: bool) -> None:
    model = Net()
    masters = Masters(model, flat=flat)
    optimizer = SGD(masters.updated, lr=0.5, weight_decay=0.1)
    watched = Watched(model, optimizer, masters=masters.by_name)
    backward(model)
    masters.take_gradients()
    watched.settle_table()
    before = masters.by_name["dead.weight"].detach().clone()
    optimizer.step()
    assert not torch.equal(masters.by_name["dead.weight"], before)
    assert not watched.find_unrecorded_changes()
    # Should it turn out not to be dead, the steps before lack what the decay did to it.
    model.zero_grad()
    (model.dead(torch.ones(1, 4, dtype=torch.bfloat16)).sum() * 1.0).backward()
    masters.take_gradients()
    assert watched.find_first_gradients()
    assert watched.find_unrecorded_changes()
    assert watched.unrecorded_changes == {"dead.weight", "dead.bias"}


def test_autocast_is_told_only_inside_of_it() -> None:
    model = Net(torch.float32)
    watched = Watched(model, SGD(model.parameters(), lr=0.5))
    assert watched.autocast.now() is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert watched.autocast.now() == "bfloat16"
    with torch.autocast("cpu", enabled=False):
        assert watched.autocast.now() is None


# --- Updates that a gradient scaler skips ---------------------------------------------------------------------------


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("kind", ["own", "a list", "one flat tensor"])
def test_gradients_are_dropped_once_model_and_masters_hold_none_but_zeros(kind: str, set_to_none: bool) -> None:
    model = Net()
    masters = None if kind == "own" else Masters(model, flat=kind == "one flat tensor")
    optimizer = SGD(model.parameters() if masters is None else masters.updated, lr=0.5)
    watched = Watched(model, optimizer, masters=None if masters is None else masters.by_name)
    assert watched.gradients_dropped()
    backward(model)
    assert not watched.gradients_dropped()
    if masters is not None:
        masters.take_gradients()
        model.zero_grad(set_to_none=set_to_none)
        assert not watched.gradients_dropped()  # gathered in the masters
    optimizer.zero_grad(set_to_none=set_to_none)
    assert watched.gradients_dropped()


def test_gradients_that_another_optimizer_leaves_behind_do_not_count() -> None:
    model = Net()
    watched = Watched(model, SGD([model.first.weight], lr=0.5))
    backward(model)
    model.first.weight.grad = None
    assert model.first.bias.grad is not None
    assert watched.gradients_dropped()


@pytest.mark.parametrize("factor", [1.0, float("inf"), float("nan")])
def test_gradients_that_overflow_are_not_finite(factor: float) -> None:
    model = Net(torch.float16)
    watched = Watched(model, SGD(model.parameters(), lr=0.5))
    assert watched.gradients_finite()
    backward(model, factor)
    assert watched.gradients_finite() == (factor == 1.0)


def test_a_fused_optimizer_tells_that_it_skips_and_its_norm_is_without_the_scale() -> None:
    model = Net(torch.float32)
    optimizer = Adam(model.parameters(), lr=0.1, fused=True)
    watched = Watched(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    told: list[tuple[bool, float]] = []
    optimizer.register_step_pre_hook(lambda *_: told.append((watched.skipped(), watched.gradient_norm())))
    for factor in (1.0, float("inf")):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(3, 4)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert [skips for skips, _ in told] == [False, True]
    assert not watched.skipped()  # only while the optimizer runs
    fresh = Net(torch.float32)
    backward(fresh)
    gradients = [parameter.grad for parameter in fresh.parameters() if parameter.grad is not None]
    assert told[0][1] == pytest.approx(float(torch.nn.utils.get_total_norm(gradients)), rel=1e-6)


# --- Whole trainings ------------------------------------------------------------------------------------------------


@either_kind
@pytest.mark.parametrize(
    "make_optimizer",
    [lambda updated: SGD(updated, lr=0.05, momentum=0.9), lambda updated: AdamW(updated, lr=1e-3)],
    ids=["SGD", "AdamW"],
)
def test_the_masters_of_every_step_are_recorded_bit_for_bit(
    tmp_path: Path, flat: bool, make_optimizer: Callable[[Any], Optimizer]
) -> None:
    model = Net()
    masters = Masters(model, flat=flat)
    optimizer = make_optimizer(masters.updated)
    seen = []
    with recorder.watch(model, optimizer, run=tmp_path / "run", masters=masters.by_name, strict=True) as rec:
        for step in range(6):
            seen.append({name: master.detach().clone() for name, master in masters.by_name.items()})
            rec.batch([step])
            backward(model)
            masters.take_gradients()
            optimizer.step()
            masters.give_parameters()
            model.zero_grad()
    seen.append({name: master.detach().clone() for name, master in masters.by_name.items()})
    run = Run(tmp_path / "run")
    assert run.steps == list(range(6))
    for t, expected in enumerate(seen):
        theta = run.parameters(t)
        assert list(theta) == ["first.weight", "first.bias", "second.bias"]
        assert all(theta[name].dtype == torch.float32 for name in theta)
        assert all(torch.equal(theta[name], expected[name]) for name in theta)
    assert any(
        not torch.equal(one["first.bias"].bfloat16().float(), one["first.bias"]) for one in seen[1:]
    )  # the model's own would not be the same
    assert {row.model_dtype for row in run.manifest.parameters} == {"bfloat16"}
    assert run.manifest.unrecorded_changes == ()


@pytest.mark.parametrize(
    ("kept", "joined"), [("masters", "verified"), ("model", "verified within the rounding of 16 bits")]
)
def test_a_join_says_whether_the_masters_came_back_whole_or_rounded(tmp_path: Path, kept: str, joined: str) -> None:
    model = Net()
    masters = Masters(model, flat=False)
    _train(model, masters, tmp_path / "run")
    if kept == "model":
        masters = Masters(model, flat=False)
    _train(model, masters, tmp_path / "run", first_step=2)
    assert [attempt.joined for attempt in Run(tmp_path / "run").manifest.attempts] == ["first", joined]


def test_a_join_with_another_model_is_no_matter_of_rounding(tmp_path: Path) -> None:
    model = Net()
    _train(model, Masters(model, flat=False), tmp_path / "run")
    with torch.no_grad():
        model.first.bias.mul_(1.01)
    with pytest.raises(JoinError, match=r"1 of 3 parameters differ .*first 'first.bias'"):
        _train(model, Masters(model, flat=False), tmp_path / "run", first_step=2)


def _train(model: Net, masters: Masters, run: Path, first_step: int = 0) -> None:
    optimizer = SGD(masters.updated, lr=0.05)
    with recorder.watch(model, optimizer, run=run, masters=masters.by_name, first_step=first_step, strict=True) as rec:
        for step in range(2):
            rec.batch([step])
            backward(model)
            masters.take_gradients()
            optimizer.step()
            masters.give_parameters()
            model.zero_grad()


@pytest.mark.parametrize("fused", [False, True], ids=["not called", "called, and does nothing"])
@pytest.mark.parametrize("zero_first", [False, True], ids=["zeroed after the step", "zeroed before the batch"])
def test_updates_that_the_gradient_scaler_skips_are_no_steps_and_their_batches_belong_to_none(
    tmp_path: Path, fused: bool, zero_first: bool
) -> None:
    model = Net(torch.float32)
    optimizer = Adam(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    factors = [float("inf"), 1.0, 1.0, float("inf"), float("inf"), 1.0]
    seen = [model.first.bias.detach().clone()]
    positions = itertools.count()
    with recorder.watch(model, optimizer, run=tmp_path / "run", strict=True) as rec:
        for factor in factors:
            if zero_first:
                optimizer.zero_grad()
            for micro_batch_factor in (1.0, factor):
                rec.batch([next(positions)])
                scaler.scale(model(torch.ones(3, 4)).sum() * micro_batch_factor).backward()
            scaler.step(optimizer)
            scaler.update()
            if not zero_first:
                optimizer.zero_grad()
            if factor == 1.0:
                seen.append(model.first.bias.detach().clone())
    run = Run(tmp_path / "run")
    assert run.steps == [0, 1, 2]
    assert [[micro.indices.item() for micro in run.step(t).micro_batches] for t in run.steps] == [
        [2, 3],
        [4, 5],
        [10, 11],
    ]
    assert all(torch.equal(run.parameters(t)["first.bias"], expected) for t, expected in enumerate(seen))
