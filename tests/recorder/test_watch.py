from __future__ import annotations

import copy
import dataclasses
import gc
import random
import re
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import recorder
from recorder import durable, growing, recordedonce, segments, tensorfile
from recorder.errors import UsageError
from recorder.lock import LOCK_FILE
from recorder.manifest import MANIFEST_FILE, Manifest
from recorder.parameters import UnmappedParameterWarning
from recorder.recording import GRADIENT_NORMS, RecorderWarning, Recording
from recorder.runfolder import BALLAST_FILE, refuse_what_is_no_run
from recorder.runformat import Run
from tests.cases import LanguageModelling, train

# The small models below have names that no naming rule knows.
pytestmark = pytest.mark.filterwarnings("ignore::recorder.parameters.UnmappedParameterWarning")

Theta = dict[str, torch.Tensor]
MakeOptimizer = Callable[[Any], Optimizer]


def perceptron(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 3))


def parameters(model: nn.Module) -> Theta:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def forward_and_backward(model: nn.Module, step: int, position: int = 0) -> None:
    generator = torch.Generator().manual_seed(100 * step + position)
    model(torch.randn(5, 4, generator=generator)).square().sum().backward()


def record(
    run: Path,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    steps: int = 5,
    before: Callable[[Recording, int], None] = lambda recording, step: None,
    **watch_arguments: Any,
) -> list[Theta]:
    """Train with the recorder on; return what the loop saw: all parameters before the first and after every step."""
    seen = [parameters(model)]
    with recorder.watch(model, optimizer, run=run, **watch_arguments) as rec:
        for step in range(steps):
            before(rec, step)
            rec.batch([step])
            forward_and_backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
            seen.append(parameters(model))
    return seen


