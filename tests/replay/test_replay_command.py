"""The command line: what it writes, that it continues where it stopped, and what it says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recorder.loading import load_workload
from recorder.runformat import Run
from recorder.segments import segment_file
from replay import cost, shards, work
from replay.job import Receipt, Task
from replay.shards import ShardFolder, Status
from tests import cases
from tests.replay.variants import HERE, record

Captured = pytest.CaptureFixture[str]
Command = Callable[..., int]
Find = Callable[[Path, str], ShardFolder]
Stamps = Callable[[Path], dict[str, Any]]

BOTH = ("batch", "probe:16")


@pytest.fixture
def foretold_bytes() -> list[int]:
    """What the replayer said that each of `tasks` would write."""
    return []


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch, foretold_bytes: list[int]) -> list[Task]:
    """The tasks that are really computed."""
    done: list[Task] = []
    compute = work.Replayer.replay

    def spy(self: work.Replayer, task: Task) -> Receipt:
        done.append(task)
        foretold_bytes.append(cost.bytes_written(self, task))
        return compute(self, task)

    monkeypatch.setattr(work.Replayer, "replay", spy)
    return done


def _bytes(run: Path) -> dict[str, bytes]:
    return {str(file.relative_to(run)): file.read_bytes() for file in sorted(run.rglob("shards/*/*"))}


def _per_step(folder: ShardFolder, name: str) -> Any:
    return np.concatenate([folder.read(start, stop).per_step[name] for start, stop in folder.finished()])


def _total(folder: ShardFolder) -> Any:
    read = [folder.read(start, stop).per_unit["sum"] for start, stop in folder.finished()]
    return np.concatenate([sum(array.sum(axis=1) for array in shard.values()) for shard in read])


def test_results_are_paths_on_standard_output_and_everything_else_is_on_standard_error(
    run: Path, replay: Command, capsys: Captured
) -> None:
    assert replay(run, "--chunk", "4", loss_data=BOTH) == 0
    captured = capsys.readouterr()
    paths = [Path(line) for line in captured.out.splitlines()]
    assert [ShardFolder.open(path).settings.loss_data for path in paths] == ["batch", "probe"]
    assert [path.parent for path in paths] == [run / "shards"] * 2
    assert [ShardFolder.open(path).finished() for path in paths] == [[(0, 4), (4, 6)]] * 2
    lines = captured.err.splitlines()
    assert lines[0] == (f"{run}: steps 0-5 recorded; loss data batch, probe; adaptive rule; 6 steps to do in 2 shards")
    assert lines[1].startswith("self-check: step 0 done again: losses and parameters are the recorded ones")
    assert re.fullmatch(r"batch: 6 steps \(6 converged\), ΔL -\d\.\d{4} nat, \d\d gradient evaluations", lines[3])
    assert re.match(r"batch: \|residual\| median .* worst \d\.\de-\d\d nat at step \d; cumulative", lines[4])


def test_the_books_of_every_step_balance_by_the_stored_residual(run: Path, replay: Command, folder: Find) -> None:
    assert replay(run, "--chunk", "4", loss_data=BOTH) == 0
    for name in ("batch", "probe"):
        found = folder(run, name)
        change = _per_step(found, "loss_end") - _per_step(found, "loss_start")
        residual = _per_step(found, "residual")
        np.testing.assert_allclose(_total(found) - change, residual, rtol=0, atol=1e-14)
        assert (np.abs(residual) <= _per_step(found, "tolerance")).all()
        assert (_per_step(found, "tolerance") < 1e-3 * np.abs(change) + 1e-5).all()
        assert (_per_step(found, "status") == Status.CONVERGED).all()


def test_the_recorded_facts_of_every_step_stand_in_the_shards(run: Path, replay: Command, folder: Find) -> None:
    assert replay(run, "--chunk", "4") == 0
    found = folder(run, "batch")
    assert _per_step(found, "step").tolist() == list(range(6))
    assert _per_step(found, "epoch").tolist() == [1] * 6
    assert _per_step(found, "lr").tolist() == [1e-2] * 6
    assert _per_step(found, "predictions").tolist() == [96] * 6


def test_the_change_of_the_probe_telescopes_and_its_evaluations_are_shared_between_neighbours(
    run: Path, replay: Command, folder: Find
) -> None:
    assert replay(run, "--chunk", "4", "--rule", "simpson", loss_data=BOTH) == 0
    probe = folder(run, "probe")
    start, end = _per_step(probe, "loss_start"), _per_step(probe, "loss_end")
    assert end[:-1].tolist() == start[1:].tolist()  # to the bit, also from shard to shard
    assert (end - start).sum() == pytest.approx(end[-1] - start[0], abs=1e-14)
    assert end[-1] < start[0]
    assert _per_step(probe, "evaluations").tolist() == [3, 2, 2, 2, 3, 2]
    assert _per_step(folder(run, "batch"), "evaluations").tolist() == [3] * 6
    # The loss itself, from a model and examples of our own.
    workload = load_workload(run, Run(run).manifest, "recorded", None)
    model = workload.model()
    model.load_state_dict(Run(run).parameters(6), strict=False)
    drawn = np.random.default_rng(0).choice(48, size=16, replace=False).tolist()
    loss_sum, count = workload.loss(model.eval(), workload.batch(drawn, split="train", epoch=1))
    assert end[-1] == pytest.approx(float(loss_sum.detach()) / float(count), rel=1e-6)


def test_dropout_is_off_so_that_probe_losses_agree_from_step_to_step(
    tmp_path: Path, replay: Command, folder: Find
) -> None:
    record(tmp_path, steps=4)
    replay(tmp_path, "--chunk", "1", loss_data=("probe:8",))
    probe = folder(tmp_path, "probe")
    assert _per_step(probe, "loss_end")[:-1].tolist() == _per_step(probe, "loss_start")[1:].tolist()


def test_a_rerun_computes_nothing_and_touches_nothing(
    run: Path, replay: Command, stamps: Stamps, tasks: list[Task], capsys: Captured
) -> None:
    assert replay(run, loss_data=BOTH) == 0
    first = capsys.readouterr()
    before, done = stamps(run), len(tasks)
    work.replayer.cache_clear()
    assert replay(run, loss_data=BOTH) == 0
    again = capsys.readouterr()
    assert stamps(run) == before
    assert len(tasks) == done == 1
    assert again.out == first.out
    assert "0 steps to do in 0 shards" in again.err


def test_an_interrupted_replay_keeps_what_is_finished_and_ends_with_the_same_bytes(
    recorded: Path, run: Path, replay: Command, monkeypatch: pytest.MonkeyPatch, stamps: Stamps, capsys: Captured
) -> None:
    compute = work.Replayer.replay
    left = 2

    def until_interrupted(self: work.Replayer, task: Task) -> Receipt:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        return compute(self, task)

    with monkeypatch.context() as patch:
        patch.setattr(work.Replayer, "replay", until_interrupted)
        assert replay(run, "--chunk", "1", loss_data=BOTH) == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        "python -m replay: interrupted; everything finished so far is kept"
    )
    kept = {name: stamp for name, stamp in stamps(run).items() if "shards/" in name}
    assert sum(name.endswith(".safetensors") for name in kept) == 4
    assert replay(run, "--chunk", "1", loss_data=BOTH) == 0
    after = stamps(run)
    assert {name: after[name] for name in kept} == kept
    continued = _bytes(run)
    for path in run.rglob("shards/*/*.safetensors"):
        path.unlink()
    assert replay(run, "--chunk", "1", loss_data=BOTH) == 0
    assert _bytes(run) == continued
    assert len(continued) == 2 * (6 + 1)


def test_a_missing_shard_alone_is_computed_again(run: Path, replay: Command, tasks: list[Task]) -> None:
    assert replay(run, "--chunk", "2", loss_data=BOTH) == 0
    before = _bytes(run)
    (lost,) = (path for path in run.rglob("00000002-*") if ShardFolder.open(path.parent).settings.loss_data == "probe")
    lost.unlink()
    tasks.clear()
    assert replay(run, "--chunk", "2", loss_data=BOTH) == 0
    assert tasks == [Task(start=2, stop=4, loss_data=("probe",))]
    assert _bytes(run) == before


def test_other_settings_go_to_another_folder(run: Path, replay: Command) -> None:
    chosen: list[tuple[list[str], tuple[str, ...]]] = [
        ([], ("batch",)),
        (["--chunk", "3"], ("batch",)),
        (["--rule", "gauss2"], ("batch",)),
        (["--rtol", "0.02"], ("batch",)),
        (["--atol", "1"], ("batch",)),
        ([], ("probe:8",)),
        ([], ("probe:9",)),
        ([], ("valid:8",)),
    ]
    for number, (arguments, loss_data) in enumerate(chosen, start=1):
        assert replay(run, *arguments, loss_data=loss_data) == 0
        assert len([path for path in (run / "shards").iterdir() if path.is_dir()]) == number


def test_a_loss_data_added_later_leaves_the_others_alone(
    run: Path, replay: Command, stamps: Stamps, tasks: list[Task]
) -> None:
    assert replay(run) == 0
    before = stamps(run)
    tasks.clear()
    assert replay(run, loss_data=BOTH) == 0
    after = stamps(run)
    assert {name: after[name] for name in before} == before
    assert tasks == [Task(start=0, stop=6, loss_data=("probe",))]


def test_a_shard_does_not_depend_on_the_company_it_was_computed_in(run: Path, replay: Command) -> None:
    assert replay(run, loss_data=("probe:16",)) == 0
    alone = _bytes(run)
    for path in run.rglob("shards/*/*.safetensors"):
        path.unlink()
    assert replay(run, loss_data=BOTH) == 0
    assert alone.items() <= _bytes(run).items()


@pytest.mark.parametrize("rule", ["simpson", "trapezoid", "gauss2", "euler"])
def test_a_dry_run_writes_no_shard_and_foretells_evaluations_and_bytes(
    run: Path, rule: str, replay: Command, capsys: Captured, tasks: list[Task], foretold_bytes: list[int]
) -> None:
    arguments = ("--chunk", "4", "--rule", rule, "--rtol", "1")
    assert replay(run, *arguments, "--dry-run", loss_data=BOTH) == 0
    dry = capsys.readouterr()
    assert dry.out == ""
    assert not tasks
    assert not list(run.rglob("shards/*/*.safetensors"))
    assert re.search(
        r"dry run: each worker holds about 0\.0[3-9] GB, beside Python's libraries and what a forward and backward "
        "pass over one micro-batch takes",
        dry.err,
    )
    foretold = re.search(r"dry run: (\d+) gradient evaluations, (\d+\.\d) MB to write", dry.err)
    assert foretold
    assert replay(run, *arguments, loss_data=BOTH) == 0
    found = shards.folders(run)
    assert int(foretold[1]) == sum(_per_step(folder, "evaluations").sum() for folder in found)
    written = sum(
        array.nbytes
        for folder in found
        for start, stop in folder.finished()
        for shard in [folder.read(start, stop)]
        for arrays in (shard.per_step, *shard.per_unit.values(), *shard.per_parameter.values(), shard.spread)
        for array in arrays.values()
    ) + sum(
        counts.nbytes
        for folder in found
        for start, stop in folder.finished()
        if (counts := folder.read(start, stop).counts) is not None
    )
    assert written == sum(foretold_bytes) > 50_000
    assert foretold[2] == f"{written / 1e6:.1f}"


def test_steps_chooses_the_shards_that_hold_them(run: Path, replay: Command, folder: Find) -> None:
    for text, expected in (
        ("3:4", [(2, 4)]),
        ("5:", [(2, 4), (4, 6)]),
        (":2", [(0, 2), (2, 4), (4, 6)]),
    ):
        assert replay(run, "--chunk", "2", "--steps", text) == 0
        assert folder(run, "batch").finished() == expected


def test_overwrite_computes_again_just_the_chosen_shards(
    run: Path, replay: Command, stamps: Stamps, tasks: list[Task], capsys: Captured
) -> None:
    assert replay(run, "--chunk", "2") == 0
    before = stamps(run)
    tasks.clear()
    assert replay(run, "--chunk", "2", "--overwrite", "--steps", "2:4", "--dry-run") == 0
    assert "dry run: at least 6 gradient evaluations" in capsys.readouterr().err
    assert stamps(run) == before
    assert replay(run, "--chunk", "2", "--overwrite", "--steps", "2:4") == 0
    after = stamps(run)
    assert [task.start for task in tasks] == [2]
    assert after.keys() == before.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert [Path(name).name for name in changed] == ["00000002-00000004.safetensors"]
    assert all(before[name][2] == after[name][2] for name in before)  # the same bytes


def test_overwrite_keeps_the_finished_shards_when_the_self_check_refuses(
    run: Path, replay: Command, stamps: Stamps
) -> None:
    assert replay(run) == 0
    before = stamps(run)
    assert replay(run, "--overwrite", workload=f"{HERE}:mean_loss") == 1
    assert stamps(run) == before


def test_a_run_that_grew_is_continued_with_the_bytes_of_a_run_replayed_at_once(
    run: Path, tmp_path: Path, replay: Command, folder: Find
) -> None:
    later = segment_file(run, 3, 6)
    later.rename(tmp_path / "kept")
    assert replay(run, "--chunk", "2") == 0
    assert folder(run, "batch").finished() == [(0, 2), (2, 3)]
    (tmp_path / "kept").rename(later)
    work.replayer.cache_clear()
    assert replay(run, "--chunk", "2") == 0
    assert folder(run, "batch").finished() == [(0, 2), (2, 4), (4, 6)]
    grown = _bytes(run)
    for path in run.rglob("shards/*/*.safetensors"):
        path.unlink()
    assert replay(run, "--chunk", "2") == 0
    assert _bytes(run) == grown


def test_a_gap_in_the_record_is_left_out(run: Path, tmp_path: Path, replay: Command, folder: Find) -> None:
    cases.train(tmp_path / "other", steps=8, segment_steps=2)
    segment_file(tmp_path / "other", 2, 4).unlink()
    assert replay(tmp_path / "other", "--chunk", "3", loss_data=("probe:8",)) == 0
    assert folder(tmp_path / "other", "probe").finished() == [(0, 2), (4, 6), (6, 8)]


def test_json_is_one_document_on_standard_output(run: Path, replay: Command, folder: Find, capsys: Captured) -> None:
    assert replay(run, "--json", loss_data=BOTH) == 0
    document = json.loads(capsys.readouterr().out)
    assert list(document) == ["batch", "probe"]
    residual = np.abs(_per_step(folder(run, "batch"), "residual")).max()
    assert document["batch"] == {
        "shards": str(folder(run, "batch").path),
        "steps": 6,
        "status": {"converged": 6, "tolerance_not_met": 0, "not_finite": 0, "not_checked": 0},
        "worst_residual": residual,
    }


def test_a_missed_tolerance_is_stored_and_told_by_the_exit_code_also_of_a_rerun(
    run: Path, replay: Command, folder: Find, capsys: Captured
) -> None:
    strict = ("--rule", "euler", "--rtol", "1e-12")
    assert replay(run, *strict) == 3
    found = folder(run, "batch")
    assert (_per_step(found, "status") == Status.TOLERANCE_NOT_MET).all()
    assert "6 steps (6 tolerance_not_met)" in capsys.readouterr().err
    assert replay(run, *strict) == 3
    assert np.isfinite(_per_step(found, "residual")).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_says_so_and_leaves_its_neighbours_alone(
    run: Path, value: float, replay: Command, folder: Find, capsys: Captured
) -> None:
    assert replay(run, loss_data=BOTH) == 0
    clean = {name: folder(run, name).read(0, 6) for name in ("batch", "probe")}
    opened = Run(run)
    steps, thetas = [opened.step(t) for t in (3, 4, 5)], [opened.parameters(t) for t in (3, 4, 5, 6)]
    thetas[1]["decoder.layers.0.fc1.weight"][0, 0] = value  # θ_4: the end of step 3, the start of step 4
    cases.write_segment(run, thetas, steps)
    work.replayer.cache_clear()
    capsys.readouterr()
    assert replay(run, "--overwrite", "--json", loss_data=BOTH) == 3
    captured = capsys.readouterr()
    assert "6 steps (4 converged, 2 not_finite)" in captured.err
    assert "NaN" not in captured.out
    document = json.loads(captured.out)
    assert document["probe"]["worst_residual"] is None
    assert document["probe"]["status"]["not_finite"] == 2
    untouched = [0, 1, 2, 5]
    for name, before in clean.items():
        after = folder(run, name).read(0, 6)
        expected = [Status.CONVERGED] * 3 + [Status.NOT_FINITE] * 2 + [Status.CONVERGED]
        assert after.per_step["status"].tolist() == expected
        for key in ("loss_start", "loss_end", "residual"):
            np.testing.assert_array_equal(after.per_step[key][untouched], before.per_step[key][untouched])
        for quantity, arrays in before.per_unit.items():
            for parameter, array in arrays.items():
                np.testing.assert_array_equal(after.per_unit[quantity][parameter][untouched], array[untouched])


def test_the_threads_asked_for_are_used_and_stand_in_the_recipe(run: Path, replay: Command, folder: Find) -> None:
    assert replay(run, "--threads", "2", "--steps", "0:1", "--chunk", "1") == 0
    assert torch.get_num_threads() == 2
    assert folder(run, "batch").settings.recipe["threads"] == 2
