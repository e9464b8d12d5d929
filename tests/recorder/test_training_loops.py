"""What real training loops do between two updates, and what is recorded of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import recorder
from recorder.runformat import Run

pytestmark = pytest.mark.filterwarnings("ignore::recorder.parameters.UnmappedParameterWarning")


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def batch_of(indices: list[int]) -> torch.Tensor:
    return torch.randn(64, 4, generator=torch.Generator().manual_seed(1))[indices]


def loss_of(model: nn.Module, indices: list[int]) -> torch.Tensor:
    loss: torch.Tensor = model(batch_of(indices)).square().mean()
    return loss


def recorded_indices(run: Path) -> list[list[list[int]]]:
    opened = Run(run)
    return [[entry.indices.tolist() for entry in opened.step(t).micro_batches] for t in opened.steps]


@pytest.mark.parametrize("zero_first", [True, False], ids=["zeroed after the announcement", "zeroed after the step"])
@pytest.mark.parametrize("to_none", [True, False], ids=["to None", "to zero"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "not fused"])
def test_micro_batches_of_a_skipped_update_belong_to_no_step_wherever_the_loop_zeroes_gradients(
    tmp_path: Path, zero_first: bool, to_none: bool, fused: bool
) -> None:
    model = classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=1000)
    overflowing = {0, 3, 4}
    with recorder.watch(model, optimizer, run=tmp_path / "run", strict=True) as rec:
        for update in range(7):
            if not zero_first:
                optimizer.zero_grad(set_to_none=to_none)
            for micro_batch in range(2):
                indices = [update * 2 + micro_batch]
                rec.batch(indices)
                if zero_first and micro_batch == 0:
                    optimizer.zero_grad(set_to_none=to_none)
                loss = loss_of(model, indices)
                if update in overflowing:
                    loss = loss * float("inf")
                scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            scaler.step(optimizer)
            scaler.update()
    assert recorded_indices(tmp_path / "run") == [[[u * 2], [u * 2 + 1]] for u in range(7) if u not in overflowing]


def test_one_backward_pass_for_several_forward_passes_keeps_all_their_micro_batches(tmp_path: Path) -> None:
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with recorder.watch(model, optimizer, run=tmp_path / "run", strict=True) as rec:
        for update in range(3):
            losses = []
            for indices in ([update], [update + 10], [update + 20]):
                rec.batch(indices)
                losses.append(loss_of(model, indices))
            torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
    assert recorded_indices(tmp_path / "run") == [[[u], [u + 10], [u + 20]] for u in range(3)]


def test_a_gradient_that_is_not_finite_and_trained_on_all_the_same_keeps_its_micro_batches(tmp_path: Path) -> None:
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with recorder.watch(model, optimizer, run=tmp_path / "run", strict=True) as rec:
        for indices in ([1], [2]):
            rec.batch(indices)
            (loss_of(model, indices) * (float("nan") if indices == [1] else 1.0)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert recorded_indices(tmp_path / "run") == [[[1], [2]]]


def test_a_ragged_last_group_of_accumulation_has_the_micro_batches_it_had(tmp_path: Path) -> None:
    model = classifier()
    optimizer = torch.optim.AdamW(model.parameters())
    with recorder.watch(model, optimizer, run=tmp_path / "run", strict=True) as rec:
        for position in range(8):
            rec.batch([position])
            loss_of(model, [position]).backward()  # type: ignore[no-untyped-call]
            if position % 3 == 2 or position == 7:
                optimizer.step()
                optimizer.zero_grad()
    assert recorded_indices(tmp_path / "run") == [[[0], [1], [2]], [[3], [4], [5]], [[6], [7]]]


def trained(
    run: Path | None, evaluate: Callable[[nn.Module, AveragedModel], None]
) -> tuple[list[torch.Tensor], nn.Module]:
    """Train with two groups, a scheduler, clipping and an average of the weights; return θ as each step left it."""
    model = classifier()
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "lr": 0.3, "momentum": 0.9}]  # type: ignore[index]
    )
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))  # type: ignore[no-untyped-call]
    seen = [nn.utils.parameters_to_vector(model.parameters()).clone()]
    rec = recorder.watch(model, optimizer, run=run, strict=True) if run else None
    for step in range(5):
        if rec:
            rec.batch([step])
        loss_of(model, [step]).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        seen.append(nn.utils.parameters_to_vector(model.parameters()).clone())
        optimizer.zero_grad()
        scheduler.step()
        average.update_parameters(model)
        evaluate(model, average)
    if rec:
        rec.close()
    return seen, average


def swap(model: nn.Module, average: AveragedModel) -> None:
    """Evaluate the average in the model's place, as many loops do, and put the weights back."""
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(average.module.state_dict())
    with torch.no_grad():
        loss_of(model, [60, 61])
    model.load_state_dict(own)


def test_groups_schedules_clipping_and_averaged_weights_are_recorded_as_the_optimizer_left_them(tmp_path: Path) -> None:
    seen, average = trained(tmp_path / "run", swap)
    without, average_without = trained(None, swap)
    assert all(torch.equal(left, right) for left, right in zip(seen, without, strict=True))
    pairs = zip(average.state_dict().values(), average_without.state_dict().values(), strict=True)
    assert all(torch.equal(left, right) for left, right in pairs)
    run = Run(tmp_path / "run")
    for t, theta in enumerate(seen):
        recorded = run.parameters(t)
        assert torch.equal(
            torch.cat([recorded[name].flatten() for name in ("0.weight", "0.bias", "2.weight", "2.bias")]), theta
        )
    assert [run.step(t).learning_rates for t in range(3)] == [(0.1, 0.3), (0.05, 0.15), (0.025, 0.075)]
    assert run.step(0).gradient_norm == pytest.approx(0.05, rel=1e-4)


@pytest.mark.parametrize("announce", ["outside", "inside"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None])
def test_autocast_is_noticed_wherever_the_batch_is_announced(
    tmp_path: Path, announce: str, dtype: torch.dtype | None
) -> None:
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    hooks = []
    with recorder.watch(model, optimizer, run=tmp_path / "run", strict=True) as rec:
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            loss_of(model.eval(), [9])  # evaluation, in another dtype
        model.train()
        for step in range(2):
            if announce == "outside":
                rec.batch([step])
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                if announce == "inside":
                    rec.batch([step])
                hooks.append(len(model._forward_pre_hooks))
                loss = loss_of(model, [step])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
    expected = None if dtype is None else str(dtype).removeprefix("torch.")
    assert Run(tmp_path / "run").manifest.recipe.get("autocast") == expected
    assert hooks == [1, 0]
    assert not model._forward_pre_hooks