def assert_equal(found: Any, expected: Any) -> None:
    """Equal to the bit, tensors in nests of dicts included."""
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_equal(found[key], expected[key])
    elif isinstance(expected, tuple | list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    elif isinstance(expected, np.ndarray):
        np.testing.assert_array_equal(found, expected)
    else:
        assert found == expected


# --- The parameters of every step -----------------------------------------------------------------------------------


@pytest.mark.parametrize("segment_steps", [1, 2, 5, 16])
def test_the_parameters_of_every_step_are_those_that_the_loop_saw(tmp_path: Path, segment_steps: int) -> None:
    model = perceptron()
    seen = record(tmp_path / "run", model, Adam(model.parameters(), lr=0.1), segment_steps=segment_steps)
    run = Run(tmp_path / "run")
    assert run.manifest.state == "complete"
    assert run.steps == [0, 1, 2, 3, 4]
    for t, theta in enumerate(seen):
        assert_equal(run.parameters(t), theta)
    assert not torch.equal(seen[4]["0.weight"], seen[5]["0.weight"])


@pytest.mark.parametrize(
    ("steps", "segment_steps", "first_step", "expected"),
    [
        (5, 2, 0, [(0, 2), (2, 4), (4, 5)]),
        (4, 2, 0, [(0, 2), (2, 4)]),
        (3, 16, 0, [(0, 3)]),
        (5, 3, 1000, [(1000, 1003), (1003, 1005)]),
    ],
)
def test_segments_hold_so_many_steps_the_last_one_the_rest(
    tmp_path: Path, steps: int, segment_steps: int, first_step: int, expected: list[tuple[int, int]]
) -> None:
    model = perceptron()
    seen = record(
        tmp_path / "run",
        model,
        SGD(model.parameters(), lr=0.1),
        steps=steps,
        segment_steps=segment_steps,
        first_step=first_step,
    )
    run = Run(tmp_path / "run")
    assert run.segments == expected
    assert run.consecutive == [(first_step, first_step + steps)]
    for start, stop in expected:  # each is whole by itself: θ at both its ends
        segment = segments.Segment(segments.segment_file(run.path, start, stop))
        for t in range(start, stop + 1):
            found = segment.parameters(t)
            assert_equal({name: found[name] for name in seen[0]}, seen[t - first_step])
    assert [run.step(t).step for t in run.steps] == run.steps
    with pytest.raises(UsageError, match=f"step {first_step + steps} is not recorded"):
        run.step(first_step + steps)


def test_the_steps_of_a_finished_segment_are_on_disk_while_the_training_still_runs(tmp_path: Path) -> None:
    states: list[tuple[str, list[int]]] = []

    def look(rec: Recording, step: int) -> None:
        if step:
            rec.flush()  # writing goes on beside the training
            run = Run(tmp_path / "run")
            states.append((run.manifest.state, run.steps))

    model = perceptron()
    record(tmp_path / "run", model, SGD(model.parameters(), lr=0.1), steps=4, segment_steps=2, before=look)
    assert states == [("recording", []), ("recording", [0, 1]), ("recording", [0, 1])]


def test_a_lost_segment_leaves_the_others_readable_and_the_gap_is_named(tmp_path: Path) -> None:
    model = perceptron()
    seen = record(tmp_path / "run", model, SGD(model.parameters(), lr=0.1), steps=6, segment_steps=2)
    segments.segment_file(tmp_path / "run", 2, 4).unlink()
    run = Run(tmp_path / "run")
    assert run.consecutive == [(0, 2), (4, 6)]
    assert_equal(run.parameters(2), seen[2])  # the end of the segment before
    assert_equal(run.parameters(4), seen[4])
    for read in (run.parameters, run.step):
        with pytest.raises(UsageError, match="step 3 is not recorded; recorded are steps 0-1, 4-5"):
            read(3)


def test_a_segment_under_another_segments_name_is_refused(tmp_path: Path) -> None:
    model = perceptron()
    record(tmp_path / "run", model, SGD(model.parameters(), lr=0.1), steps=2, segment_steps=2)
    file = segments.segment_file(tmp_path / "run", 0, 2)
    file.rename(file.with_name("001-00000002-00000004.safetensors"))
    with pytest.raises(ValueError, match=r"found attempt 1, steps 0 to 1, process 0; was it renamed\?"):
        Run(tmp_path / "run").parameters(2)


# --- The training is not changed ------------------------------------------------------------------------------------


def _everything(run: Path | None, make_optimizer: MakeOptimizer, dropout: float, micro_batches: int) -> dict[str, Any]:
    """Train with or without the recorder; return all that a training leaves behind."""
    model = perceptron(dropout)
    optimizer = make_optimizer(model.parameters())
    torch.manual_seed(11)
    np.random.seed(12)  # noqa: NPY002 (the global generator is what could be disturbed)
    random.seed(13)
    rec = None if run is None else recorder.watch(model, optimizer, run=run, segment_steps=2)
    for step in range(5):
        for _ in range(micro_batches):
            batch = torch.randn(5, 4) + random.random() + np.random.rand()  # noqa: NPY002
            if rec is not None:
                rec.batch(torch.randint(9, (5,), generator=torch.Generator().manual_seed(step)), {"x": batch})
            loss = model(batch).square().sum()
            if rec is not None:
                rec.loss(loss, 5)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if rec is not None:
        rec.close()
    return {
        "parameters": parameters(model),
        "optimizer": optimizer.state_dict(),
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),  # noqa: NPY002
        "python": random.getstate(),
    }


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda tensors: SGD(tensors, lr=0.05),
        lambda tensors: SGD(tensors, lr=0.05, momentum=0.9, nesterov=True),
        lambda tensors: Adam(tensors, lr=0.05),
        lambda tensors: AdamW(tensors, lr=0.05, weight_decay=0.1),
    ],
    ids=["sgd", "momentum", "adam", "adamw"],
)
def test_a_recorded_training_ends_bit_identical_to_one_without_the_recorder(
    tmp_path: Path, make_optimizer: MakeOptimizer, dropout: float, micro_batches: int
) -> None:
    recorded = _everything(tmp_path / "run", make_optimizer, dropout, micro_batches)
    assert_equal(recorded, _everything(None, make_optimizer, dropout, micro_batches))
    assert_equal(Run(tmp_path / "run").parameters(5), recorded["parameters"])


# --- What is recorded of a step besides the parameters --------------------------------------------------------------


