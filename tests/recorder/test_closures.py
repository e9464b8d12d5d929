"""Optimizers that are given a closure: forward and backward pass happen inside their step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import recorder
from recorder.errors import UsageError
from recorder.runformat import Run
from recorder.staging import Staging

pytestmark = pytest.mark.filterwarnings("ignore::recorder.parameters.UnmappedParameterWarning")

Theta = dict[str, torch.Tensor]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"first": nn.Linear(4, 8), "late": nn.Linear(8, 8), "last": nn.Linear(8, 2)})


def loss_of(model: Any, index: int, late_from: int | None = None) -> torch.Tensor:
    examples = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))[[index]]
    hidden = model["first"](examples).tanh()
    if late_from is not None and index >= late_from:
        hidden = model["late"](hidden).tanh()
    loss: torch.Tensor = model["last"](hidden).square().sum()
    return loss


def theta_of(model: nn.Module) -> Theta:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def train(
    run: Path | None,
    make: Callable[[Any], torch.optim.Optimizer],
    *,
    announce: str = "inside",
    late_from: int | None = None,
    updates: int = 4,
    by_name: bool = False,
    **settings: Any,
) -> list[Theta]:
    """Train with closures, record if a run is given, and return what the loop saw between the updates."""
    model = network()
    optimizer = make(model.parameters())
    rec = recorder.watch(model, optimizer, run=run, strict=True, **settings) if run else None
    seen = [theta_of(model)]
    for update in range(updates):

        def closure(update: int = update) -> Any:
            optimizer.zero_grad()
            if rec and announce == "inside":
                rec.batch([update])
            loss = loss_of(model, update, late_from)
            if rec:
                rec.loss(loss.detach(), 1)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        if rec and announce == "before":
            rec.batch([update])
        if by_name:
            optimizer.step(closure=closure)
        else:
            optimizer.step(closure)
        seen.append(theta_of(model))
    if rec:
        rec.close()
    return seen


def assert_recorded(run: Run, seen: list[Theta]) -> None:
    trained = {row.name for row in run.manifest.trained}
    for t, theta in enumerate(seen):
        recorded = run.parameters(t)
        for name in trained & recorded.keys():
            assert torch.equal(recorded[name], theta[name]), (t, name)


class Ascending(torch.optim.SGD):
    """Sharpness-aware: climbs along the gradient it has, measures there, and descends from where it was."""

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            tensors = [tensor for group in self.param_groups for tensor in group["params"]]
            before = [tensor.clone() for tensor in tensors]
            for tensor in tensors:
                tensor.add_(0.1)
        with torch.enable_grad():
            loss = closure()
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        super().step()
        return loss


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "fused AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "LBFGS": lambda parameters: torch.optim.LBFGS(parameters, lr=0.1, max_iter=3),
    "sharpness-aware": lambda parameters: Ascending(parameters, lr=0.1),
}


@pytest.mark.parametrize("by_name", [True, False], ids=["closure=", "positional"])
@pytest.mark.parametrize("announce", ["inside", "before"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_update_with_a_closure_is_recorded_as_the_loop_saw_it_and_not_changed(
    tmp_path: Path, optimizer: str, announce: str, by_name: bool
) -> None:
    seen = train(tmp_path / "run", OPTIMIZERS[optimizer], announce=announce, by_name=by_name)
    without = train(None, OPTIMIZERS[optimizer])
    assert all(torch.equal(one[name], other[name]) for one, other in zip(seen, without, strict=True) for name in one)
    run = Run(tmp_path / "run")
    assert run.manifest.state == "complete"
    assert run.steps == [0, 1, 2, 3]
    assert_recorded(run, seen)
    # The batches of the first evaluation, and the loss at the parameters that the step began with.
    assert [[entry.indices.tolist() for entry in run.step(t).micro_batches] for t in run.steps] == [
        [[t]] for t in range(4)
    ]
    assert {row.name for row in run.manifest.parameters if row.status == "untrained"} == {"late.weight", "late.bias"}
    model = network()
    for t in run.steps:
        model.load_state_dict(seen[t])
        moved = 0.1 if optimizer == "sharpness-aware" else 0.0
        with torch.no_grad():
            for tensor in model.parameters():
                tensor.add_(moved)
        (micro_batch,) = run.step(t).micro_batches
        assert micro_batch.loss_sum == loss_of(model, t).item()


def test_the_norm_of_the_gradient_is_that_of_the_closures_own_update(tmp_path: Path) -> None:
    seen = train(tmp_path / "run", OPTIMIZERS["Adam"])
    run = Run(tmp_path / "run")
    model = network()
    for t in range(2):
        model.load_state_dict(seen[t])
        model.zero_grad()
        loss_of(model, t).backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        assert run.step(t).gradient_norm == pytest.approx(float(norm), rel=1e-6)


@pytest.mark.parametrize("optimizer", ["Adam", "sharpness-aware"])
def test_a_parameter_that_gets_its_first_gradient_in_a_later_closure_joins_with_the_values_it_had(
    tmp_path: Path, optimizer: str
) -> None:
    seen = train(tmp_path / "run", OPTIMIZERS[optimizer], late_from=2)
    run = Run(tmp_path / "run")
    assert all(row.trained for row in run.manifest.parameters)
    assert set(run.with_gradient(1)) == {"first.weight", "first.bias", "last.weight", "last.bias"}
    assert "late.weight" in run.with_gradient(2)
    for t in range(2, 5):
        assert all(torch.equal(tensor, seen[t][name]) for name, tensor in run.parameters(t).items())


def test_windows_of_steps_begin_with_the_parameters_from_before_the_closure(tmp_path: Path) -> None:
    seen = train(tmp_path / "run", OPTIMIZERS["sharpness-aware"], steps="1:2, 3:4", updates=5)
    run = Run(tmp_path / "run")
    assert run.steps == [1, 3]
    for t in (1, 2, 3, 4):
        assert all(torch.equal(tensor, seen[t][name]) for name, tensor in run.parameters(t).items())


def test_a_closure_that_fails_fails_as_before_and_the_next_update_is_recorded(tmp_path: Path) -> None:
    class Twice(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            with torch.enable_grad():
                closure()
                return super().step(closure)

    model = network()
    optimizer = Twice(model.parameters(), lr=0.1)
    calls = 0

    def closure() -> Any:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        rec.batch([calls])
        if calls in {1, 3}:  # the first evaluation of an update, and the second of another
            raise MemoryError("no room")
        loss = loss_of(model, 0)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with recorder.watch(model, optimizer, run=tmp_path / "run", strict=True) as rec:
        for _ in range(2):
            with pytest.raises(MemoryError, match="no room"):
                optimizer.step(closure)
            rec.forget_pending()
        before = theta_of(model)
        optimizer.step(closure)
    run = Run(tmp_path / "run")
    assert run.steps == [0]
    assert [entry.indices.tolist() for entry in run.step(0).micro_batches] == [[4]]
    assert_recorded(run, [before, theta_of(model)])


def test_an_optimizer_that_does_not_call_its_closure_is_recorded_with_the_gradients_it_had(tmp_path: Path) -> None:
    class Deaf(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step()

    model = network()
    optimizer = Deaf(model.parameters(), lr=0.1)
    seen = [theta_of(model)]
    with recorder.watch(model, optimizer, run=tmp_path / "run", strict=True) as rec:
        for update in range(2):
            rec.batch([update])
            loss_of(model, update).backward()  # type: ignore[no-untyped-call]
            optimizer.step(lambda: None)
            optimizer.zero_grad()
            seen.append(theta_of(model))
    run = Run(tmp_path / "run")
    assert run.steps == [0, 1]
    assert_recorded(run, seen)


@pytest.mark.parametrize("moves_after", [True, False])
def test_a_step_that_calls_the_step_of_its_base_is_one_step(tmp_path: Path, moves_after: bool) -> None:
    class Outer(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            if moves_after:
                with torch.no_grad():
                    self.param_groups[0]["params"][0].clamp_(-0.01, 0.01)
            return loss

    model = network()
    torch.optim.SGD(model.parameters(), lr=0.1)  # torch puts hooks into the step of a class when one is first made
    optimizer = Outer(model.parameters(), lr=0.1)
    seen = [theta_of(model)]
    rec = recorder.watch(model, optimizer, run=tmp_path / "run", strict=True)
    for update in range(3):
        rec.batch([update])
        loss_of(model, update).backward()  # type: ignore[no-untyped-call]
        if moves_after:
            with pytest.raises(UsageError, match="moves parameters after it: step 0 was recorded without that"):
                optimizer.step()
            return
        optimizer.step()
        optimizer.zero_grad()
        seen.append(theta_of(model))
    rec.close()
    run = Run(tmp_path / "run")
    assert run.steps == [0, 1, 2]
    assert_recorded(run, seen)


def test_the_device_finishes_every_copy_before_the_update_overwrites_what_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    copy, wait = Staging.copy, Staging.before_update

    def told_copy(self: Staging, *args: Any) -> Any:
        happened.append("copy")
        return copy(self, *args)

    def told_wait(self: Staging) -> None:
        happened.append("wait")
        wait(self)

    monkeypatch.setattr(Staging, "copy", told_copy)
    monkeypatch.setattr(Staging, "before_update", told_wait)

    class Told(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            happened.append("update")
            return super().step(closure)

    model = network()
    optimizer = Told(model.parameters(), lr=0.1)
    with recorder.watch(model, optimizer, run=tmp_path / "run", steps="0:2, 3:4", strict=True) as rec:
        for update in range(4):
            rec.batch([update])
            loss_of(model, update).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    kept = [position for position, what in enumerate(happened) if what == "update"]
    for position in (kept[0], kept[1], kept[3]):
        since_copy = happened[:position][::-1].index("copy")
        assert "wait" in happened[position - since_copy : position]
