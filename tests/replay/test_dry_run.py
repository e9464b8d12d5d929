"""``--dry-run``: what it foretells is what a replay then does, and it leaves the run as it was."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recorder.runformat import Run
from replay import dryrun, shards, work
from replay.__main__ import main
from replay.gradients import LossSurface
from replay.job import Receipt, Task
from replay.shards import ShardFolder
from replay.trial import Pace, Trial
from tests.replay.test_recorded_variants import restarted
from tests.replay.variants import record

Captured = pytest.CaptureFixture[str]
Command = Callable[..., int]
Find = Callable[[Path, str], ShardFolder]
Foretell = Callable[..., dict[str, Any]]

BOTH = ("batch", "probe:16")


@pytest.fixture
def foretell(replay: Command, capsys: Captured) -> Foretell:
    """What a dry run says as JSON."""

    def command(run: Path, *arguments: str, **chosen: Any) -> dict[str, Any]:
        capsys.readouterr()
        assert replay(run, *arguments, "--dry-run", "--json", **chosen) == 0
        (line,) = capsys.readouterr().out.splitlines()
        document: dict[str, Any] = json.loads(line)
        return document

    return command


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a replay, without its self-check, evaluates gradients and losses alone."""
    counted: Counter[str] = Counter()
    at_work = False
    compute, evaluate, loss = work.Replayer.replay, LossSurface.evaluate, LossSurface.loss

    def working(self: work.Replayer, task: Task) -> Receipt:
        nonlocal at_work
        at_work = True
        try:
            return compute(self, task)
        finally:
            at_work = False

    def counting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted_call(*given: Any, **options: Any) -> Any:
            counted[name] += at_work
            return call(*given, **options)

        return counted_call

    monkeypatch.setattr(work.Replayer, "replay", working)
    monkeypatch.setattr(LossSurface, "evaluate", counting("gradients", evaluate))
    monkeypatch.setattr(LossSurface, "loss", counting("losses", loss))
    return counted


def _tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in [folder, *folder.rglob("*")]}


def _groups(folder: Path) -> str:
    (folder / "ids.csv").write_text("group,index\nverbs,5\nnouns,3\nverbs,11\n")
    return f"words=file:{folder / 'ids.csv'}"


# What is counted.


@pytest.mark.parametrize(
    "rule",
    [("simpson",), ("trapezoid",), ("gauss2",), ("euler",), ("gauss2", "--check-every", "4")],
    ids=" ".join,
)
def test_evaluations_passes_and_bytes_are_those_of_the_replay(
    run: Path, tmp_path: Path, rule: tuple[str, ...], replay: Command, foretell: Foretell, calls: Counter[str]
) -> None:
    arguments = ("--chunk", "4", "--rtol", "1", "--rule", *rule)
    loss_data = (*BOTH, _groups(tmp_path))
    said = foretell(run, *arguments, loss_data=loss_data)
    assert not calls["gradients"]
    assert not (run / "shards").exists()
    assert replay(run, *arguments, loss_data=loss_data) == 0
    assert said["gradient_evaluations_at_least"] == said["gradient_evaluations"] == calls["gradients"]
    assert said["forward_passes"] == calls["losses"]
    written = 0
    for found in shards.folders(run):
        for start, stop in found.finished():
            shard = found.read(start, stop)
            kept = (shard.per_step, *shard.per_unit.values(), *shard.per_parameter.values(), shard.spread)
            written += sum(array.nbytes for arrays in kept for array in arrays.values())
            written += 0 if shard.counts is None else shard.counts.nbytes
    assert said["write_bytes"] == written > 100_000


def test_finished_shards_are_counted_for_each_loss_data_and_only_the_others_tried(
    run: Path, replay: Command, foretell: Foretell
) -> None:
    assert replay(run, "--chunk", "2", "--steps", "2:4", loss_data=("batch",)) == 0
    work.replayer.cache_clear()
    assert replay(run, "--chunk", "2", "--steps", "4:", loss_data=BOTH) == 0
    said = foretell(run, "--chunk", "2", loss_data=BOTH)
    assert said["shards"] == {"batch": {"done": 2, "of": 3}, "probe": {"done": 1, "of": 3}}
    assert (said["steps"], said["chunks"], said["trial"]["steps"]) == (4, 2, [0, 1, 3])
    assert set(said["trial"]["paces"]) == {"batch", "probe"}
    of_steps = foretell(run, "--chunk", "2", "--steps", "2:4", loss_data=BOTH)
    assert of_steps["shards"] == {"batch": {"done": 1, "of": 1}, "probe": {"done": 0, "of": 1}}
    assert set(of_steps["trial"]["paces"]) == {"probe"}


