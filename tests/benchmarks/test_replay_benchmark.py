"""The benchmark of replay on runs of a few steps: what it counts and says, not how fast anything is."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks import replay, replayreport, replayruns, replaystacked, replayworkers
from benchmarks.replayworkers import Clock, Workers


def test_a_case_in_json_counts_evaluations_and_finds_the_books_in_balance(capsys: pytest.CaptureFixture[str]) -> None:
    assert replay.main(["--case", "digits", "--chunk", "3", "--turns", "2", "--json"]) == 0
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    adaptive, simpson = printed["cases"]["digits"]
    assert (adaptive["steps"], simpson["steps"]) == (6, 6)
    # One more than two a step for each chunk.
    assert simpson["evaluations"] == pytest.approx(2 + 1 / 3)
    assert adaptive["evaluations"] >= simpson["evaluations"]
    assert adaptive["residual_worst"] <= simpson["residual_worst"]
    assert len(simpson["ratios"]) == 2


def test_stacked_gradients_are_those_made_one_by_one() -> None:
    order = random.Random(1)
    found = replaystacked.measure("digits", replayruns.digits(), examples=20, points=3, turns=2, order=order)
    assert found.difference < 1e-5
    assert len(found.ratios) == 2


def test_one_worker_and_two_replay_the_same_run_in_turns(tmp_path: Path) -> None:
    steps = 4 * replayworkers.CHUNK
    run = tmp_path / "run"
    replayruns.record(run, replayruns.digits, steps=steps, examples=32, lr=0.1, adam=False, device="cpu")
    found = replayworkers.measure(run, steps=steps, turns=1, seed=1)
    for (clock,) in (found.one, found.two):
        assert 0 < clock.pace * steps < clock.whole


def test_the_page_says_whether_two_workers_are_fast_enough() -> None:
    one, two = (Clock(whole=19.0, pace=0.2), Clock(whole=10.0, pace=0.12))
    page = replayreport.text({"workers": Workers(steps=64, one=(one,), two=(two,))}, replay.TITLES, threads=1)
    assert "| whole command, s | 19 | 10 | **1.90** |  |" in page
    assert "| a step of the steady part, ms | 200 | 120 | **1.67** | ≥ 1.8: NOT reached |" in page