def test_micro_batches_losses_and_counts_are_recorded_in_their_order(tmp_path: Path) -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)
    seen: list[list[tuple[list[int], dict[str, Any], torch.Tensor, float]]] = []
    torch.manual_seed(77)
    with recorder.watch(model, optimizer, run=tmp_path / "run", segment_steps=2) as rec:
        for step in range(3):
            rec.epoch = 1 + step // 2
            seen.append([])
            for position in range(step + 1):  # as many micro-batches as the step's number, and one
                # In no alphabetical order: a model may take the values as they come.
                batch: dict[str, Any] = {"x": torch.randn(2, 4), "weights": (None, [float("nan"), 0.5])}
                state = torch.get_rng_state()
                indices = [10 * step + position, 7]
                rec.batch(np.array(indices) if position else torch.tensor(indices), batch)
                loss = model(batch["x"]).square().sum()
                rec.loss(loss, torch.tensor(2 + position))
                loss.backward()
                seen[-1].append((indices, batch, state, loss.item()))
            optimizer.step()
            optimizer.zero_grad()
    run = Run(tmp_path / "run")
    for t, expected in enumerate(seen):
        step_ = run.step(t)
        assert (step_.step, step_.epoch, step_.seed, step_.learning_rates) == (t, 1 + t // 2, 77, (0.1,))
        assert step_.predictions == sum(2 + position for position in range(t + 1))
        assert len(step_.micro_batches) == t + 1
        for position, (indices, batch, state, loss_sum) in enumerate(expected):
            micro_batch = step_.micro_batches[position]
            assert_equal(micro_batch.indices, torch.tensor(indices))
            assert list(micro_batch.batch()) == list(batch)
            assert_equal(micro_batch.batch()["x"], batch["x"])
            assert repr(micro_batch.batch()["weights"]) == repr(batch["weights"])
            assert micro_batch.checksums == {"batch.x": tensorfile.checksum(batch["x"])}
            assert_equal(micro_batch.random_state["rng_cpu"], state)
            assert micro_batch.stored
            assert (micro_batch.loss_sum, micro_batch.predictions) == (loss_sum, 2 + position)


def test_recording_indices_only_keeps_the_checksums_and_not_the_tensors(tmp_path: Path) -> None:
    train(tmp_path / "run", steps=2, batches="indices")
    run = Run(tmp_path / "run")
    assert run.manifest.batches == "indices"
    micro_batch = run.step(1).micro_batches[1]
    assert not micro_batch.stored
    assert micro_batch.tensors == {}
    again = LanguageModelling().batch(micro_batch.indices.tolist(), split="train", epoch=1)
    assert micro_batch.checksums == {"batch.tokens": tensorfile.checksum(again["tokens"])}


def test_what_the_loop_did_not_tell_is_recorded_as_unknown(tmp_path: Path) -> None:
    model = perceptron()
    record(tmp_path / "run", model, SGD(model.parameters(), lr=0.1), steps=1)
    step = Run(tmp_path / "run").step(0)
    (micro_batch,) = step.micro_batches
    assert (micro_batch.nest, micro_batch.loss_sum, micro_batch.predictions) == (None, None, None)
    assert not micro_batch.stored
    assert np.isnan(step.predictions)


def test_the_learning_rate_is_the_one_used_in_the_step_for_every_group(tmp_path: Path) -> None:
    model = perceptron()
    groups: list[dict[str, Any]] = [{"params": model[0].parameters(), "lr": 0.4}, {"params": model[3].parameters()}]
    optimizer = SGD(groups, lr=0.8)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)

    def after_the_last_step(rec: Recording, step: int) -> None:
        if step:
            scheduler.step()

    record(tmp_path / "run", model, optimizer, steps=3, before=after_the_last_step)
    run = Run(tmp_path / "run")
    assert [run.step(t).learning_rates for t in run.steps] == [(0.4, 0.8), (0.2, 0.4), (0.1, 0.2)]
    recorded = run.manifest.optimizer
    assert recorded.name == "torch.optim.sgd.SGD"
    assert [group["parameters"] for group in recorded.groups] == [["0.weight", "0.bias"], ["3.weight", "3.bias"]]
    assert [group["lr"] for group in recorded.groups] == [0.4, 0.8]


def test_a_diverged_training_is_recorded_to_its_end(tmp_path: Path) -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1, weight_decay=float("inf"))
    with recorder.watch(model, optimizer, run=tmp_path / "run") as rec:
        for step, (loss, rate) in enumerate([(float("nan"), 0.1), (float("inf"), float("nan"))]):
            rec.batch([step])
            rec.loss(loss, 1)
            optimizer.param_groups[0]["lr"] = rate
            forward_and_backward(model, step)
            optimizer.step()
    run = Run(tmp_path / "run")
    assert run.manifest.state == "complete"
    assert run.manifest.optimizer.groups[0]["weight_decay"] == "inf"
    assert [repr(run.step(t).micro_batches[0].loss_sum) for t in run.steps] == ["nan", "inf"]
    assert [repr(run.step(t).learning_rates) for t in run.steps] == ["(0.1,)", "(nan,)"]
    assert bool(run.parameters(2)["0.weight"].isnan().any())


