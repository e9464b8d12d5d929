from __future__ import annotations

import collections
import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import recorder
from recorder import recovery
from recorder.manifest import MANIFEST_FILE
from tests.reliability.children import train, train_inline, train_threaded
from tests.reliability.conftest import Promise
from tests.reliability.counts import CALL_STRIDE, KILLED_CALLS, SEED
from tests.reliability.readings import assert_prefix
from tests.reliability.trainings import Oracle, build, expected_states
from tests.reliability.warm import WarmProcess, wait_until

_FILES = ["openat", "close", "rename", "renameat", "renameat2", "unlink", "unlinkat", "mkdir", "mkdirat", "flock"]
_CONTENTS = ["write", "pwrite64", "fsync", "ftruncate", "chmod", "fchmod", "fchmodat"]
_ALL = ",".join(f"?{call}" for call in _FILES + _CONTENTS)  # not every system has them all
_STEPS = 5


def _strace_works() -> bool:
    if shutil.which("strace") is None:
        return False
    return subprocess.run(["strace", "-o", os.devnull, "true"], check=False, capture_output=True).returncode == 0


pytestmark = [
    pytest.mark.skipif(not _strace_works(), reason="strace is not installed, or may not trace here"),
    pytest.mark.filterwarnings("ignore::recorder.parameters.UnmappedParameterWarning"),
]


@contextmanager
def _traced(pid: int, *options: str) -> Iterator[None]:
    """Let strace hold a process that has stopped itself, and the process go on."""
    wait_until(lambda: re.search(r"^State:\s+T", _status(pid), re.MULTILINE))
    strace = subprocess.Popen(["strace", "-p", str(pid), *options], stderr=subprocess.DEVNULL)
    wait_until(lambda: not re.search(r"^TracerPid:\s+0$", _status(pid), re.MULTILINE))
    os.kill(pid, signal.SIGCONT)
    try:
        yield
    finally:
        strace.wait()


def _status(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text()


def _calls_of_a_commit(warm: WarmProcess, folder: Path, first_step: int) -> collections.Counter[str]:
    trace = folder / "trace"
    pid = warm.start(train_inline, folder / "run", folder / "oracle", first_step, _STEPS)
    with _traced(pid, "-e", f"trace={_ALL}", "-o", str(trace)):
        assert warm.wait(pid) == 0, warm.log()
    return collections.Counter(re.findall(r"^(\w+)\(", trace.read_text(), re.MULTILINE))


def _begin(warm: WarmProcess, folder: Path, first_step: int) -> None:
    folder.mkdir(exist_ok=True)
    if first_step:
        warm.run(train, folder / "run", folder / "oracle", "adam", "float32", 0, first_step, 2)


@pytest.mark.parametrize("first_step", [0, 3], ids=["a new run", "an append"])
def test_a_kill_at_any_system_call_leaves_every_safe_step_and_only_whole_ones(
    tmp_path: Path, promise: Promise, warm: WarmProcess, first_step: int
) -> None:
    states = expected_states("adam", "float32", _STEPS)
    begun = tmp_path / "begun"
    _begin(warm, begun, first_step)
    counted = tmp_path / "counted"
    shutil.copytree(begun, counted)
    calls = _calls_of_a_commit(warm, counted, first_step)
    assert {"openat", "fsync", "pwrite64", "flock"} <= set(calls)
    points = [(call, number) for call, times in sorted(calls.items()) for number in range(1, times + 1)]
    if len(points) > KILLED_CALLS:
        points = random.Random(SEED).sample(points, KILLED_CALLS)
    with promise("R2", SEED) as tally:
        for call, number in points:
            with tally.case(f"{call} {number}"):
                folder = tmp_path / "killed"
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(begun, folder)
                pid = warm.start(train_inline, folder / "run", folder / "oracle", first_step, _STEPS)
                with _traced(
                    pid, "-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL:when={number}", "-o", os.devnull
                ):
                    assert warm.wait(pid) == -signal.SIGKILL, warm.log()
                _assert_safe(folder, states)


def test_a_kill_at_any_system_call_of_either_thread_leaves_every_safe_step(
    tmp_path: Path, promise: Promise, warm: WarmProcess
) -> None:
    states = expected_states("adam", "float32", _STEPS)
    folder = tmp_path / "killed"
    with promise("R2", SEED) as tally:
        for call in ("openat", "write", "pwrite64", "fsync", "close", "unlink", "rename", "ftruncate"):
            for number in range(1, 1000, CALL_STRIDE):
                killed = True
                with tally.case(f"{call} {number}"):
                    shutil.rmtree(folder, ignore_errors=True)
                    folder.mkdir()
                    pid = warm.start(train_threaded, folder / "run", folder / "oracle", 0, _STEPS)
                    inject = f"inject={call}:signal=SIGKILL:when={number}"
                    with _traced(pid, "-f", "-e", f"trace={call}", "-e", inject, "-o", os.devnull):
                        killed = warm.wait(pid) == -signal.SIGKILL
                    _assert_safe(folder, states)
                if not killed:
                    break


def _assert_safe(folder: Path, states: list[str]) -> None:
    safe = Oracle.read(folder / "oracle")
    run = folder / "run"
    if not (run / MANIFEST_FILE).exists():
        assert not safe
        recorder.watch(*build("adam"), run=run).close()  # what is left is as good as an empty folder
        return
    recovery.recover(run)
    assert_prefix(run, states, safe)
