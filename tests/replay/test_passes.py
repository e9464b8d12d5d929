"""What the chosen recipe computes is checked before the work: each check passes, and each can fail."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from recorder.errors import MismatchError
from recorder.runformat import Run
from replay.evaluation import Evaluation
from replay.passes import check_recorded_loss, check_two_passes
from replay.precision import PRECISIONS
from tests.cases import LanguageModelling, TinyTransformer
from tests.replay.variants import DroppingOut, record

HERE = "tests.replay.test_passes"
FLOAT32 = PRECISIONS["float32"]

Command = Callable[..., int]
Captured = pytest.CaptureFixture[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawingAlways(LanguageModelling):
    """Does the recorded updates as they were, and draws noise in evaluation mode."""

    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor | float]:
        loss_sum, predictions = super().loss(model, batch)
        return loss_sum if model.training else loss_sum * (1 + 1e-3 * torch.rand(())), predictions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remembering(LanguageModelling):
    """Keeps the number of its passes, and is the training's for the first four."""

    passes: list[int] = dataclasses.field(default_factory=list, compare=False)

    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor | float]:
        self.passes.append(1)
        loss_sum, predictions = super().loss(model, batch)
        return loss_sum * (1 + max(0, len(self.passes) - 4) / 100), predictions


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawingWithNumpy(DroppingOut):
    """Drops out by numpy's generator, which a run does not record, once the recorded update is repeated."""

    passes: list[int] = dataclasses.field(default_factory=list, compare=False)

    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor | float]:
        self.passes.append(1)
        loss_sum, predictions = super().loss(model, batch)
        return loss_sum * (1 if len(self.passes) <= 2 else 1 + 1e-6 * np.random.default_rng().random()), predictions


class _Wider(TinyTransformer):
    def __init__(self, **arguments: int) -> None:
        super().__init__(**arguments)
        self.adapter = nn.Linear(8, 2)


class _Untied(TinyTransformer):
    def __init__(self, **arguments: int) -> None:
        super().__init__(**arguments)
        weight = self.decoder.embed_tokens.weight.detach().clone()
        self.decoder.output_projection.weight = nn.Parameter(weight)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wider(LanguageModelling):
    def model(self) -> nn.Module:
        return _Wider(vocabulary=self.vocabulary)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Untied(LanguageModelling):
    def model(self) -> nn.Module:
        return _Untied(vocabulary=self.vocabulary)


def drawing_always() -> LanguageModelling:
    return DrawingAlways()


def remembering() -> LanguageModelling:
    return Remembering()


def drawing_with_numpy() -> LanguageModelling:
    return DrawingWithNumpy()


def wider() -> LanguageModelling:
    return Wider()


def untied() -> LanguageModelling:
    return Untied()


def _last_line(capsys: Captured) -> str:
    return capsys.readouterr().err.splitlines()[-1]


def test_two_passes_that_agree_are_told_for_every_loss_data_that_has_work(
    run: Path, replay: Command, capsys: Captured
) -> None:
    assert replay(run) == 0
    assert "; two passes over step 0 on batch agree bit for bit" in capsys.readouterr().err
    assert replay(run, loss_data=("batch", "probe:16")) == 0
    assert "; two passes over step 0 on probe agree bit for bit" in capsys.readouterr().err
    assert replay(run, loss_data=("batch", "probe:16")) == 0
    assert "two passes" not in capsys.readouterr().err


@pytest.mark.parametrize("workload", ["drawing_always", "remembering"])
@pytest.mark.parametrize("loss_data", ["batch", "probe:16"])
def test_a_loss_that_differs_from_pass_to_pass_is_refused_before_anything_is_written(
    run: Path, workload: str, loss_data: str, replay: Command, capsys: Captured
) -> None:
    assert replay(run, workload=f"{HERE}:{workload}", loss_data=(loss_data,)) == 1
    last = _last_line(capsys)
    expected = (
        rf"self-check, two passes: computed twice, the loss on {loss_data.partition(':')[0]} at the start of step 0 is "
        r"\d\.\d+ and \d\.\d+ nats, and the same was expected; they differ by [\d.e-]+, the gradients of (\d\d) of \1 "
        r"parameters by [\d.e-]+ of the gradient's norm, most of all that of '\S+'\. A rerun would give other shards\. "
        r"Likely causes: a model that draws random numbers in evaluation mode .* state that .* CUBLAS_WORKSPACE_CONFIG"
    )
    assert re.search(expected, last), last
    assert not list(run.rglob("shards/*/*.safetensors"))


def test_random_numbers_that_no_run_records_are_named_where_dropout_is_as_recorded(
    tmp_path: Path, replay: Command, capsys: Captured
) -> None:
    record(tmp_path, steps=2)
    assert replay(tmp_path, "--dropout", "recorded", workload=f"{HERE}:drawing_with_numpy") == 1
    last = _last_line(capsys)
    assert "Likely causes: random numbers of numpy or of Python, whose states are not recorded (draw with torch" in last
    assert not list(tmp_path.rglob("shards/*/*.safetensors"))


