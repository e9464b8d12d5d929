"""What replay takes of memory is foretold, and does not grow with the run."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.reliability import replaying
from tests.reliability.conftest import Promise
from tests.reliability.counts import LONG_REPLAY_SIZE, REPLAY_LOSS_DATA, REPLAY_SIZES, REPLAY_STEPS

if not Path("/proc/self/status").exists():
    pytest.skip("the peak of a process's memory is read from /proc", allow_module_level=True)

RULES = {"simpson": 1e-3, "gauss2": 1e-3, "adaptive": 0.0}
"""Rule to tolerance: with 0 the adaptive rule refines every step as far as it goes."""


def _replay(run: Path, rule: str, loss_data: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.reliability.replaying", str(run), rule, loss_data, str(RULES[rule])],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@pytest.mark.parametrize("size", REPLAY_SIZES)
def test_memory_stays_within_a_fifth_of_what_was_foretold(size: str, tmp_path: Path, promise: Promise) -> None:
    # In a small heap chance weighs more, and takes longer to have its worst.
    steps = 24 if size == "tiny" else 5
    replaying.record(tmp_path / "run", size, steps)
    with promise("P7") as tally:
        for rule in RULES:
            for loss_data in REPLAY_LOSS_DATA:
                with tally.case(f"{size}, {rule}, {loss_data}"):
                    told = _replay(tmp_path / "run", rule, loss_data)
                    if rule == "adaptive":
                        assert told["evaluations"] > 3 * steps, "no step was refined"
                    taken = max(told["taken"])
                    assert 0.8 * told["foretold"] < taken < 1.2 * told["foretold"], told


def test_ten_times_the_steps_take_the_same_memory(tmp_path: Path, promise: Promise) -> None:
    replaying.record(tmp_path / "run", LONG_REPLAY_SIZE, 10 * REPLAY_STEPS)
    with promise("P7") as tally, tally.case("ten times the steps"):
        told = _replay(tmp_path / "run", "simpson", "batch")
        # A chunk's peak moves by chance, with what the reader does meanwhile and what the heap can reuse: now and then
        # one of many stands out by some 20 MB, much for a small model. A run that grows would leave them all behind.
        of_chunks = told["taken"]
        first, later = max(of_chunks[: len(of_chunks) // 10]), statistics.median(of_chunks[len(of_chunks) // 2 :])
        assert later < 1.1 * first, told
        assert sorted(of_chunks)[len(of_chunks) * 9 // 10] < 1.2 * told["foretold"], told
