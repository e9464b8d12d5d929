"""``--follow`` and ``--prune``: a replay that keeps pace with the training, in a window of disk."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import recorder
from recorder.lock import RunLock
from recorder.manifest import Manifest
from recorder.pruned import PRUNED_FILE
from recorder.runformat import Run
from recorder.segments import SEGMENTS_FOLDER, list_segments
from recorder.verify import verify
from replay import follow
from replay.shards import ShardFolder
from tests import cases
from tests.replay.variants import one_thread

Command = Callable[..., int]
Captured = pytest.CaptureFixture[str]

STEPS, SEGMENT, CHUNK = 18, 3, 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished recording of six segments; not to be changed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    with one_thread():
        cases.train(run, steps=STEPS, segment_steps=SEGMENT)
    return run


class Growing:
    """A copy of a run that holds more segments each time somebody rests, under the lock of a recorder."""

    def __init__(self, whole: Path, run: Path, *, joins_at: int = 0) -> None:
        self.run, self._whole, self._joins_at = run, whole, joins_at
        self._done = Manifest.read(whole)
        self._left = list_segments(whole)
        self.largest = 0
        shutil.copytree(whole, run, ignore=shutil.ignore_patterns("*-*.safetensors"))
        (run / SEGMENTS_FOLDER).mkdir(exist_ok=True)
        self._tell(joined=not joins_at)
        self._lock = RunLock(run)

    def _tell(self, *, joined: bool) -> None:
        attempt = dataclasses.replace(self._done.attempt, state="recording", stop=None)
        rows = self._done.parameters
        if not joined:
            rows = tuple(
                dataclasses.replace(row, status="untrained") if ".layers.0." in row.name else row for row in rows
            )
        dataclasses.replace(self._done, attempts=(attempt,), parameters=rows).write(self.run)

    def grow(self, _seconds: float = 0.0) -> None:
        self.largest = max(self.largest, len(list_segments(self.run)))
        if not self._left:
            return
        name = self._left.pop(0)
        if name.start == self._joins_at:
            self._tell(joined=True)
        shutil.copyfile(self._whole / SEGMENTS_FOLDER / name.file, self.run / SEGMENTS_FOLDER / name.file)
        if not self._left:
            self._lock.release()
            self._done.write(self.run)

    def die(self, _seconds: float = 0.0) -> None:
        self._lock.release()


@pytest.fixture
def growing(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Growing]:
    made = Growing(whole, tmp_path / "run")
    monkeypatch.setattr(follow, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr("time.sleep", made.grow)
    yield made
    made.die()


def _contents(run: Path) -> dict[str, bytes]:
    return {str(file.relative_to(run)): file.read_bytes() for file in sorted(run.glob("shards/*/*")) if file.is_file()}


@pytest.fixture
def undisturbed(whole: Path, tmp_path: Path, replay: Command) -> dict[str, bytes]:
    run = Path(shutil.copytree(whole, tmp_path / "undisturbed"))
    assert replay(run, "--chunk", str(CHUNK), "--rule", "simpson", "--rtol", "1") == 0
    return _contents(run)


def test_what_comes_while_the_training_records_is_replayed_with_the_same_bytes(
    growing: Growing, undisturbed: dict[str, bytes], replay: Command, capsys: Captured
) -> None:
    asked = ("--chunk", str(CHUNK), "--rule", "simpson", "--rtol", "1")
    assert replay(growing.run, *asked, "--follow") == 0
    assert _contents(growing.run) == undisturbed
    said = capsys.readouterr().err
    assert "waiting for its first steps" in said
    assert "steps 0-2 recorded so far" in said
    assert "the recording has ended (complete)" in said


def test_with_prune_a_window_of_disk_is_enough(
    growing: Growing, undisturbed: dict[str, bytes], replay: Command, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replay.__main__.PRUNE_SECONDS", 0.0)
    asked = ("--chunk", str(CHUNK), "--rule", "simpson", "--rtol", "1")
    assert replay(growing.run, *asked, "--follow", "--prune") == 0
    assert _contents(growing.run) == undisturbed
    # The first, the last, and those of chunks that were not whole yet.
    assert growing.largest < len(list_segments(growing.run)) + 3 < STEPS // SEGMENT + 2
    run = Run(growing.run)
    assert run.consecutive == [(0, SEGMENT), (STEPS - SEGMENT, STEPS)]
    assert run.ever_recorded == [(0, STEPS)]
    assert verify(growing.run).damages == ()
    assert f"pruned are steps {SEGMENT}-{STEPS - SEGMENT - 1}; their shards are there" in capsys.readouterr().err
    # A rerun has nothing to do and touches nothing.
    assert replay(growing.run, *asked) == 0
    assert "0 steps to do in 0 shards" in capsys.readouterr().err
    assert _contents(growing.run) == undisturbed


def test_a_training_that_was_killed_ends_the_following_with_what_it_left(
    growing: Growing, replay: Command, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    growing.grow()
    growing.grow()
    monkeypatch.setattr("time.sleep", growing.die)
    monkeypatch.setattr(follow, "QUIET_SECONDS", 0.0)
    assert replay(growing.run, "--chunk", str(CHUNK), "--rtol", "1", "--follow") == 0
    assert "the recording has ended (incomplete: the training was killed)" in capsys.readouterr().err
    (folder,) = [entry for entry in (growing.run / "shards").iterdir() if entry.is_dir()]
    assert ShardFolder.open(folder).finished() == [(0, 4), (4, 6)]


def test_a_training_that_was_restarted_meanwhile_is_followed_on(
    tmp_path: Path, replay: Command, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    with one_thread():
        _train(tmp_path / "whole", stop=9)
    growing = Growing(tmp_path / "whole", tmp_path / "run")
    growing.grow()
    growing.grow()
    rests = 0

    def restart(_seconds: float) -> None:
        # Killed after six steps; restarted from a checkpoint of step 4 before anybody looked.
        nonlocal rests
        rests += 1
        if rests == 2:
            growing.die()
            _train(growing.run, start=4, stop=10)

    monkeypatch.setattr(follow, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr("time.sleep", restart)
    asked = ("--chunk", "3", "--rule", "simpson", "--rtol", "1")
    assert replay(growing.run, *asked, "--follow") == 0
    assert "the training was restarted; the run is opened anew" in capsys.readouterr().err
    (folder,) = [ShardFolder.open(entry) for entry in (growing.run / "shards").iterdir() if entry.is_dir()]
    assert folder.finished() == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert folder.attempts(3, 6) == [(1, 3, 4), (2, 4, 6)]


def test_keep_leaves_steps_for_a_restart(whole: Path, tmp_path: Path, replay: Command) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    assert replay(run, "--chunk", str(CHUNK), "--rtol", "1", "--prune", "8") == 0
    assert Run(run).pruned == [(SEGMENT, 9)]


def test_what_is_not_computed_on_all_loss_data_is_not_pruned(
    whole: Path, tmp_path: Path, replay: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    asked = ("--chunk", str(CHUNK), "--rtol", "1")
    assert replay(run, *asked) == 0
    assert replay(run, *asked, "--steps", "0:8", "--prune", loss_data=("batch", "probe:8")) == 0
    assert Run(run).pruned == [(SEGMENT, 6)]
    # The others are still to be computed, and can be.
    assert replay(run, *asked, "--prune", loss_data=("batch", "probe:8")) == 0
    assert Run(run).pruned == [(SEGMENT, STEPS - SEGMENT)]


def test_other_loss_data_of_pruned_steps_is_told_to_be_missing(
    whole: Path, tmp_path: Path, replay: Command, capsys: Captured
) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    assert replay(run, "--chunk", str(CHUNK), "--rtol", "1", "--prune") == 0
    assert replay(run, "--chunk", str(CHUNK), "--rtol", "1", loss_data=("probe:8",)) == 0
    said = capsys.readouterr().err
    assert f"steps 0-{SEGMENT - 1}, {STEPS - SEGMENT}-{STEPS - 1} recorded" in said
    assert "6 steps to do in 3 shards" in said


def test_a_restarted_training_costs_no_pruned_step_its_shard(tmp_path: Path, replay: Command) -> None:
    run = tmp_path / "run"
    cases.train(run, steps=12, segment_steps=SEGMENT)
    asked = ("--chunk", "8", "--rule", "simpson", "--rtol", "1")
    assert replay(run, *asked) == 0
    (folder,) = [ShardFolder.open(entry) for entry in (run / "shards").iterdir() if entry.is_dir()]
    before = folder.read(0, 8)
    assert replay(run, *asked, "--prune") == 0
    assert Run(run).pruned == [(3, 9)]
    # From a checkpoint of step 5, which is not recorded any more.
    cases.train(run, steps=8, segment_steps=SEGMENT, first_step=5)
    assert Run(run).attempts == [(1, 0, 5), (2, 5, 13)]
    assert replay(run, *asked) == 0
    assert folder.finished() == [(0, 5), (5, 8), (8, 13)]
    kept = folder.read(0, 5)
    for name, values in before.per_step.items():
        np.testing.assert_array_equal(values[:5], kept.per_step[name])
    for name, values in before.per_unit["sum"].items():
        np.testing.assert_array_equal(values[:5], kept.per_unit["sum"][name])


def test_entries_of_windows_to_come_are_complete_at_the_end_and_not_before(
    growing: Growing, whole: Path, tmp_path: Path, replay: Command, capsys: Captured
) -> None:
    asked = ("--chunk", str(CHUNK), "--rule", "simpson", "--rtol", "1")
    windows = "2:9,9:100,200:300"
    assert replay(growing.run, *asked, "--follow", "--prune", "--per-parameter", windows) == 0
    assert "no step of 200:300 was recorded" in capsys.readouterr().err
    other = Path(shutil.copytree(whole, tmp_path / "other"))
    assert replay(other, *asked, "--per-parameter", f"2:9,9:{STEPS}") == 0
    followed, afterwards = (
        {file.name: file for file in run.glob("shards/*/entries-*.safetensors")} for run in (growing.run, other)
    )
    assert len(followed) == len(afterwards) == 2
    for left, right in zip(sorted(followed.values()), sorted(afterwards.values()), strict=True):
        one, two = recorder.tensorfile.TensorFile(left), recorder.tensorfile.TensorFile(right)
        assert one.facts["steps"] == two.facts["steps"]
        for name in one.names:
            np.testing.assert_array_equal(one.array(name), two.array(name))


def _train(run: Path, *, start: int = 0, stop: int = STEPS, unfreeze: int = 0) -> None:
    """A training whose first layer receives its first gradient at a step; restarted if it does not start at 0."""
    task = cases.workload()
    torch.manual_seed(1)
    model = task.model()
    layer = model.get_submodule("decoder.layers.0")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if start:
        model.load_state_dict(Run(run).parameters(start), strict=False)
    watch = recorder.watch(
        model, optimizer, run=run, workload="tests.cases:workload", segment_steps=SEGMENT, first_step=start
    )
    layer.requires_grad_(start >= unfreeze)
    with watch as rec:
        for step in range(start, stop):
            if step == unfreeze:
                layer.requires_grad_(True)
            batch = task.batch(range(step, step + 8), split="train", epoch=1)
            rec.batch(range(step, step + 8), batch)
            loss, predictions = task.loss(model, batch)
            rec.loss(loss, predictions)
            (loss / predictions).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()


def test_a_parameter_that_joins_late_is_followed_and_costs_no_pruned_step_its_shard(
    tmp_path: Path, replay: Command, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = 9
    with one_thread():
        _train(tmp_path / "whole", unfreeze=at)
    asked = ("--chunk", str(CHUNK), "--rule", "simpson", "--rtol", "1")
    afterwards = Path(shutil.copytree(tmp_path / "whole", tmp_path / "afterwards"))
    assert replay(afterwards, *asked) == 0
    growing = Growing(tmp_path / "whole", tmp_path / "run", joins_at=at)
    monkeypatch.setattr(follow, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr("replay.__main__.PRUNE_SECONDS", 0.0)
    monkeypatch.setattr("time.sleep", growing.grow)
    assert replay(growing.run, *asked, "--follow", "--prune") == 0
    said = capsys.readouterr().err
    assert "gone on to train further parameters" in said
    assert "of steps 0-7, which were pruned, the shards on batch are those of the former table" in said
    (expected,) = (ShardFolder.open(entry) for entry in (afterwards / "shards").iterdir() if entry.is_dir())
    found = ShardFolder.open(growing.run / "shards" / expected.path.name)
    assert found.finished() == expected.finished()
    for start, stop in expected.finished():
        left, right = found.read(start, stop), expected.read(start, stop)
        for quantity, parameters in right.per_unit.items():
            for name, values in parameters.items():
                np.testing.assert_array_equal(left.per_unit[quantity][name], values, err_msg=f"{quantity} of {name}")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--follow", "--steps", "0:4"), "--follow and --steps exclude each other"),
        (("--follow", "--dry-run"), "--follow and --dry-run exclude each other"),
        (("--follow", "--per-parameter", "all"), "nobody knows yet where the training ends; name windows"),
        (("--prune", "--shard", "1/2"), "--prune and --shard exclude each other"),
        (("--prune", "-1"), "--prune keeps 0 steps or more, not -1"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(
    whole: Path, arguments: tuple[str, ...], says: str, replay: Command, capsys: Captured
) -> None:
    assert replay(whole, *arguments) == 2
    assert says in capsys.readouterr().err
    assert not (whole / PRUNED_FILE).exists()


def test_two_workers_follow_a_real_training(tmp_path: Path, replay: Command) -> None:
    run = tmp_path / "run"
    code = (
        "import sys, time, pathlib, torch; from tests import cases\n"
        "step = torch.optim.Adam.step\n"
        "torch.optim.Adam.step = lambda self: (time.sleep(0.3), step(self))[1]\n"
        "cases.train(pathlib.Path(sys.argv[1]), steps=24, segment_steps=3)"
    )
    training = subprocess.Popen([sys.executable, "-c", code, str(run)])
    asked = ("--chunk", str(CHUNK), "--rule", "simpson", "--rtol", "1")
    try:
        assert replay(run, *asked, "--follow", "--prune", "--workers", "2") == 0
    finally:
        assert training.wait(60) == 0
    assert Run(run).consecutive == [(0, 3), (21, 24)]
    (folder,) = [ShardFolder.open(entry) for entry in (run / "shards").iterdir() if entry.is_dir()]
    assert folder.finished() == [(start, start + CHUNK) for start in range(0, 24, CHUNK)]
