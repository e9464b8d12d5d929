from __future__ import annotations

import json
import os
import shutil
import signal
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import recorder
from recorder import recovery, runfolder
from recorder.errors import UsageError
from recorder.runformat import Run
from tests.reliability.children import hold, hold_after_children, race
from tests.reliability.conftest import Promise
from tests.reliability.counts import WRITERS
from tests.reliability.readings import assert_prefix
from tests.reliability.trainings import build, expected_states, update
from tests.reliability.warm import WarmProcess, wait_until

pytestmark = pytest.mark.filterwarnings("ignore::recorder.parameters.UnmappedParameterWarning")


def _tree(run: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(run.rglob("*")) if file.is_file()}


def _assert_refused(run: Path) -> None:
    before = _tree(run)
    with pytest.raises(UsageError, match="is being recorded into by another process"):
        recorder.watch(*build("adam"), run=run)
    assert recovery.recover(run) == ""
    assert _tree(run) == before


def test_a_second_recorder_is_refused_as_long_as_the_first_one_lives(
    tmp_path: Path, promise: Promise, warm: WarmProcess
) -> None:
    with promise("R10") as tally:
        pid = warm.start(hold, tmp_path / "run", tmp_path / "ready", 2)
        wait_until((tmp_path / "ready").exists)
        for number in range(WRITERS):
            with tally.case(f"second recorder {number}"):
                _assert_refused(tmp_path / "run")
        _end(warm, pid, tmp_path / "ready")


def test_children_that_end_do_not_give_the_run_away_and_write_nothing(
    tmp_path: Path, promise: Promise, warm: WarmProcess
) -> None:
    with promise("R10") as tally, tally.case("ended children"):
        pid = warm.start(hold_after_children, tmp_path / "run", tmp_path / "ready")
        wait_until((tmp_path / "ready").exists)
        assert Run(tmp_path / "run").manifest.state == "recording"
        _assert_refused(tmp_path / "run")
        _end(warm, pid, tmp_path / "ready")
        recovery.recover(tmp_path / "run")
        assert assert_prefix(tmp_path / "run", expected_states("adam", "float32", 1)) == 1


def test_a_killed_recorder_gives_the_run_back_though_its_children_live_on(
    tmp_path: Path, promise: Promise, warm: WarmProcess
) -> None:
    states = expected_states("adam", "float32", 2)
    with promise("R10") as tally:
        for number in range(WRITERS):
            run, ready = tmp_path / f"run{number}", tmp_path / f"ready{number}"
            with tally.case(f"killed recorder {number}"):
                pid = warm.start(hold, run, ready, 2)
                wait_until(ready.exists)
                os.kill(pid, signal.SIGKILL)
                warm.wait(pid)
                model, optimizer = build("adam")
                update(model, optimizer, 0)
                with recorder.watch(model, optimizer, run=run, first_step=1) as rec:
                    update(model, optimizer, 1, rec)
                assert assert_prefix(run, states) == 2
                _end(warm, None, ready)
                assert assert_prefix(run, states) == 2


def test_of_two_recorders_that_begin_at_once_one_records(tmp_path: Path, promise: Promise, warm: WarmProcess) -> None:
    states = expected_states("adam", "float32", 1)
    with promise("R10") as tally:
        for number in range(WRITERS):
            folder = tmp_path / str(number)
            folder.mkdir()
            with tally.case(f"race {number}"):
                results = [folder / "one", folder / "other"]
                pids = [warm.start(race, folder / "run", folder / "start", result) for result in results]
                (folder / "start").touch()
                wait_until(lambda: all(result.exists() and result.read_text() for result in results))  # noqa: B023
                told = sorted(result.read_text() for result in results)
                for pid in pids:
                    if Path(f"/proc/{pid}").exists():
                        os.kill(pid, signal.SIGKILL)
                    warm.wait(pid)
                assert "is being recorded into by another process" in told[0]
                assert told[1] == "recording"
                recovery.recover(folder / "run")
                assert assert_prefix(folder / "run", states) == 1
            shutil.rmtree(folder)


@pytest.mark.parametrize("back", [timedelta(hours=1), timedelta(days=20_000)], ids=["an hour", "to 1970"])
def test_a_clock_set_back_changes_no_order(
    tmp_path: Path, promise: Promise, monkeypatch: pytest.MonkeyPatch, back: timedelta
) -> None:
    states = expected_states("adam", "float32", 9)

    class Earlier(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return datetime.now(UTC) - back

    with promise("R10") as tally, tally.case(f"the clock goes back {back}"):
        for first_step, stop in ((0, 6), (3, 9)):
            model, optimizer = build("adam")
            for step in range(first_step):
                update(model, optimizer, step)
            with recorder.watch(model, optimizer, run=tmp_path / "run", first_step=first_step, segment_steps=2) as rec:
                for step in range(first_step, stop):
                    update(model, optimizer, step, rec)
            monkeypatch.setattr(runfolder, "datetime", Earlier)
            monkeypatch.setattr(time, "time", lambda: 1000.0)
        for age, file in enumerate(sorted((tmp_path / "run").rglob("*.safetensors"))):
            os.utime(file, (1000 - age, 1000 - age))
        assert assert_prefix(tmp_path / "run", states) == 9
        run = Run(tmp_path / "run")
        assert run.attempts == [(1, 0, 3), (2, 3, 9)]
        first, second = run.manifest.attempts
        assert second.created < first.created


def _end(warm: WarmProcess, pid: int | None, ready: Path) -> None:
    for child in json.loads(ready.read_text()):
        os.kill(child, signal.SIGKILL)
    if pid is not None:
        os.kill(pid, signal.SIGKILL)
        warm.wait(pid)
