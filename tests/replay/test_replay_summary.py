"""The last lines of a replay: the books of one loss data in numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from replay.shards import PER_PARAMETER, PER_STEP, PER_UNIT, Parameter, Settings, Shard, ShardFolder, Status
from replay.summary import summarise

PARAMETER = Parameter(name="w", shape=(1,), dtype="float32")


def _folder(run: Path, residuals: Sequence[float], ends: Sequence[float], status: Sequence[Status]) -> ShardFolder:
    settings = Settings(
        run_id="1",
        parameter_table="",
        path="recorded",
        loss_data="batch",
        loss_data_settings={},
        rule="simpson",
        rtol=1e-2,
        atol=1e-5,
        dropout="off",
        chunk=2,
        recipe={},
    )
    folder = ShardFolder.create(run, settings, [PARAMETER], {})
    columns = {"step": range(10, 10 + len(ends)), "loss_start": [3.0, *ends[:-1]], "loss_end": ends}
    columns |= {"residual": residuals, "status": status, "evaluations": [3] * len(ends)}
    for start in range(0, len(ends), 2):
        rows = slice(start, start + 2)
        steps = len(ends[rows])
        shard = Shard(
            per_step={
                name: np.array(columns[name][rows] if name in columns else [0] * steps, dtype)
                for name, dtype in PER_STEP.items()
            },
            per_unit={quantity: {"w": np.zeros((steps, 1), dtype)} for quantity, dtype in PER_UNIT.items()},
            per_parameter={quantity: {"w": np.zeros(steps, dtype)} for quantity, dtype in PER_PARAMETER.items()},
        )
        folder.write(10 + start, 10 + start + steps, shard)
    return folder


def test_the_books_are_summed_over_all_shards(tmp_path: Path) -> None:
    status = [Status.CONVERGED, Status.TOLERANCE_NOT_MET, Status.CONVERGED]
    summary = summarise(_folder(tmp_path, [1e-3, -4e-3, 2e-3], [2.0, 2.5, 1.5], status))
    assert summary.steps == 3
    assert {status: count for status, count in summary.counts.items() if count} == {
        Status.CONVERGED: 2,
        Status.TOLERANCE_NOT_MET: 1,
    }
    assert not summary.balanced
    assert (summary.change, summary.cumulative_change) == (-1.5, 2.5)
    assert (summary.residual_median, summary.residual_worst, summary.worst_step) == (2e-3, 4e-3, 11)
    assert summary.cumulative_residual == pytest.approx(-1e-3)
    counts, residuals = summary.lines("batch")
    assert counts == "batch: 3 steps (2 converged, 1 tolerance_not_met), ΔL -1.5000 nat, 9 gradient evaluations"
    assert residuals.startswith(
        "batch: |residual| median 2.0e-03, 99th percentile 4.0e-03, worst 4.0e-03 nat at step 11;"
    )
    assert residuals.endswith("; cumulative 4.0e-04 of Σ|ΔL|")


@pytest.mark.parametrize(
    ("residuals", "ends"),
    [
        ([1e-3, math.nan, math.nan, 0.0], [2.0, math.inf, math.inf, 1.0]),
        ([1e-3, math.inf, -math.inf, 0.0], [2.0, -math.inf, math.nan, 1.0]),
    ],
)
def test_a_diverged_training_is_summed_up_without_a_warning(
    tmp_path: Path, residuals: list[float], ends: list[float]
) -> None:
    status = [Status.CONVERGED, Status.NOT_FINITE, Status.NOT_FINITE, Status.CONVERGED]
    summary = summarise(_folder(tmp_path, residuals, ends, status))
    assert not summary.balanced
    assert summary.worst_step == 11
    assert not math.isfinite(summary.residual_worst)
    assert summary.lines("batch")[0].startswith("batch: 4 steps (2 converged, 2 not_finite), ΔL +nan nat")
