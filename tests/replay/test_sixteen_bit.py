"""Training in 16 bit: its updates are done again in 16 bit, and the ledger is kept in float32."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW

import recorder
from recorder.errors import MismatchError
from recorder.masters import views_of
from recorder.runformat import Run
from replay import shards
from replay.gradients import LossSurface
from replay.precision import fitting
from replay.repetition import sixteen_bit_dtype
from replay.selfcheck import check_update
from tests.cases import LanguageModelling
from tests.replay.variants import MeanLoss

HERE = "tests.replay.test_sixteen_bit"
MakeOptimizer = Callable[[Any], torch.optim.Optimizer]

bfloat16 = LanguageModelling(dtype=torch.bfloat16)
float16 = LanguageModelling(dtype=torch.float16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherTokens(LanguageModelling):
    """Another text of the same length."""

    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor | float]:
        return super().loss(model, {"tokens": batch["tokens"].roll(2, dims=1)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cast(LanguageModelling):
    """A float32 model whose loop computes under autocast."""

    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor | float]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().loss(model, batch)


def workload() -> LanguageModelling:
    """Builds the model in float32, as one may."""
    return LanguageModelling()


def workload_bfloat16() -> LanguageModelling:
    return bfloat16


def train(
    run: Path, task: LanguageModelling, make_optimizer: MakeOptimizer, *, masters: str = "none", before: int = 0
) -> Run:
    """Train three steps, with gradients of the mean loss clipped to a norm of 1; `before` more go unrecorded."""
    torch.manual_seed(3)
    model = task.model()
    named = dict(model.named_parameters())
    flat: torch.Tensor | None = None
    held: dict[str, torch.Tensor] = {}
    if masters == "flat":
        flat = torch.cat([tensor.detach().float().reshape(-1) for tensor in named.values()])
        held = views_of(flat, named)
    elif masters == "list":
        held = {name: tensor.detach().float() for name, tensor in named.items()}
    updated = [flat] if flat is not None else list((held or named).values())
    optimizer = make_optimizer(updated)
    scale = 512.0 if task.dtype == torch.float16 else 1.0
    rec = None
    for step in range(before + 3):
        if step == before:
            rec = recorder.watch(
                model, optimizer, run=run, workload=f"{HERE}:workload", masters=held, first_step=before, strict=True
            )
        for position in range(2):
            indices = [(16 * step + 8 * position + example) % 48 for example in range(8)]
            batch = task.batch(indices, split="train", epoch=1)
            if rec is not None:
                rec.batch(indices, batch)
            loss_sum, predictions = task.loss(model, batch)
            if rec is not None:
                rec.loss(loss_sum, predictions)
            (loss_sum * (scale / (2 * float(predictions)))).backward()  # type: ignore[no-untyped-call]
        gradients = [tensor.grad.float() / scale for tensor in named.values() if tensor.grad is not None]
        if flat is not None:
            flat.grad = torch.cat([gradient.reshape(-1) for gradient in gradients])
        elif held:
            for master, gradient in zip(held.values(), gradients, strict=True):
                master.grad = gradient
        else:
            for tensor, gradient in zip(named.values(), gradients, strict=True):
                tensor.grad = gradient.to(tensor.dtype)
        torch.nn.utils.clip_grad_norm_(updated, 1.0)
        optimizer.step()
        with torch.no_grad():
            for name, master in held.items():
                named[name].copy_(master)
        model.zero_grad()
    assert rec is not None
    rec.close()
    return Run(run)


WITHIN = "losses and parameters are the recorded ones within rounding of"


def adam(updated: Any) -> torch.optim.Optimizer:
    return AdamW(updated, lr=1e-2, eps=1e-6)


def descent(updated: Any) -> torch.optim.Optimizer:
    return SGD(updated, lr=0.5)


@pytest.mark.parametrize(
    ("task", "make_optimizer", "masters"),
    [
        pytest.param(bfloat16, adam, "none", id="bfloat16, Adam"),
        pytest.param(bfloat16, adam, "list", id="bfloat16, Adam, masters"),
        pytest.param(bfloat16, adam, "flat", id="bfloat16, Adam, flat masters"),
        pytest.param(bfloat16, descent, "none", id="bfloat16, SGD"),
        pytest.param(float16, adam, "list", id="float16, Adam, masters"),
        pytest.param(float16, adam, "flat", id="float16, Adam, flat masters"),
        pytest.param(float16, descent, "none", id="float16, SGD"),
    ],
)
def test_an_update_in_16_bit_comes_out_within_its_rounding_and_another_batchs_does_not(
    tmp_path: Path, task: LanguageModelling, make_optimizer: MakeOptimizer, masters: str
) -> None:
    run = train(tmp_path, task, make_optimizer, masters=masters)
    dtype = str(task.dtype).removeprefix("torch.")
    assert check_update(run, workload(), data=True).text == f"step 0 done again: {WITHIN} {dtype}"
    with pytest.raises(MismatchError, match=r"recorded a loss of|gives other parameters"):
        check_update(run, OtherTokens(dtype=task.dtype), data=False)
    with pytest.raises(MismatchError, match="training recorded a loss of"):
        check_update(run, MeanLoss(dtype=task.dtype), data=False)


@pytest.mark.parametrize("masters", ["list", "flat"])
def test_a_recording_begun_in_mid_training_is_repeated_with_the_masters_optimizer_state(
    tmp_path: Path, masters: str
) -> None:
    run = train(tmp_path, bfloat16, adam, masters=masters, before=3)
    state = run.optimizer_state()
    assert state is not None
    assert len(state) == (1 if masters == "flat" else 33)
    assert check_update(run, workload(), data=True).text == f"step 3 done again: {WITHIN} bfloat16"


def test_an_optimizer_with_float16_state_is_not_held_to_its_updates_and_the_report_says_why(tmp_path: Path) -> None:
    run = train(tmp_path, float16, lambda updated: Adam(updated, lr=1e-3, eps=1e-4))
    report = check_update(run, workload(), data=True)
    assert report.text == (
        "step 0 done again: losses are the recorded ones, bit for bit (parameters not compared: the optimizer kept its "
        "state in float16, where squared gradients vanish and rounding decides the update)"
    )
    assert not report.exact


def test_under_autocast_the_update_is_repeated_under_it(tmp_path: Path) -> None:
    run = train(tmp_path, Cast(), adam)
    assert sixteen_bit_dtype(run.manifest) == torch.bfloat16
    assert check_update(run, workload(), data=False).text == f"step 0 done again: {WITHIN} bfloat16"
    recipe = {key: value for key, value in run.manifest.recipe.items() if key != "autocast"}
    run.manifest = dataclasses.replace(run.manifest, recipe=recipe)
    assert sixteen_bit_dtype(run.manifest) is None
    with pytest.raises(MismatchError, match=r"difference .*, allowed"):
        check_update(run, workload(), data=False)


@pytest.mark.parametrize("masters", ["none", "list"])
@pytest.mark.parametrize("named", ["workload", "workload_bfloat16"])
def test_the_ledger_of_16_bit_training_is_kept_in_float32_and_balances(
    tmp_path: Path, masters: str, named: str, replay: Callable[..., int]
) -> None:
    run = train(tmp_path / "run", bfloat16, adam, masters=masters)
    assert replay(run.path, workload=f"{HERE}:{named}", loss_data=("batch", "probe:16")) == 0
    checked = 0
    for folder in shards.folders(run.path):
        for start, stop in folder.finished():
            per_step = folder.read(start, stop).per_step
            change = per_step["loss_end"] - per_step["loss_start"]
            assert (abs(change) > 0.05).all()
            # In bfloat16 the residual would be some hundredths of it.
            assert (abs(per_step["residual"]) < 1e-3 * abs(change)).all()
            checked += len(change)
    assert checked == 2 * 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Narrow:
    """A linear map of 16-bit inputs, with a buffer."""

    dtype: torch.dtype

    def model(self) -> nn.Module:
        model = nn.Linear(3, 1, dtype=self.dtype)
        model.register_buffer("shift", torch.ones(3, dtype=self.dtype))
        return model

    def indices(self, split: str) -> Sequence[int]:
        return range(1)

    def batch(self, indices: Sequence[int], *, split: str, epoch: int) -> Any:
        return {}

    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor | float]:
        assert {batch["x"].dtype, model.get_buffer("shift").dtype} == {self.expected}
        loss: torch.Tensor = model(batch["x"] + model.get_buffer("shift")).sum()
        return loss, 1.0

    @property
    def expected(self) -> torch.dtype:
        return torch.float32 if self.dtype == torch.bfloat16 else self.dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_model_buffers_and_batches_are_taken_in_the_precision_asked_for(dtype: torch.dtype) -> None:
    task = _Narrow(dtype=dtype)
    precision = fitting([str(dtype).removeprefix("torch.")])
    theta = {"weight": torch.full((1, 3), 1 / 3, dtype=dtype), "bias": torch.zeros(1, dtype=dtype)}
    surface = LossSurface(task, ["weight", "bias"], {}, torch.device("cpu"), precision)
    batch = {"x": torch.ones(1, 3, dtype=dtype), "id": torch.tensor([4])}
    evaluation = surface.evaluate(precision.converted(theta), [batch])
    assert {gradient.dtype for gradient in evaluation.gradient.values()} == {task.expected}
    assert evaluation.loss == pytest.approx(2 * float(theta["weight"].double().sum()), rel=1e-6)
    assert precision.converted([batch])[0]["id"].dtype == torch.int64