def test_where_nothing_is_to_do_nothing_is_tried(
    run: Path, replay: Command, foretell: Foretell, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert replay(run) == 0
    monkeypatch.setattr(dryrun, "try_steps", None)
    said = foretell(run)
    assert said["shards"] == {"batch": {"done": 1, "of": 1}}
    assert said["trial"] is said["expected_seconds"] is said["worker_bytes"] is None
    assert said["steps"] == said["gradient_evaluations_at_least"] == said["read_bytes"] == said["write_bytes"] == 0
    assert replay(run, "--dry-run") == 0
    assert "none: there is nothing to do" in capsys.readouterr().err


def test_shards_of_steps_that_were_recorded_anew_count_as_missing_and_stay(
    run: Path, replay: Command, foretell: Foretell, folder: Find
) -> None:
    assert replay(run, "--chunk", "2") == 0
    restarted(run, first=3, steps=2)
    work.replayer.cache_clear()
    before = _tree(run)
    said = foretell(run, "--chunk", "2")
    assert _tree(run) == before
    assert (said["steps"], said["shards"]) == (3, {"batch": {"done": 1, "of": 3}})
    assert folder(run, "batch").finished() == [(0, 2), (2, 4), (4, 6)]


def test_a_dry_run_leaves_no_trace(tmp_path: Path, foretell: Foretell) -> None:
    run = tmp_path / "run"
    record(run, steps=4)
    chosen = ("--dropout", "recorded", "--per-parameter", "0:2,2:4", "--chunk", "3")
    before = _tree(run)
    said = foretell(run, *chosen, loss_data=("batch", "fresh:4", _groups(tmp_path)))
    assert _tree(run) == before
    assert said["entries_bytes"] == 5 * 2 * 8 * sum(row.size for row in Run(run).manifest.trained)
    assert list(said["trial"]["paces"]) == ["batch", "fresh", "words/nouns", "words/verbs", "words"]


def test_sums_of_entries_count_in_the_windows_that_have_steps_to_do(
    run: Path, replay: Command, foretell: Foretell
) -> None:
    chosen = ("--chunk", "2", "--per-parameter", "0:2,2:6")
    of_window = 8 * sum(row.size for row in Run(run).manifest.trained)
    assert foretell(run, *chosen)["entries_bytes"] == 2 * of_window
    assert foretell(run, *chosen, "--steps", "4:")["entries_bytes"] == of_window
    assert replay(run, *chosen) == 0
    assert foretell(run, *chosen)["entries_bytes"] == 0
    assert foretell(run, *chosen, "--overwrite", "--steps", "0:2")["entries_bytes"] == of_window


# What is said.


def _paces(**evaluations: float) -> dict[str, Pace]:
    return {
        name: Pace(evaluations=number, evaluation_seconds=2, pass_seconds=1, rest_seconds=0.25)
        for name, number in evaluations.items()
    }


def _tried(**evaluations: float) -> Callable[[work.Replayer, object], Trial]:
    def try_none(opened: work.Replayer, tasks: object) -> Trial:
        opened.seconds_to_open = 0.001
        return Trial(steps=(0, 2, 5), reading_seconds=0, paces=_paces(**evaluations))

    return try_none


def test_the_lines_say_the_numbers_on_standard_error(
    run: Path, replay: Command, foretell: Foretell, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dryrun, "try_steps", _tried(batch=3, probe=4))
    chosen = ("--chunk", "4", "--workers", "16")
    said = foretell(run, *chosen, loss_data=BOTH)
    assert (said["workers"], said["gradient_evaluations"], said["gradient_evaluations_at_least"]) == (2, 38, 32)
    assert replay(run, *chosen, "--dry-run", loss_data=BOTH) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = {line[:25].strip(): line[25:] for line in captured.err.splitlines()[2:]}
    assert lines["steps to do"] == "6 in 2 chunks"
    assert lines["shards done"] == "batch 0 of 2, probe 0 of 2"
    assert lines["gradient evaluations"] == "at least 32"
    assert lines["to read"] == f"at most {said['read_bytes'] / 1000:.1f} kB of segments"
    assert lines["to write"].startswith(f"{said['write_bytes'] / 1000:.1f} kB of shards; ")
    assert lines["memory of a worker"].endswith(", beside Python's libraries and one pass over a micro-batch")
    assert lines["trial"] == "3 steps, 0, 2, 5: 2 s an evaluation, 13.2 s a step"
    assert lines["evaluations expected"] == "38, if all are like these (by itself a step took batch 3.0, probe 4.0)"
    assert lines["expected time"] == "52 s with 2 workers, 0.731 evaluations/s, 1 ms to open the run included"
    assert "forward passes" not in lines


def test_a_cluster_of_unknown_size_is_told_the_time_of_one_worker(
    run: Path, replay: Command, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dryrun, "try_steps", _tried(batch=3))
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", "tcp://127.0.0.1:1")
    dry_run = ("--run", str(run), "--workload", "recorded", "--loss-data", "batch", "--dry-run")
    assert main([*dry_run, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["workers"] is said["expected_seconds"] is None
    assert said["work_seconds"] == pytest.approx(6 * (3 * 2 + 0.25))
    assert main(dry_run) == 0
    assert "expected time            38 s of one worker, and 1 ms for each to open the run" in capsys.readouterr().err


def test_too_little_space_is_warned_of(
    run: Path, replay: Command, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    for free, warned in ((10_000, True), (10_000_000, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: shutil._ntuple_diskusage(0, 0, free))
        assert replay(run, "--dry-run") == 0
        text = capsys.readouterr().err
        assert ("are to be written and 10.0 kB are free: the replay will fail for want of space" in text) is warned


def test_an_interrupted_trial_ends_as_an_interrupted_replay(
    run: Path, replay: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*given: Any) -> Trial:
        raise KeyboardInterrupt

    monkeypatch.setattr(dryrun, "try_steps", interrupted)
    before = _tree(run)
    assert replay(run, "--dry-run") == 130
    assert _tree(run) == before


def test_a_trial_changes_nothing_of_the_replay_after_it(
    run: Path, tmp_path: Path, replay: Command, folder: Find
) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    chosen = ("--chunk", "4", "--dry-run")
    assert replay(run, *chosen, loss_data=BOTH) == 0
    assert replay(run, *chosen[:2], loss_data=BOTH) == 0  # with what the dry run opened
    work.replayer.cache_clear()
    assert replay(other, *chosen[:2], loss_data=BOTH) == 0
    for name in ("batch", "probe"):
        for start, stop in ((0, 4), (4, 6)):
            shard, expected = (folder(path, name).read(start, stop) for path in (run, other))
            for quantity, arrays in expected.per_unit.items():
                for parameter, array in arrays.items():
                    np.testing.assert_array_equal(shard.per_unit[quantity][parameter], array)
