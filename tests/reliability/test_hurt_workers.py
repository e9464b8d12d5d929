from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.existing_cluster import existing_cluster
from tests.reliability import replays
from tests.reliability.conftest import Promise
from tests.reliability.counts import HURT_REPLAYS, HURTS, SEED, STANDSTILL_KINDS, STANDSTILLS
from tests.reliability.replays import SECONDS, Recorded, finish, hashes, shard_files, start, workers
from tests.reliability.warm import wait_until

pytestmark = pytest.mark.cluster

_PATIENCE = 60
"""Seconds within which every command here must end after its last progress; it is told to wait for less."""


def _starve(pid: int) -> None:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    resource.prlimit(pid, resource.RLIMIT_AS, (pages * resource.getpagesize(), resource.RLIM_INFINITY))


HURT: dict[str, Callable[[int], None]] = {
    "killed": lambda pid: os.kill(pid, signal.SIGKILL),
    "crashed": lambda pid: os.kill(pid, signal.SIGSEGV),
    "starved": _starve,
    "stopped": lambda pid: os.kill(pid, signal.SIGSTOP),
}


def test_workers_that_die_or_stop_or_starve_do_not_change_a_byte(
    tmp_path: Path, promise: Promise, replayed: Recorded
) -> None:
    choices = random.Random(SEED)
    with promise("P1", SEED) as tally:
        for number in range(HURT_REPLAYS):
            run = replayed.copy(tmp_path / str(number))
            with tally.case(f"replay {number}"):
                process = start(run, "--workers", "2", "--stall-seconds", "20", **{SECONDS: "0.03"})
                ways = list(HURT) if len(HURT) == HURTS else choices.choices(list(HURT), k=HURTS)
                for way in ways:
                    _wait_for_workers(process)
                    time.sleep(choices.uniform(0, 1))
                    with contextlib.suppress(OSError, IndexError):  # just then it was gone, or none was there
                        HURT[way](choices.choice(workers(process.pid)))
                code, said = finish(process, 3 * _PATIENCE)
                assert code == 0, said
                assert hashes(run) == replayed.hashes


def _wait_for_workers(process: replays.Command) -> None:
    wait_until(lambda: workers(process.pid) or process.poll() is not None)


def _workers_killed_while_starting_once(folder: Path, recorded: Recorded) -> None:
    run = recorded.copy(folder / "run")
    process = start(run, "--workers", "2", "--stall-seconds", "30")
    wait_until(lambda: len(workers(process.pid)) == 2)
    for pid in workers(process.pid):
        os.kill(pid, signal.SIGKILL)
    code, said = finish(process, _PATIENCE)
    assert code == 0, said
    assert hashes(run) == recorded.hashes


def _workers_stopped_while_starting_once(folder: Path, recorded: Recorded) -> None:
    run = recorded.copy(folder / "run")
    process = start(run, "--workers", "2", "--stall-seconds", "30")
    wait_until(lambda: len(workers(process.pid)) == 2)
    for pid in workers(process.pid):
        os.kill(pid, signal.SIGSTOP)
    code, said = finish(process, 2 * _PATIENCE)
    assert code == 0, said
    assert hashes(run) == recorded.hashes