def test_the_gradient_norm_of_the_first_steps_is_that_of_all_gradients_together(tmp_path: Path) -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)
    norms = []
    with recorder.watch(model, optimizer, run=tmp_path / "run") as rec:
        for step in range(GRADIENT_NORMS + 1):
            rec.batch([step])
            forward_and_backward(model, step)
            gradients = [tensor.grad.double().flatten() for tensor in model.parameters() if tensor.grad is not None]
            norms.append(float(torch.cat(gradients).norm()))
            optimizer.step()
            optimizer.zero_grad()
    run = Run(tmp_path / "run")
    assert [run.step(t).gradient_norm for t in range(GRADIENT_NORMS)] == pytest.approx(norms[:-1], rel=1e-6)
    assert run.step(GRADIENT_NORMS).gradient_norm is None


def test_sparse_gradients_are_no_obstacle(tmp_path: Path) -> None:
    model = nn.Embedding(7, 3, sparse=True)
    optimizer = SGD(model.parameters(), lr=0.1)
    with recorder.watch(model, optimizer, run=tmp_path / "run") as rec:
        rec.batch([0])
        model(torch.tensor([1, 1, 5])).sum().backward()
        optimizer.step()
    run = Run(tmp_path / "run")
    assert_equal(run.parameters(1)["weight"], model.weight.detach())
    assert run.step(0).gradient_norm == pytest.approx((3 * 2**2 + 3 * 1**2) ** 0.5)


