from __future__ import annotations

import errno
import json
import os
import random
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from recorder import recovery
from recorder.manifest import MANIFEST_FILE
from recorder.runformat import Run
from tests.reliability.children import WIDE, train_on_a_disk_of_its_own, train_to_the_end, train_with_a_largest_file
from tests.reliability.conftest import Promise
from tests.reliability.counts import DISK_SIZES, FAILING_CALLS, SEED
from tests.reliability.readings import assert_prefix
from tests.reliability.trainings import expected_states
from tests.reliability.warm import WarmProcess

_STEPS = 60
_ENOUGH_BYTES = 1_900_000
_ENOUGH_FILES = 24
_NARROW = 8
_FEW_STEPS = 10


def _check(run: Path, result: Path, states: Sequence[str], *, says_why: bool = True) -> str:
    """The training was not harmed, what was recorded reads back, the run says why it ended; return its state."""
    outcome = json.loads(result.read_text())
    assert outcome["model"] == states[-1], "the recorder changed the training"
    if not (run / MANIFEST_FILE).exists():
        assert outcome["refusal"] or outcome["warned"], "ended in silence"
        return "no run"
    said = Run(run).manifest.state
    recovery.recover(run)
    steps = assert_prefix(run, states)
    if said == "complete":
        assert steps == len(states) - 1
        return said
    assert outcome["warned"], "ended in silence"
    if says_why:
        # At the last one where it was whole, but the end of its segment was not.
        reasons = tuple(f"incomplete: OSError at step {step}: [Errno " for step in (steps, steps - 1))
        assert said.startswith(reasons), (said, steps)
    return said


def test_a_disk_that_fills_up_ends_the_recording_and_not_the_training(
    tmp_path: Path, promise: Promise, warm_in_own_mounts: WarmProcess
) -> None:
    sizes = [f"size={_ENOUGH_BYTES * number // DISK_SIZES}" for number in range(1, DISK_SIZES + 1)]
    files = [f"nr_inodes={number}" for number in range(2, _ENOUGH_FILES + 1, max(1, 44 // DISK_SIZES))]
    states = expected_states("adam", "float32", _STEPS, WIDE)
    disk, saved, result = tmp_path / "disk", tmp_path / "saved", tmp_path / "result"
    disk.mkdir()
    endings = []
    with promise("R4") as tally:
        for options in [*sizes, *files, "ro"]:
            with tally.case(options):
                warm_in_own_mounts.run(train_on_a_disk_of_its_own, options, disk, saved, result, _STEPS)
                endings.append(_check(saved, result, states))
            shutil.rmtree(saved, ignore_errors=True)
        assert "complete" in endings  # the largest disk held it all
        assert len({ending for ending in endings if "No space left on device" in ending}) >= DISK_SIZES // 2


def test_a_largest_size_of_a_file_ends_the_recording_and_not_the_training(
    tmp_path: Path, promise: Promise, warm: WarmProcess
) -> None:
    states = expected_states("adam", "float32", _STEPS, WIDE)
    with promise("R4") as tally:
        for number in range(1, DISK_SIZES + 1):
            size = 400_000 * number // DISK_SIZES
            with tally.case(f"{size} bytes"):
                run, result = tmp_path / f"run{size}", tmp_path / f"result{size}"
                warm.run(train_with_a_largest_file, size, run, result, _STEPS)
                _check(run, result, states)


class _FailingSystem:
    """Python's calls to the operating system, of which one fails, or all from that one on."""

    calls = ("open", "write", "pwrite", "fsync", "ftruncate", "close", "replace", "unlink", "mkdir", "chmod")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, first: int, code: int, *, for_ever: bool) -> None:
        self.made = 0
        self._first, self._code, self._for_ever = first, code, for_ever
        self._lock = threading.Lock()
        for name in self.calls:
            monkeypatch.setattr(os, name, self._failing(name, getattr(os, name)))

    def _failing(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                self.made += 1
                fails = self.made == self._first or (self._for_ever and self.made > self._first)
            if fails and name == "close":
                real(*args, **kwargs)  # it is closed nevertheless
            if fails:
                raise OSError(self._code, os.strerror(self._code))
            return real(*args, **kwargs)

        return call


@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "from then on"])
def test_any_call_to_the_system_may_fail_without_harm_to_the_training(
    tmp_path: Path, promise: Promise, for_ever: bool
) -> None:
    states = expected_states("adam", "float32", _FEW_STEPS, _NARROW)
    with pytest.MonkeyPatch.context() as monkeypatch:
        system = _FailingSystem(monkeypatch, 0, 0, for_ever=False)
        train_to_the_end(str(tmp_path / "run"), str(tmp_path / "result"), _FEW_STEPS, _NARROW)
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
    points = [(number, code) for number in range(1, system.made + 1) for code in codes]
    if len(points) > FAILING_CALLS:
        points = random.Random(SEED).sample(points, FAILING_CALLS)
    with promise("R4", SEED) as tally:
        for number, code in points:
            with tally.case(f"call {number} fails with {errno.errorcode[code]}"):
                folder = tmp_path / f"{number}-{code}"
                folder.mkdir()
                with pytest.MonkeyPatch.context() as monkeypatch:
                    _FailingSystem(monkeypatch, number, code, for_ever=for_ever)
                    train_to_the_end(str(folder / "run"), str(folder / "result"), _FEW_STEPS, _NARROW)
                _check(folder / "run", folder / "result", states, says_why=not for_ever)
                shutil.rmtree(folder)