def _workers_stopped_whenever_they_start(folder: Path, recorded: Recorded) -> None:
    run = recorded.copy(folder / "run")
    process = start(run, "--workers", "2", "--stall-seconds", "10")
    until = time.monotonic() + 2 * _PATIENCE
    while process.poll() is None and time.monotonic() < until:
        for pid in workers(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        time.sleep(0.1)
    assert "no step was finished for 10 s with 0 workers ready" in _assert_ends_and_tells(process, run)


def _scheduler_killed(folder: Path, recorded: Recorded) -> None:
    run = recorded.copy(folder / "run")
    with existing_cluster(folder, **{SECONDS: "0.05"}) as cluster:
        process = start(run, "--scheduler-file", str(cluster.file), "--stall-seconds", "30")
        wait_until(lambda: shard_files(run))
        cluster.scheduler.kill()
        _assert_ends_and_tells(process, run)


def _workers_killed_whenever_they_start(folder: Path, recorded: Recorded) -> None:
    run = recorded.copy(folder / "run")
    process = start(run, "--workers", "2", "--stall-seconds", "30")
    until = time.monotonic() + 2 * _PATIENCE
    while process.poll() is None and time.monotonic() < until:
        for pid in workers(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    said = _assert_ends_and_tells(process, run)
    assert "before it was ready" in said


def _workers_of_another_killed(folder: Path, recorded: Recorded) -> None:
    run = recorded.copy(folder / "run")
    with existing_cluster(folder, **{SECONDS: "0.05"}) as cluster:
        process = start(run, "--scheduler-file", str(cluster.file), "--stall-seconds", "10")
        wait_until(lambda: shard_files(run))
        for worker in cluster.workers:
            worker.kill()
        said = _assert_ends_and_tells(process, run)
        assert "no step was finished for 10 s with 0 workers ready" in said


def _scheduler_stopped(folder: Path, recorded: Recorded) -> None:
    run = recorded.copy(folder / "run")
    with existing_cluster(folder, **{SECONDS: "0.05"}) as cluster:
        process = start(run, "--scheduler-file", str(cluster.file), "--stall-seconds", "10")
        wait_until(lambda: shard_files(run))
        cluster.scheduler.send_signal(signal.SIGSTOP)
        _assert_ends_and_tells(process, run)


def _no_scheduler(folder: Path, recorded: Recorded) -> None:
    run = recorded.copy(folder / "run")
    _assert_ends_and_tells(start(run, "--scheduler-file", str(folder / "none"), "--stall-seconds", "2"), run)
    _assert_ends_and_tells(start(run, "--scheduler-address", "tcp://127.0.0.1:9", "--stall-seconds", "2"), run)


def _all_workers_stopped(folder: Path, recorded: Recorded) -> None:
    run = recorded.copy(folder / "run")
    # Long enough to find out that they are silent, a third of it, and to start others on a busy machine.
    process = start(run, "--workers", "2", "--stall-seconds", "45", **{SECONDS: "0.05"})
    wait_until(lambda: shard_files(run))
    for pid in workers(process.pid):
        os.kill(pid, signal.SIGSTOP)
    code, said = finish(process, 2 * _PATIENCE)
    assert code == 0, said
    assert hashes(run) == recorded.hashes


def _driver_killed(folder: Path, recorded: Recorded) -> None:
    run = recorded.copy(folder / "run")
    process = start(run, "--workers", "2", **{SECONDS: "0.05"})
    wait_until(lambda: shard_files(run))
    orphans = workers(process.pid)
    process.kill()
    process.communicate()
    assert orphans
    wait_until(lambda: not any(replays.alive(pid) for pid in orphans))


STANDSTILL = (
    _scheduler_killed,
    _workers_killed_while_starting_once,
    _workers_stopped_while_starting_once,
    _workers_stopped_whenever_they_start,
    _workers_killed_whenever_they_start,
    _workers_of_another_killed,
    _scheduler_stopped,
    _no_scheduler,
    _all_workers_stopped,
    _driver_killed,
)


def _assert_ends_and_tells(process: replays.Command, run: Path) -> str:
    code, said = finish(process, _PATIENCE)
    assert code == 1, said
    missing = replays.STEPS - len(shard_files(run)) // 2
    last = said.splitlines()[-1]
    assert "; missing: steps " in last
    # Workers that this command did not start may finish what they are at after it has ended.
    assert missing <= replays.told_missing(last) <= missing + 2, said
    return said


def test_a_replay_that_can_not_go_on_ends_and_says_what_is_missing(
    tmp_path: Path, promise: Promise, replayed: Recorded
) -> None:
    with promise("P2", SEED) as tally:
        for standstill in STANDSTILL[:STANDSTILL_KINDS]:
            for number in range(STANDSTILLS):
                folder = tmp_path / f"{standstill.__name__}{number}"
                folder.mkdir()
                with tally.case(folder.name):
                    standstill(folder, replayed)
