from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

import recorder
from recorder import recovery
from recorder.manifest import MANIFEST_FILE
from tests.reliability.children import train
from tests.reliability.conftest import Promise
from tests.reliability.counts import KILLS, SEED
from tests.reliability.readings import assert_prefix
from tests.reliability.trainings import DTYPES, OPTIMIZERS, Oracle, build, expected_states
from tests.reliability.warm import WarmProcess, wait_until

pytestmark = pytest.mark.filterwarnings("ignore::recorder.parameters.UnmappedParameterWarning")

_LONGEST_LIFE = 0.35
"""Seconds from the training's start to the last moment at which it may be killed."""

_ENOUGH_STEPS = 1_000
"""More than a training makes in that time."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_training_killed_at_any_moment_leaves_every_safe_step_and_only_whole_ones(
    tmp_path: Path, promise: Promise, warm: WarmProcess, optimizer: str, dtype: str
) -> None:
    run, oracle = tmp_path / "run", tmp_path / "oracle"
    states = expected_states(optimizer, dtype, _ENOUGH_STEPS)
    moments = random.Random(f"{SEED} {optimizer} {dtype}")
    with promise("R1", SEED) as tally:
        for number in range(KILLS // 6):
            after = moments.uniform(0, _LONGEST_LIFE)
            with tally.case(f"kill {number} after {after:.4f} s"):
                pid = warm.start(train, run, oracle, optimizer, dtype)
                if number % 2:  # half of the kills while it surely records, half at any moment from its start
                    wait_until(lambda: Oracle.read(oracle))
                time.sleep(after)
                os.kill(pid, signal.SIGKILL)
                assert warm.wait(pid) == -signal.SIGKILL, warm.log()
                _assert_held(run, states, Oracle.read(oracle))
            shutil.rmtree(run, ignore_errors=True)
            oracle.unlink(missing_ok=True)


def _assert_held(run: Path, states: list[str], safe: dict[int, str]) -> None:
    if not (run / MANIFEST_FILE).exists():
        assert not safe
        recorder.watch(*build("adam"), run=run).close()  # what is left is as good as an empty folder
        return
    recovery.recover(run)
    assert_prefix(run, states, safe)
    assert not list(run.rglob("*.partial")), "left over from the kill"
