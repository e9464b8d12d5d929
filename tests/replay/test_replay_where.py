"""Where the work is done: clusters that are there already, job arrays, GPUs; and what is written down of it."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recorder.segments import segment_file
from replay import log, where, work
from replay.__main__ import main
from replay.cluster.dispatch import from_anywhere
from replay.cluster.schedulers import environments
from replay.cluster.worker import TaskError
from replay.job import Job, Receipt, Task
from replay.where import Where
from replay.workers import WorkerProcesses
from tests.existing_cluster import existing_cluster

Captured = pytest.CaptureFixture[str]
Command = Callable[..., int]
Stamps = Callable[[Path], dict[str, Any]]

BOTH = ("batch", "probe:16")


def _shards(run: Path) -> dict[str, bytes]:
    return {str(file.relative_to(run)): file.read_bytes() for file in sorted(run.glob("shards/*/*"))}


@pytest.mark.cluster
def test_a_scheduler_and_workers_started_as_separate_commands_give_the_bytes_of_one_process(
    run: Path, tmp_path: Path, replay: Command, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    assert replay(run, "--chunk", "1", loss_data=BOTH) == 0
    alone = _shards(run)
    asked = ["--run", str(run), "--workload", "recorded", "--loss-data", "batch", "--loss-data", "probe:16"]
    with existing_cluster(tmp_path) as cluster:
        for way in ("file", "environment"):
            for path in run.glob("shards/*/*.safetensors"):
                path.unlink()
            work.replayer.cache_clear()
            arguments = [*asked, "--chunk", "1"]
            if way == "file":
                arguments += ["--scheduler-file", str(cluster.file)]
            else:
                monkeypatch.setenv(where.ADDRESS, json.loads(cluster.file.read_text())["address"])
            assert main(arguments) == 0, capsys.readouterr().err + cluster.log.read_text()
            assert _shards(run) == alone, way
        # A cluster outlives the command; it serves the next one, which computes otherwise, as well.
        assert all(worker.poll() is None for worker in cluster.workers)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "other")
        work.replayer.cache_clear()
        address = os.environ[where.ADDRESS]
        monkeypatch.delenv(where.ADDRESS)
        capsys.readouterr()
        assert main([*asked, "--chunk", "1", "--scheduler-address", address]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert "computes otherwise than the process that asks: its recipe is {" in error


def test_n_shares_together_are_one_run_and_no_chunk_is_done_twice(
    run: Path, replay: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert replay(run, "--chunk", "1", loss_data=BOTH) == 0
    whole = _shards(run)
    done: list[int] = []
    compute = work.Replayer.replay

    def spy(self: work.Replayer, task: Task) -> Receipt:
        done.append(task.start)
        return compute(self, task)

    monkeypatch.setattr(work.Replayer, "replay", spy)
    for n in (1, 2, 4, 7):
        for path in run.glob("shards/*/*.safetensors"):
            path.unlink()
        shares = []
        # One after the other, the worst case: each finds what the ones before have finished.
        for i in range(1, n + 1):
            done.clear()
            assert replay(run, "--chunk", "1", "--shard", f"{i}/{n}", loss_data=BOTH) == 0
            shares.append(list(done))
        assert shares == [list(range(6))[i::n] for i in range(n)]
        assert _shards(run) == whole


@pytest.mark.parametrize("text", ["0/4", "5/4", "1/0", "-1/4", "1", "1/2/3", "1 / 4", "²/4", ""])
def test_a_share_out_of_range_is_a_usage_error(run: Path, replay: Command, text: str, capsys: Captured) -> None:
    assert replay(run, f"--shard={text}") == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"python -m replay: error: --shard expects I/N with I from 1 to N, such as 3/8; got {text!r}"
    )
    assert not list(run.glob("shards/*"))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--scheduler-address", "tcp://x:1", "--scheduler-file", "f"], "both name a scheduler; pass one of them"),
        (
            ["--scheduler-file", "f", "--workers", "2"],
            "--workers is of workers that this command starts; the scheduler",
        ),
        (["--scheduler-file", "f", "--dashboard"], "--dashboard is of workers that this command starts; the"),
        (["--stall-seconds", "0"], "--stall-seconds is a number above 0, not 0.0"),
        (["--stall-seconds", "nan"], "--stall-seconds is a number above 0, not nan"),
    ],
)
def test_what_excludes_each_other_is_a_usage_error(
    run: Path, arguments: list[str], complaint: str, capsys: Captured
) -> None:
    assert main(["--run", str(run), "--workload", "recorded", *arguments]) == 2
    assert complaint in capsys.readouterr().err


def test_a_dashboard_needs_bokeh(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["--run", str(run), "--workload", "recorded", "--dashboard"]) == 2
    assert "--dashboard needs the package bokeh, which is not installed: pip install bokeh" in capsys.readouterr().err


def test_workers_that_are_asked_for_win_over_a_scheduler_in_the_environment(
    run: Path, replay: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(where.ADDRESS, "tcp://127.0.0.1:9")
    assert replay(run) == 0  # with --workers 1


def test_a_damaged_segment_costs_its_own_steps_also_in_one_process(
    run: Path, replay: Command, capsys: Captured
) -> None:
    file = segment_file(run, 3, 6)
    content = file.read_bytes()
    with file.open("r+b") as stream:
        stream.truncate(1000)
    assert replay(run, "--chunk", "1") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert last.startswith(f"python -m replay: error: {file}: not a whole safetensors file (1000 bytes on disk;")
    assert last.endswith(
        "(steps 3-5); missing: steps 3-5. What is finished is kept; the same command does what is missing"
    )
    file.write_bytes(content)
    work.replayer.cache_clear()
    assert replay(run, "--chunk", "1") == 0
    assert len(list(run.glob("shards/*/*.safetensors"))) == 6


def test_the_first_few_failures_alike_stand_for_all_and_a_bug_keeps_its_traceback(
    run: Path, replay: Command, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    tried = []

    def broken(self: work.Replayer, task: Task) -> Receipt:
        tried.append(task.start)
        raise ZeroDivisionError("everywhere the same")

    with monkeypatch.context() as patch:
        patch.setattr(work.Replayer, "replay", broken)
        assert replay(run, "--chunk", "1") == 1
    assert tried == [0, 1, 2]
    said = capsys.readouterr().err
    assert said.count("Traceback") == 1
    assert "ZeroDivisionError: everywhere the same (steps 0-2); missing: steps 0-5." in said
    written = (run / "shards" / log.FILE).read_text()
    assert written.count("    Traceback") == 3


def test_the_log_says_what_was_asked_with_which_versions_and_each_finished_chunk(run: Path, replay: Command) -> None:
    assert replay(run, "--chunk", "3") == 0
    first = (run / "shards" / log.FILE).read_text()
    lines = first.splitlines()
    assert len(lines) == 4
    assert "asked for 2 shards: Job(" in lines[0]
    assert f"torch {torch.__version__}" in lines[0]
    assert "finished steps 0-2: " in lines[1]
    assert lines[2].endswith("00000003-00000006.safetensors")
    assert lines[3].endswith("all finished")
    assert replay(run, "--chunk", "2") == 0
    assert (run / "shards" / log.FILE).read_text().startswith(first)


def test_a_log_that_cannot_be_written_stops_nothing(run: Path, replay: Command) -> None:
    (run / "shards" / log.FILE).mkdir(parents=True)
    assert replay(run) == 0


def _job(**changes: Any) -> Job:
    facts: dict[str, Any] = {
        "run": "run",
        "run_id": "1",
        "loss_data": ("batch",),
        "rule": "simpson",
        "rtol": 0.0,
        "atol": 0.0,
        "chunk": 1,
        "device": "cpu",
        "dtype": None,
        "threads": 3,
        "workload": None,
        "data": None,
    }
    return Job(**{**facts, **changes})


def test_each_worker_sees_a_gpu_of_its_own_and_takes_the_threads_asked_for() -> None:
    gpus = ("2", "GPU-5")
    of_workers = environments(_job(device="cuda"), 3, Where(workers=3, gpus=gpus))
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in of_workers] == ["2", "GPU-5", "2"]
    assert {environment["OMP_NUM_THREADS"] for environment in of_workers} == {"3"}
    for alone in (environments(_job(), 2, Where(workers=2)), environments(_job(device="cuda"), 2, Where(workers=2))):
        assert not any("CUDA_VISIBLE_DEVICES" in environment for environment in alone)


def test_a_list_of_examples_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert from_anywhere("rare=file:rare.csv:valid") == f"rare=file:{tmp_path / 'rare.csv'}:valid"
    assert from_anywhere("probe:8") == "probe:8"


def test_what_a_worker_tells_of_an_error_travels_whole() -> None:
    told = pickle.loads(pickle.dumps(TaskError("0-1", "reason", "trace", of_all=True)))
    assert (told.worker, told.reason, told.trace, told.of_all) == ("0-1", "reason", "trace", True)


def test_a_worker_that_never_registers_is_replaced_and_one_that_is_killed_too() -> None:
    sleep = "import sys, time; sys.stdin.readline(); time.sleep(600)"
    processes = WorkerProcesses(sleep, {}, [{}, {}], patience=0.5)
    try:
        assert processes.keep_up(()) == 0
        assert processes.keep_up({"0-1", "1-1"}) == 2
        time.sleep(0.6)
        assert processes.keep_up({"0-1", "1-1", "another's"}) == 2  # however long ago they have registered
        assert processes.keep_up({"0-1"}) == 1
        assert processes.keep_up({"0-1", "1-2"}) == 2
        processes.kill("0-1")
        assert processes.keep_up({"1-2"}) == 1
        assert processes.keep_up({"0-2", "1-2"}) == 2
    finally:
        processes.stop()


def test_the_next_of_workers_that_do_not_register_has_twice_the_time() -> None:
    processes = WorkerProcesses("import time; time.sleep(600)", {}, [{}], patience=0.5)
    try:
        replaced = []
        for seconds in (0, 0.7, 0.7, 0.7):
            time.sleep(seconds)
            processes.keep_up(())
            replaced.append(processes.silent)
        assert replaced == [0, 1, 1, 2]
    finally:
        processes.stop()


def test_a_worker_ends_with_the_process_that_started_it() -> None:
    code = "from replay.workers import end_with_the_driver as end; import sys; sys.stdin.buffer.readline(); end()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as worker:
        assert worker.stdin is not None
        worker.stdin.write(b"{}\n")
        worker.stdin.close()
        assert worker.wait(timeout=60) == 1
