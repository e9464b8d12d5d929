"""The loop in the manner of nanoGPT, which fetches its next batch before the optimizer's step."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from recorder.errors import MismatchError
from recorder.recording import Recording
from recorder.runformat import Run
from replay.selfcheck import check_update
from tests.external.whole_way import go_the_whole_way

# Which component a parameter belongs to is another matter.
pytestmark = pytest.mark.filterwarnings("ignore::recorder.parameters.UnmappedParameterWarning")

example = importlib.import_module("examples.nanogpt_loop")


def test_the_loop_of_the_example_goes_the_whole_way_with_balanced_books(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    cube = go_the_whole_way("nanogpt_loop.py", "runs/nanogpt", run, capsys, steps=example.UPDATES)
    assert float(cube["loss_end"].sel(data="probe")[-1]) < float(cube["loss_start"].sel(data="probe")[0]) - 0.2
    assert (cube["predictions"] == example.MICRO_BATCHES * example.CROPS * example.CONTEXT).all()
    assert cube["lr"].values == pytest.approx([example.learning_rate(t, example.UPDATES) for t in range(24)])
    opened = Run(run)
    # Tied: one parameter, under one of its names.
    assert {row.name: row.aliases for row in opened.manifest.parameters if row.aliases} == {
        "transformer.wte.weight": ("lm_head.weight",)
    }


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "not fused"])
def test_every_micro_batch_is_the_one_that_went_into_the_forward_pass(tmp_path: Path, fused: bool) -> None:
    example.train(str(tmp_path / "run"), updates=3, fused=fused)
    run = Run(tmp_path / "run")
    assert run.steps == [0, 1, 2]
    fetched: list[list[int]] = []
    for t in run.steps:
        for micro_batch in run.step(t).micro_batches:
            starts = micro_batch.indices.tolist()
            collated = example.workload().batch(starts, split="train", epoch=1)
            assert all(torch.equal(micro_batch.batch()[name], collated[name]) for name in ("x", "y"))
            assert starts not in fetched
            fetched.append(starts)
    report = check_update(run, example.workload(), data=True)
    assert "losses and parameters are the recorded ones" in report.text


def test_an_announcement_of_another_batch_than_the_one_trained_on_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    announce = Recording.batch

    def announce_the_next(self: Recording, starts: torch.Tensor, batch: object) -> None:
        # As a loop would that announces what it holds just before its step.
        with torch.random.fork_rng(devices=[]):
            starts, batch = example.get_batch("train")
        announce(self, starts, batch)

    monkeypatch.setattr(Recording, "batch", announce_the_next)
    example.train(str(tmp_path / "run"), updates=2)
    with pytest.raises(MismatchError, match="training recorded a loss of"):
        check_update(Run(tmp_path / "run"), example.workload(), data=True)
