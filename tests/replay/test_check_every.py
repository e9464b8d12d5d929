"""--check-every: the losses at the ends, and with them the residual, at some of the steps only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from replay.evaluation import Evaluation, Theta
from replay.gradients import LossSurface
from replay.shards import Shard, ShardFolder, Status

Command = Callable[..., int]
Captured = pytest.CaptureFixture[str]
STEPS = 6


def _read(folder: Callable[[Path, str], ShardFolder], run: Path) -> Shard:
    return folder(run, "batch").read(0, STEPS)


@pytest.mark.parametrize("rule", ["gauss2", "gauss3", "midpoint"])
def test_lca_stays_to_the_bit_and_only_the_checked_steps_have_losses(
    run: Path, tmp_path: Path, replay: Command, folder: Callable[[Path, str], ShardFolder], rule: str
) -> None:
    options = ("--rule", rule, "--rtol", "1", "--chunk", str(STEPS))
    assert replay(run, *options) == 0
    every = _read(folder, run)
    for file in (run / "shards").iterdir():
        file.rename(tmp_path / file.name)
    assert replay(run, *options, "--check-every", "4") == 0
    sample = _read(folder, run)
    for quantity in ("sum", "positive_sum", "positive_count", "zero_count"):
        for name, entries in every.per_unit[quantity].items():
            np.testing.assert_array_equal(sample.per_unit[quantity][name], entries)
    checked = np.arange(STEPS) % 4 == 0
    for name in ("loss_start", "loss_end", "residual", "tolerance"):
        np.testing.assert_array_equal(sample.per_step[name][checked], every.per_step[name][checked])
        assert np.isnan(sample.per_step[name][~checked]).all()
    assert (sample.per_step["status"][checked] == Status.CONVERGED).all()
    assert (sample.per_step["status"][~checked] == Status.NOT_CHECKED).all()
    np.testing.assert_array_equal(sample.per_step["evaluations"], every.per_step["evaluations"])


def test_a_step_that_is_not_checked_costs_no_forward_pass_of_its_own(
    run: Path, replay: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    measure = LossSurface.loss

    def counted(surface: LossSurface, theta: Theta, micro_batches: Sequence[Any], **options: Any) -> float:
        losses.append(theta)
        return measure(surface, theta, micro_batches, **options)

    monkeypatch.setattr(LossSurface, "loss", counted)
    replay(run, "--rule", "gauss2", "--rtol", "1", "--check-every", "3")
    assert len(losses) == 2 * len(range(0, STEPS, 3))


def test_the_last_lines_say_how_many_steps_were_checked_and_that_is_no_failure(
    run: Path, replay: Command, capsys: Captured
) -> None:
    assert replay(run, "--rule", "gauss2", "--rtol", "1", "--check-every", "4") == 0
    error = capsys.readouterr().err
    assert "batch: 6 steps (2 converged, 4 not_checked), ΔL " in error
    assert " nat over the 2 checked steps, 12 gradient evaluations" in error
    assert "nan" not in error


def test_where_none_of_the_steps_was_checked_the_last_lines_say_so(
    run: Path, replay: Command, capsys: Captured
) -> None:
    assert replay(run, "--rule", "gauss2", "--check-every", "4", "--chunk", "3", "--steps", "1:2") == 0
    capsys.readouterr()
    (folder,) = (entry for entry in (run / "shards").iterdir() if entry.is_dir())
    for file in folder.glob("*.safetensors"):
        file.unlink()
    assert replay(run, "--rule", "gauss2", "--check-every", "7", "--chunk", "1", "--steps", "1:3") == 0
    assert "batch: no step's residual was taken" in capsys.readouterr().err


def test_an_lca_that_is_not_finite_is_told_also_where_it_was_not_checked(
    run: Path, replay: Command, folder: Callable[[Path, str], ShardFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = LossSurface.evaluate

    def diverging(surface: LossSurface, *given: Any, **options: Any) -> Evaluation:
        found = evaluate(surface, *given, **options)
        next(iter(found.gradient.values())).fill_(torch.nan)
        return found

    monkeypatch.setattr(LossSurface, "evaluate", diverging)
    assert replay(run, "--rule", "gauss2", "--check-every", "6", "--chunk", str(STEPS)) == 3
    assert (_read(folder, run).per_step["status"] == Status.NOT_FINITE).all()


@pytest.mark.parametrize("rule", ["simpson", "trapezoid", "adaptive"])
def test_rules_that_have_the_losses_anyway_refuse_it(run: Path, replay: Command, capsys: Captured, rule: str) -> None:
    assert replay(run, "--rule", rule, "--check-every", "2") == 2
    assert (
        f"--check-every 2: the {rule} rule has the losses at both ends of a step without further cost, so that every "
        "step is checked; leave it out, or choose a rule such as gauss2"
    ) in capsys.readouterr().err
