"""What training loops do besides the mean over predictions, and what the self-check makes of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import recorder
from recorder.errors import MismatchError
from recorder.runformat import Run
from replay.selfcheck import check_update
from tests.cases import LanguageModelling


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByMicroBatch(LanguageModelling):
    """Every micro-batch counts as one prediction, as in a loop that averages their means."""

    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor | float]:
        loss_sum, predictions = super().loss(model, batch)
        return loss_sum / predictions, 1.0


def record_mean_of_means(run: Path, task: LanguageModelling, sizes: tuple[int, ...]) -> Run:
    torch.manual_seed(0)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with recorder.watch(model, optimizer, run=run, strict=True) as rec:
        start = 0
        for size in sizes:
            indices = list(range(start, start + size))
            start += size
            batch = task.batch(indices, split="train", epoch=1)
            rec.batch(indices, batch)
            loss_sum, predictions = task.loss(model, batch)
            rec.loss(loss_sum.detach(), predictions)
            (loss_sum / predictions / len(sizes)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return Run(run)


def test_a_mean_of_means_over_micro_batches_of_one_size_is_the_mean_over_predictions(tmp_path: Path) -> None:
    task = LanguageModelling()
    report = check_update(record_mean_of_means(tmp_path, task, (4, 4)), task, data=True)
    assert report.text.startswith("step 0 done again: losses and parameters are the recorded ones")


def test_a_mean_of_means_over_ragged_micro_batches_is_told_and_has_a_workload_of_its_own(tmp_path: Path) -> None:
    told = r"by 0\.\d+ of the update's norm .* may also have weighed them otherwise than by their predictions"
    by_predictions, by_micro_batch = LanguageModelling(), ByMicroBatch()
    with pytest.raises(MismatchError, match=told):
        check_update(record_mean_of_means(tmp_path / "told", by_predictions, (7, 1)), by_predictions, data=True)
    report = check_update(record_mean_of_means(tmp_path / "own", by_micro_batch, (7, 1)), by_micro_batch, data=True)
    assert report.text.startswith("step 0 done again: losses and parameters are the recorded ones")


def test_an_update_of_lbfgs_is_not_done_again_but_its_loss_is_measured_again(tmp_path: Path) -> None:
    task = LanguageModelling()
    torch.manual_seed(0)
    model = task.model()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    batch = task.batch([0, 1, 2], split="train", epoch=1)

    def closure() -> Any:
        optimizer.zero_grad()
        rec.batch([0, 1, 2], batch)
        loss_sum, predictions = task.loss(model, batch)
        rec.loss(loss_sum.detach(), predictions)
        (loss_sum / predictions).backward()  # type: ignore[no-untyped-call]
        return loss_sum / predictions

    with recorder.watch(model, optimizer, run=tmp_path, strict=True) as rec:
        for _ in range(2):
            optimizer.step(closure)  # type: ignore[no-untyped-call]
    report = check_update(Run(tmp_path), task, data=True)
    assert report.text == (
        "step 0 done again: losses are the recorded ones, bit for bit (parameters not compared: LBFGS measures loss "
        "and gradient several times in an update, at parameters that no step records)"
    )