def _passes(*evaluations: Evaluation) -> Callable[[int, str], Evaluation]:
    left = list(evaluations)
    return lambda t, name: left.pop(0)


def _evaluation(loss: float = 1.0, **gradient: list[float]) -> Evaluation:
    return Evaluation(loss=loss, gradient={name: torch.tensor(entries) for name, entries in gradient.items()})


def test_gradients_that_differ_under_the_same_loss_are_refused_with_the_worst_parameter(recorded: Path) -> None:
    first = _evaluation(a=[3.0, 0.0], b=[0.0, 4.0], c=[0.0])
    second = _evaluation(a=[3.0, 1e-4], b=[0.0, 4.5], c=[0.0])
    with pytest.raises(
        MismatchError, match=r"differ by 0, the gradients of 2 of 3 parameters by 0\.1 of the gradient's norm, .* 'b'\."
    ):
        check_two_passes(Run(recorded), "batch", _passes(first, second))


def test_a_gradient_that_only_one_pass_has_counts_as_zero_in_the_other(recorded: Path) -> None:
    with pytest.raises(
        MismatchError, match=r"1 of 2 parameters by 0\.6 of the gradient's norm, most of all that of 'a'"
    ):
        check_two_passes(Run(recorded), "batch", _passes(_evaluation(a=[3.0], b=[4.0]), _evaluation(b=[4.0])))
    first = check_two_passes(Run(recorded), "batch", _passes(_evaluation(a=[0.0], b=[4.0]), _evaluation(b=[4.0])))
    assert first.gradient.keys() == {"a", "b"}


def test_passes_that_are_nan_alike_agree_and_a_nan_in_one_of_them_is_the_worst(recorded: Path) -> None:
    nan = float("nan")
    same = _evaluation(nan, a=[nan, 1.0])
    check_two_passes(Run(recorded), "batch", _passes(same, same))
    with pytest.raises(MismatchError, match=r"most of all that of 'a'"):
        check_two_passes(Run(recorded), "batch", _passes(_evaluation(a=[1.0], b=[1.0]), _evaluation(a=[nan], b=[9.0])))


def test_dropout_that_comes_out_again_is_told(tmp_path: Path, replay: Command, capsys: Captured) -> None:
    record(tmp_path, steps=2)
    assert replay(tmp_path, "--dropout", "recorded") == 0
    assert "; with dropout as recorded the loss of step 0 is the training's bit for bit" in capsys.readouterr().err
    assert replay(tmp_path, "--dropout", "recorded", "--dtype", "float64") == 0
    assert "; with dropout as recorded the loss of step 0 is the training's within rounding" in capsys.readouterr().err
    record(tmp_path / "untold", steps=2, tell_losses=False)
    assert replay(tmp_path / "untold", "--dropout", "recorded") == 0
    assert "; dropout not compared with the training's: it did not tell its losses" in capsys.readouterr().err


def test_dropout_that_does_not_come_out_again_is_refused_with_both_losses(tmp_path: Path) -> None:
    record(tmp_path, steps=1)
    run = Run(tmp_path)
    step = run.step(0)
    measured = sum(float(entry.loss_sum or 0) for entry in step.micro_batches) / step.predictions
    check_recorded_loss(run, _evaluation(measured * (1 + 1e-5)), FLOAT32)
    check_recorded_loss(run, _evaluation(measured * (1 + 1e-3)), PRECISIONS["bfloat16"])
    with pytest.raises(
        MismatchError,
        match=rf"self-check, dropout as recorded: the training measured a loss of {re.escape(repr(measured))} nats at "
        r"the start of step 0, and replay finds \d\.\d+ \(difference 0\.00762, allowed 0\.000762\)\. Likely causes: "
        r"another version of torch or another dtype .* Replay in the training's recipe, or pass --dropout off",
    ):
        check_recorded_loss(run, _evaluation(measured * (1 + 1e-3)), FLOAT32)


def test_a_model_with_more_parameters_than_the_run_knows_is_refused_by_their_name(
    run: Path, replay: Command, capsys: Captured
) -> None:
    assert replay(run, workload=f"{HERE}:wider") == 1
    assert (
        "self-check, parameter table: the model that the workload builds has 2 parameters that are not among the 33 of "
        "the run's table, first 'adapter.weight' of shape (2, 8). No record tells their values. Likely causes: "
    ) in _last_line(capsys)
    assert not list(run.rglob("shards/*/*.safetensors"))


def test_weights_that_are_no_longer_tied_are_told_from_new_ones(run: Path, replay: Command, capsys: Captured) -> None:
    assert replay(run, workload=f"{HERE}:untied") == 1
    assert (
        "first 'decoder.output_projection.weight' of shape (13, 8); in the training it was the same tensor as "
        "'decoder.embed_tokens.weight', and here it is not. "
    ) in _last_line(capsys)