def test_an_update_that_the_gradient_scaler_skips_is_no_step(tmp_path: Path) -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with recorder.watch(model, optimizer, run=tmp_path / "run") as rec:
        for index, factor in enumerate([1.0, float("inf"), 1.0]):
            rec.forget_pending()
            rec.batch([index])
            scaler.scale(model(torch.ones(1, 4)).sum() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    run = Run(tmp_path / "run")
    assert [[micro.indices.tolist() for micro in run.step(t).micro_batches] for t in run.steps] == [[[0]], [[2]]]


# --- Which parameters are in the ledger -----------------------------------------------------------------------------


class Branches(nn.Module):
    """A trunk, a branch that joins later, one that never does, a frozen scale, and a tied copy of the trunk."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.trunk, self.late, self.never = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.trunk.weight
        self.scale = nn.Parameter(torch.ones(4), requires_grad=False)
        self.joined = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.tied(torch.tanh(self.trunk(x))) * self.scale
        out: torch.Tensor = self.late(x) if self.joined else x
        return out


def test_untrained_frozen_and_tied_tensors_are_recorded_once(tmp_path: Path) -> None:
    model = Branches()
    initial = parameters(model)
    record(tmp_path / "run", model, Adam(model.parameters(), lr=0.1), steps=3)
    run = Run(tmp_path / "run")
    status = {parameter.name: parameter.status for parameter in run.manifest.parameters}
    untrained = {"late.weight", "late.bias", "never.weight", "never.bias", "scale"}
    assert {name for name, word in status.items() if word == "untrained"} == untrained
    assert set(status) == set(initial)
    assert set(run.untrained()) == untrained
    for name in untrained:
        assert_equal(run.untrained()[name], initial[name])
    stored = tensorfile.TensorFile(segments.segment_file(run.path, 0, 3)).names
    names = {name.split("/", 2)[2] for name in stored if name.startswith("parameters/00000000/")}
    assert names == {"trunk.weight", "trunk.bias", "tied.bias"}  # the tied weight under its first name only
    (trunk,) = (parameter for parameter in run.manifest.parameters if parameter.name == "trunk.weight")
    assert trunk.aliases == ("tied.weight",)


@pytest.mark.parametrize("first", [2, 3], ids=["first of a segment", "within a segment"])
@pytest.mark.parametrize("unfrozen", [False, True], ids=["first used", "unfrozen and added as a group"])
def test_a_parameter_with_a_late_first_gradient_reads_back_its_constant_value_before(
    tmp_path: Path, unfrozen: bool, first: int
) -> None:
    model = Branches()
    if unfrozen:
        model.joined = True
        model.late.requires_grad_(False)
        optimizer = SGD([tensor for tensor in model.parameters() if tensor.requires_grad], lr=0.1)
    else:
        optimizer = SGD(model.parameters(), lr=0.1)

    def join(rec: Recording, step: int) -> None:
        if step == first:
            model.joined = True
            if unfrozen:
                model.late.requires_grad_(True)
                optimizer.add_param_group({"params": list(model.late.parameters()), "lr": 0.05})

    seen = record(tmp_path / "run", model, optimizer, steps=6, segment_steps=2, before=join)
    run = Run(tmp_path / "run")
    in_ledger = [parameter.name for parameter in run.manifest.trained]
    assert in_ledger == ["trunk.weight", "trunk.bias", "late.weight", "late.bias", "tied.bias"]
    for t, theta in enumerate(seen):
        assert_equal(run.parameters(t), {name: theta[name] for name in in_ledger})
    assert torch.equal(seen[first]["late.weight"], seen[0]["late.weight"])
    assert not torch.equal(seen[first + 1]["late.weight"], seen[first]["late.weight"])


@pytest.mark.parametrize("first", [3, 4, 6], ids=["not kept", "not kept, alone", "kept"])
def test_a_parameter_with_its_first_gradient_between_selected_steps_is_recorded_from_then_on(
    tmp_path: Path, first: int
) -> None:
    model = Branches()

    def join(rec: Recording, step: int) -> None:
        model.joined = step in (first, 9, 10)  # not again before steps 6 and 7 are recorded
        rec.batch([step])

    optimizer = SGD(model.parameters(), lr=0.1)
    seen = [parameters(model)]
    with recorder.watch(model, optimizer, run=tmp_path / "run", steps="0:3,6:8,10:12") as rec:
        for step in range(13):
            join(rec, step)
            forward_and_backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
            seen.append(parameters(model))
    run = Run(tmp_path / "run")
    assert run.manifest.unrecorded_changes == ()
    in_ledger = [parameter.name for parameter in run.manifest.trained]
    assert "late.weight" in in_ledger
    for t in (0, 1, 2, 3, 6, 7, 8, 10, 11, 12):
        assert_equal(run.parameters(t), {name: seen[t][name] for name in in_ledger})


def test_a_tensor_with_a_gradient_that_no_optimizer_updates_is_untrained(tmp_path: Path) -> None:
    model = perceptron()
    record(tmp_path / "run", model, SGD(model[3].parameters(), lr=0.1), steps=2)
    assert [parameter.name for parameter in Run(tmp_path / "run").manifest.trained] == ["3.weight", "3.bias"]


def test_parameters_of_an_optimizer_that_is_not_watched_are_named(tmp_path: Path) -> None:
    model = perceptron()
    other = SGD(model[0].parameters(), lr=0.1)
    watched = SGD(model[3].parameters(), lr=0.1)
    watched.register_step_post_hook(lambda *_: other.step())
    with pytest.warns(RecorderWarning, match=r"0\.bias, 0\.weight change in training, but no step records them"):
        record(tmp_path / "run", model, watched, steps=2)
    assert Run(tmp_path / "run").manifest.unrecorded_changes == ("0.bias", "0.weight")


def test_parameters_outside_any_naming_rule_are_named_once_at_the_end(tmp_path: Path) -> None:
    model = Branches()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        record(tmp_path / "run", model, SGD(model.parameters(), lr=0.1), steps=2)
    (warning,) = caught
    assert warning.category is UnmappedParameterWarning
    assert str(warning.message).endswith("rules of yours): trunk.weight, trunk.bias, tied.bias")


def test_buffers_that_training_changes_only_after_its_first_step_are_named(tmp_path: Path) -> None:
    model = perceptron()
    model.register_buffer("constant", torch.tensor([1.0, float("nan")]))  # NaN is no change
    model.register_buffer("late", torch.zeros(2))

    def change(rec: Recording, step: int) -> None:
        if step == 1:
            model.get_buffer("late").add_(1)

    with pytest.warns(RecorderWarning, match=r"late change in training.*cannot be replayed"):
        record(tmp_path / "run", model, SGD(model.parameters(), lr=0.1), steps=2, before=change)
    assert Run(tmp_path / "run").manifest.buffers == ()
    assert Run(tmp_path / "run").manifest.unrecorded_changes == ("late",)
    other = perceptron()
    record(tmp_path / "other", other, SGD(other.parameters(), lr=0.1), steps=2)
    assert Run(tmp_path / "other").manifest.unrecorded_changes == ()


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda tensors: Adam(tensors, lr=0.1, amsgrad=True),
        lambda tensors: SGD(tensors, lr=0.1, momentum=0.9),
        lambda tensors: torch.optim.Adafactor(tensors, lr=0.1),
        lambda tensors: torch.optim.NAdam(tensors, lr=0.1),
    ],
    ids=["amsgrad", "momentum", "adafactor", "nadam"],
)
def test_the_state_of_a_resumed_optimizer_is_stored_as_it_was(tmp_path: Path, make_optimizer: MakeOptimizer) -> None:
    model = perceptron()
    optimizer = make_optimizer(model.parameters())
    for step in range(2):
        forward_and_backward(model, step)
        optimizer.step()
    state = copy.deepcopy(optimizer.state_dict()["state"])
    assert state
    record(tmp_path / "run", model, optimizer, steps=2, first_step=2)
    run = Run(tmp_path / "run")
    assert not run.manifest.optimizer.fresh
    found = run.optimizer_state()
    assert found is not None
    assert_equal({index: dict(sorted(found[index].items())) for index in sorted(found)}, _ordered(state))


def _ordered(state: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return {index: dict(sorted(state[index].items())) for index in sorted(state)}


def test_a_fresh_optimizer_has_no_state_file(tmp_path: Path) -> None:
    model = perceptron()
    record(tmp_path / "run", model, Adam(model.parameters(), lr=0.1), steps=1)
    run = Run(tmp_path / "run")
    assert run.manifest.optimizer.fresh
    assert run.optimizer_state() is None
    assert not (run.path / recordedonce.optimizer_file(1)).exists()


# --- When something goes wrong --------------------------------------------------------------------------------------


def test_a_step_without_a_micro_batch_warns_and_the_training_goes_on_unrecorded(tmp_path: Path) -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)
    seen = []
    with recorder.watch(model, optimizer, run=tmp_path / "run") as rec:
        for step in range(5):
            if step < 3:
                rec.batch([step])
            seen.append(parameters(model))
            forward_and_backward(model, step)
            if step == 3:
                with pytest.warns(RecorderWarning, match="step 3 had no micro-batch.*goes on unrecorded"):
                    optimizer.step()
            else:
                optimizer.step()
            optimizer.zero_grad()
    run = Run(tmp_path / "run")
    assert run.manifest.state == (
        "incomplete: UsageError at step 3: step 3 had no micro-batch: call Recording.batch before each forward pass"
    )
    assert run.steps == [0, 1, 2]
    assert_equal(run.parameters(3), seen[3])
    assert not torch.equal(seen[4]["0.weight"], seen[3]["0.weight"])


def test_strict_raises_the_recorders_own_errors_and_keeps_the_steps_before(tmp_path: Path) -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)

    def training() -> None:
        with recorder.watch(model, optimizer, run=tmp_path / "run", strict=True) as rec:
            rec.batch([0])
            for step in range(2):
                forward_and_backward(model, step)
                optimizer.step()

    with pytest.raises(UsageError, match="step 1 had no micro-batch"):
        training()
    run = Run(tmp_path / "run")
    assert run.manifest.state.startswith("incomplete: UsageError at step 1: step 1 had no micro-batch")
    assert run.steps == [0]


def test_a_loss_before_any_micro_batch_is_a_mistake(tmp_path: Path) -> None:
    model = perceptron()
    rec = recorder.watch(model, SGD(model.parameters(), lr=0.1), run=tmp_path / "run", strict=True)
    with pytest.raises(UsageError, match=r"Recording\.loss was called before Recording\.batch"):
        rec.loss(1.0, 1)
    rec.close()


@pytest.mark.parametrize("failing", ["segments", "every file"])
def test_a_full_disk_warns_the_training_goes_on_and_earlier_steps_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    write_all = growing._write_all

    def full(descriptor: int, bodies: Iterable[bytes | memoryview], offset: int | None = None) -> None:
        if offset != 0:  # the room for the header was taken before the disk was full
            raise OSError(28, "No space left on device")
        write_all(descriptor, bodies, offset)

    def full_for_every_file(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    def fill_the_disk(rec: Recording, step: int) -> None:
        if step == 3:
            rec.flush()
            monkeypatch.setattr(growing, "_write_all", full)
            if failing == "every file":
                monkeypatch.setattr(durable, "write", full_for_every_file)

    model, twin = perceptron(), perceptron()
    with pytest.warns(RecorderWarning, match=r"OSError.*No space left on device.*goes on unrecorded"):
        seen = record(
            tmp_path / "run", model, SGD(model.parameters(), lr=0.1), steps=7, segment_steps=2, before=fill_the_disk
        )
    monkeypatch.undo()
    assert_equal(seen, record(tmp_path / "twin", twin, SGD(twin.parameters(), lr=0.1), steps=7))
    run = Run(tmp_path / "run")
    assert run.segments == [(0, 2), (2, 3)]
    for t in range(4):
        assert_equal(run.parameters(t), seen[t])
    expected = "incomplete: OSError at step 3: [Errno 28] No space left on device"
    assert run.manifest.state == (expected if failing == "segments" else "recording")
    left = {path.name for path in run.path.rglob(".*")}
    assert left <= {LOCK_FILE}


def test_space_kept_for_it_lets_the_manifest_say_that_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = durable.write

    def full_but_for_the_ballast(path: Path, body: Callable[[Any], object]) -> None:
        if (tmp_path / "run" / BALLAST_FILE).exists():
            raise OSError(28, "No space left on device")
        write(path, body)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    def fill_the_disk(rec: Recording, step: int) -> None:
        if step == 1:
            rec.flush()
            manifest_bytes = (tmp_path / "run" / MANIFEST_FILE).stat().st_size
            assert (tmp_path / "run" / BALLAST_FILE).stat().st_size >= 2 * manifest_bytes
            monkeypatch.setattr(growing, "_write_all", full)
            monkeypatch.setattr(durable, "write", full_but_for_the_ballast)

    model = perceptron()
    with pytest.warns(RecorderWarning, match="No space left on device"):
        record(tmp_path / "run", model, SGD(model.parameters(), lr=0.1), steps=4, before=fill_the_disk)
    assert Manifest.read(tmp_path / "run").state == "incomplete: OSError at step 1: [Errno 28] No space left on device"


def test_a_step_that_cannot_be_put_together_ends_the_recording_and_not_the_training(tmp_path: Path) -> None:
    model, twin = perceptron(), perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)
    steps = 80  # more than can wait to be written

    def training() -> None:
        with recorder.watch(model, optimizer, run=tmp_path / "run", segment_steps=2) as rec:
            for step in range(steps):
                rec.batch([step])
                rec.loss(torch.ones(1 + step // 2), 5)  # one number is needed, where the step is written
                forward_and_backward(model, step)
                optimizer.step()
                optimizer.zero_grad()

    with pytest.warns(RecorderWarning, match="Error at step 2: .* converted to .* goes on unrecorded"):
        training()
    seen = record(tmp_path / "twin", twin, SGD(twin.parameters(), lr=0.1), steps=steps)
    assert_equal(parameters(model), seen[-1])
    assert Run(tmp_path / "run").steps == [0, 1]


def test_a_batch_that_no_file_can_hold_costs_the_recording_and_not_the_training(tmp_path: Path) -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)

    def training() -> None:
        with recorder.watch(model, optimizer, run=tmp_path / "run", segment_steps=1) as rec:
            for step in range(3):
                rec.batch([step], torch.zeros(1, dtype=torch.complex64 if step else torch.float32))
                forward_and_backward(model, step)
                optimizer.step()

    with pytest.warns(RecorderWarning, match="dtype complex64"):
        training()
    run = Run(tmp_path / "run")
    assert run.steps == [0]
    assert run.manifest.state.startswith("incomplete: FormatError at step 1")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_in_the_training_keeps_every_step_and_says_incomplete(
    tmp_path: Path, error: type[BaseException]
) -> None:
    model = perceptron()
    seen: list[Theta] = []

    def fail(rec: Recording, step: int) -> None:
        seen.append(parameters(model))
        if step == 3:
            raise error

    with pytest.raises(error):
        record(tmp_path / "run", model, SGD(model.parameters(), lr=0.1), segment_steps=2, before=fail)
    run = Run(tmp_path / "run")
    assert run.manifest.state == f"incomplete: training ended with {error.__name__}"
    assert run.segments == [(0, 2), (2, 3)]
    for t, theta in enumerate(seen):
        assert_equal(run.parameters(t), theta)


def test_after_the_recording_the_optimizer_steps_on_and_holds_nothing_of_it(tmp_path: Path) -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)
    rec = recorder.watch(model, optimizer, run=tmp_path / "run")
    rec.batch([0])
    forward_and_backward(model, 0)
    optimizer.step()
    rec.close()
    manifest = Run(tmp_path / "run").manifest
    optimizer.step()
    rec.close("a second call does nothing")
    assert Run(tmp_path / "run").manifest == manifest
    assert Run(tmp_path / "run").steps == [0]
    alive = weakref.ref(rec)
    del rec
    gc.collect()
    assert alive() is None  # a hook left behind would hold it, and its copies of the parameters


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("manifest.json", r"manifest\.json: cannot be read as JSON"),
        ("sub/thing.txt", "is not empty and holds no run; nothing is overwritten"),
        ("segments/001-00000000-00000001.safetensors", "is not empty and holds no run; nothing is overwritten"),
    ],
)
def test_a_folder_that_holds_anything_but_a_run_is_refused_and_left_untouched(
    tmp_path: Path, content: str, message: str
) -> None:
    file = tmp_path / content
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    model = perceptron()
    with pytest.raises(ValueError, match=message):
        recorder.watch(model, SGD(model.parameters(), lr=0.1), run=tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.name != LOCK_FILE] == [file]
    assert file.read_text() == "mine"


def test_a_run_that_another_recorder_begins_at_the_same_moment_is_not_taken_for_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = Path.iterdir

    def list_what_has_just_begun(path: Path) -> Iterator[Path]:
        (tmp_path / MANIFEST_FILE).touch()
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", list_what_has_just_begun)
    refuse_what_is_no_run(tmp_path)


def test_a_folder_with_only_a_killed_writers_leftover_is_as_good_as_empty(tmp_path: Path) -> None:
    (tmp_path / f".manifest.json.x{durable.TEMPORARY_SUFFIX}").write_text("half")
    model = perceptron()
    record(tmp_path, model, SGD(model.parameters(), lr=0.1), steps=1)
    assert Run(tmp_path).manifest.state == "complete"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": "all"}, "batches is 'store' or 'indices', not 'all'"),
        ({"segment_steps": 0}, "segment_steps is at least 1, not 0"),
        ({"quota": 0}, "quota is at least 1, not 0"),
        ({"steps": "5:5"}, "wrong choice of steps: expected STOP above START"),
        ({"parameters": ["nothing.*"]}, "nothing"),
        ({"parameters": ["!*"]}, "leaves out every parameter"),
        ({"run": "file/run"}, "the run folder .* cannot be made: Not a directory"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("a file")
    model = perceptron()
    with pytest.raises(UsageError, match=message):
        recorder.watch(model, SGD(model.parameters(), lr=0.1), **{"run": "run", **arguments})
    assert not Path("run").exists()


def test_an_optimizer_over_tensors_of_another_model_is_refused_in_words(tmp_path: Path) -> None:
    model = perceptron()
    masters = [tensor.detach().clone().requires_grad_() for tensor in model.parameters()]
    optimizer = SGD([*model.parameters(), *masters], lr=0.1)
    with pytest.warns(RecorderWarning, match="the optimizer updates 4 tensors that are no parameters of the model"):
        record(tmp_path / "run", model, optimizer, steps=2)
    with pytest.raises(UsageError, match=re.escape("(a float32 copy kept for 16-bit training, or another model's)")):
        record(tmp_path / "strict", model, optimizer, steps=2, strict=True)
    with pytest.raises(UsageError, match="is no run"):
        Run(tmp_path / "run")


def test_a_steps_damage_is_found_when_it_is_read_and_the_rest_is_readable(tmp_path: Path) -> None:
    model = perceptron()
    seen = record(tmp_path / "run", model, SGD(model.parameters(), lr=0.1), steps=4, segment_steps=2)
    file = segments.segment_file(tmp_path / "run", 2, 4)
    file.write_bytes(file.read_bytes()[:-1])
    run = Run(tmp_path / "run")
    assert_equal(run.parameters(2), seen[2])  # the end of the segment before
    with pytest.raises(ValueError, match=r"001-00000002-00000004\.safetensors: not a whole safetensors file"):
        run.parameters(3)
    assert_equal(run.parameters(1), seen[1])


def test_half_precision_parameters_keep_their_bits(tmp_path: Path) -> None:
    train(
        tmp_path / "run",
        steps=2,
        factory=bfloat16_workload,
        make_optimizer=lambda tensors: SGD(tensors, lr=0.1),
    )
    run = Run(tmp_path / "run")
    assert {parameter.dtype for parameter in run.manifest.parameters} == {"bfloat16"}
    assert {tensor.dtype for tensor in run.parameters(2).values()} == {torch.bfloat16}


def bfloat16_workload() -> LanguageModelling:
    return dataclasses.replace(LanguageModelling(), dtype=torch.bfloat16)


class Prepared(Optimizer):
    """Called an optimizer, never made as one, and steps another: accelerate's is like this."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)


def test_a_wrapper_of_the_optimizer_is_looked_through(tmp_path: Path) -> None:
    model = perceptron()
    seen = record(tmp_path / "run", model, Prepared(Prepared(SGD(model.parameters(), lr=0.1))), strict=True)
    run = Run(tmp_path / "run")
    assert list(run.steps) == list(range(5))
    assert run.manifest.optimizer.name == "torch.optim.sgd.SGD"
    for step, theta in enumerate(seen):
        assert_equal(run.parameters(step), theta)


@pytest.mark.parametrize("inner", [None, "AdamW"])
def test_a_wrapper_without_an_optimizer_is_refused_and_nothing_is_made(tmp_path: Path, inner: str | None) -> None:
    with pytest.raises(UsageError, match=r"expected a torch optimizer, or a wrapper .*; found a .*Prepared, which has"):
        recorder.watch(perceptron(), Prepared(inner), run=tmp_path / "run")
    assert not (tmp_path / "run").exists()
