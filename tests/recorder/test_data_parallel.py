from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from recorder import growing
from recorder.errors import UsageError
from recorder.lock import RunLock
from recorder.ranges import describe_ranges
from recorder.recovery import recover, recover_locked
from recorder.runformat import Run
from recorder.segments import SEGMENTS_FOLDER, list_segments
from recorder.tensorfile import TensorFile
from recorder.verify import verify
from replay.__main__ import main as replay
from replay.selfcheck import check_update
from replay.shards import ShardFolder
from tests.cases import workload
from tests.two_processes import KILLED_AT, PROCESSES, QUOTA, STEPS, Theta, start, told

pytestmark = pytest.mark.cluster

TOGETHER = (
    *("whole", "unrecorded", "restarted", "refused", "joined_wrongly", "failed_before_the_first_step"),
    *("stopped_early", "within_quota", "without_examples"),
    *("sharded", "sharded_unrecorded", "sharded_failing", "sharded_too_large"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All trainings of `TOGETHER`, done by the same two processes."""
    folder = tmp_path_factory.mktemp("two-processes")
    start(folder, TOGETHER)
    return folder


def assert_same(found: Theta, expected: Theta) -> None:
    assert list(found) == list(expected)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def assert_thetas(run: Run, seen: Sequence[Theta]) -> None:
    name = "decoder.layers.0.fc1.weight"
    assert not torch.equal(seen[0][name], seen[-1][name])
    for t, theta in enumerate(seen):
        assert_same(run.parameters(t), theta)


def assert_micro_batches(folder: Path, scenario: str, steps: Sequence[int]) -> None:
    run = Run(folder / scenario / "run")
    seen = [told(folder, scenario, rank) for rank in range(PROCESSES)]
    for t in steps:
        micro_batches = run.step(t).micro_batches
        assert [micro_batch.rank for micro_batch in micro_batches] == [0, 0, 1, 1, 1]
        found = {
            "indices": [micro_batch.indices for micro_batch in micro_batches],
            "random": [micro_batch.random_state["rng_cpu"] for micro_batch in micro_batches],
        }
        for name, tensors in found.items():
            expected = [tensor for process in seen for tensor in process[name][t]]
            assert [torch.equal(*pair) for pair in zip(tensors, expected, strict=True)] == [True] * len(expected)
        assert [m.loss_sum for m in micro_batches] == [loss for process in seen for loss in process["losses"][t]]
        assert [m.predictions for m in micro_batches] == [6 * len(m.indices) for m in micro_batches]
        collated = [workload().batch(m.indices.tolist(), split="train", epoch=1) for m in micro_batches]
        assert all(
            torch.equal(m.batch()["tokens"], batch["tokens"]) for m, batch in zip(micro_batches, collated, strict=True)
        )


def test_the_recorded_training_of_two_processes_is_the_same_training(folder: Path) -> None:
    for rank in range(PROCESSES):
        recorded, stock = told(folder, "whole", rank), told(folder, "unrecorded", rank)
        for found, expected in zip(recorded["seen"], stock["seen"], strict=True):
            assert_same(found, expected)
        assert recorded["losses"] == stock["losses"]


def test_parameters_are_those_of_the_training_and_micro_batches_those_of_every_process(folder: Path) -> None:
    run = Run(folder / "whole" / "run")
    assert (run.manifest.state, run.manifest.attempt.processes) == ("complete", PROCESSES)
    # Each process seals its own segments: the borders need not agree.
    borders = {name[1:] for name in list_segments(run.path)}
    assert borders == {(0, 2, 0), (2, 4, 0), (4, 5, 0), (0, 3, 1), (3, 5, 1)}
    assert run.steps == list(range(STEPS))
    assert_thetas(run, told(folder, "whole", 0)["seen"])
    assert_micro_batches(folder, "whole", run.steps)
    norms = [run.step(t).gradient_norm for t in run.steps]
    assert norms == pytest.approx([*told(folder, "whole", 0)["norms"][:3], None, None])
    verdict = verify(run.path)
    assert (verdict.damages, verdict.usable, verdict.unfinished) == ((), ((0, STEPS),), 0)


def test_the_segments_of_other_processes_hold_no_parameters(folder: Path) -> None:
    run = folder / "whole" / "run"
    kinds: dict[int, set[str]] = {0: set(), 1: set()}
    for name in list_segments(run):
        names = TensorFile(run / SEGMENTS_FOLDER / name.file).names
        kinds[name.rank] |= {tensor.split("/", 1)[0] for tensor in names}
    assert kinds[1] == {"batches", "indices", "rng_cpu"}
    assert kinds[0] == kinds[1] | {"parameters", "coded"}


def test_a_restarted_training_of_two_processes_replaces_the_steps_it_redoes(folder: Path) -> None:
    run = Run(folder / "restarted" / "run")
    assert [attempt.joined for attempt in run.manifest.attempts] == ["first", "verified"]
    assert run.attempts == [(1, 0, 3), (2, 3, 5)]
    assert_thetas(run, told(folder, "restarted", 0)["seen"])
    assert_micro_batches(folder, "restarted", run.steps)
    assert Run(run.path, attempt=1).steps == [0, 1, 2, 3]


def test_a_folder_that_process_0_refuses_is_refused_in_every_process(folder: Path) -> None:
    errors = [told(folder, "refused", rank)["error"] for rank in range(PROCESSES)]
    assert errors[0].startswith("UsageError: ")
    assert "is not empty and holds no run; nothing is overwritten" in errors[0]
    assert errors[1] == errors[0]


def test_a_restart_from_other_parameters_ends_every_process(folder: Path) -> None:
    errors = [told(folder, "joined_wrongly", rank)["error"] for rank in range(PROCESSES)]
    assert errors[0].startswith("JoinError: ")
    assert "this training does not go on where the run was at step 1" in errors[0]
    assert errors[1] == errors[0]


def test_if_one_process_cannot_record_none_does_and_the_training_goes_on(folder: Path) -> None:
    seen = [told(folder, "failed_before_the_first_step", rank) for rank in range(PROCESSES)]
    for process in seen:
        assert_same(process["seen"][-1], told(folder, "unrecorded", 0)["seen"][-1])
    assert ["process 1 is incomplete: UsageError at step 0" in text for text in seen[0]["warnings"]] == [True]
    assert ["Recording.loss was called before" in text for text in seen[1]["warnings"]] == [True]
    assert not (folder / "failed_before_the_first_step" / "run" / "manifest.json").exists()


def test_only_steps_that_every_process_recorded_count(folder: Path) -> None:
    run = Run(folder / "stopped_early" / "run")
    assert run.steps == [0, 1, 2]
    assert_thetas(run, told(folder, "stopped_early", 0)["seen"][:4])
    assert_micro_batches(folder, "stopped_early", run.steps)
    missing = [damage for damage in verify(run.path).damages if damage.lost]
    assert [damage.lost for damage in missing] == [((3, 5),)]


def test_the_quota_is_for_all_processes_together(folder: Path) -> None:
    run = Run(folder / "within_quota" / "run")
    assert "the quota is reached" in run.manifest.state
    assert 0 < len(run.steps) < 2 * STEPS
    assert verify(run.path).bytes <= QUOTA
    own = [name.file for name in list_segments(run.path) if name.rank == 0]
    # Alone it would have had room for more.
    assert sum((run.path / SEGMENTS_FOLDER / file).stat().st_size for file in own) < QUOTA / 2
    for rank in range(PROCESSES):
        process = told(folder, "within_quota", rank)
        assert ["the quota is reached" in text for text in process["warnings"]] == [True]
        assert len(process["seen"]) == 2 * STEPS + 1


def test_a_process_may_have_no_examples_in_a_step(folder: Path) -> None:
    run = Run(folder / "without_examples" / "run")
    assert run.steps == [0, 1]
    assert [micro_batch.rank for micro_batch in run.step(0).micro_batches] == [0, 0, 1, 1, 1]
    assert [micro_batch.rank for micro_batch in run.step(1).micro_batches] == [0, 0]
    assert verify(run.path).damages == ()


def test_of_a_training_whose_process_was_killed_its_last_whole_steps_are_recovered(tmp_path: Path) -> None:
    start(tmp_path, ["killed"])
    run = tmp_path / "killed" / "run"
    assert "RuntimeError" in Run(run).manifest.state
    assert growing.unfinished(run / SEGMENTS_FOLDER) == ["001-00000002-rank1"]
    assert Run(run).steps == [0, 1]
    still_alive = RunLock(run, 1)
    assert recover(run) == ""
    with pytest.raises(UsageError, match="is being recorded into by another process"):
        recover_locked(run)
    still_alive.release()
    assert recover(run) == "steps 2-2"
    assert Run(run).steps == list(range(KILLED_AT))
    assert_thetas(Run(run), told(tmp_path, "killed", 0)["seen"][: KILLED_AT + 1])
    assert describe_ranges(verify(run).usable) == "steps 0-2"


@pytest.mark.parametrize("scenario", ["whole", "sharded"])
def test_an_update_of_two_processes_comes_out_when_one_does_it_again(folder: Path, scenario: str) -> None:
    report = check_update(Run(folder / scenario / "run"), workload(), data=True)
    assert report.text == "step 0 done again: losses and parameters are the recorded ones within rounding"


def test_the_loss_of_a_step_is_that_of_the_micro_batches_of_all_processes(folder: Path) -> None:
    run = Run(folder / "whole" / "run")
    assert replay(["--run", str(run.path), "--workload", "tests.cases:workload", "--loss-data", "batch"]) == 0
    (shards,) = (entry for entry in (run.path / "shards").iterdir() if entry.is_dir())
    shard = ShardFolder.open(shards).read(0, STEPS)
    seen = [told(folder, "whole", rank) for rank in range(PROCESSES)]
    for t in run.steps:
        # The model has no dropout: the loss that training measured is that of the recorded parameters.
        counts = [micro_batch.predictions for micro_batch in run.step(t).micro_batches if micro_batch.predictions]
        mean = sum(loss for process in seen for loss in process["losses"][t]) / sum(counts)
        assert shard.per_step["loss_start"][t] == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("rank", range(PROCESSES))
def test_a_recorded_training_of_shards_is_the_same_training(folder: Path, rank: int) -> None:
    recorded, stock = told(folder, "sharded", rank), told(folder, "sharded_unrecorded", rank)
    for found, expected in zip(recorded["seen"], stock["seen"], strict=True):
        assert_same(found, expected)


def test_shards_are_recorded_whole(folder: Path) -> None:
    run = Run(folder / "sharded" / "run")
    seen = told(folder, "sharded", 0)
    assert run.steps == [0, 1, 3, 4]
    assert [attempt.joined for attempt in run.manifest.attempts] == ["first", "verified"]
    for t in (0, 1, 2, 3, 4, 5):
        assert_same(run.parameters(t), seen["seen"][t])
    assert [run.step(t).gradient_norm for t in (0, 1, 3)] == pytest.approx([seen["norms"][t] for t in (0, 1, 3)])
    assert [micro_batch.rank for micro_batch in run.step(4).micro_batches] == [0, 0, 1, 1]
    assert run.manifest.unrecorded_changes == ()


def test_if_one_process_cannot_record_shards_any_more_none_does_and_none_waits(folder: Path) -> None:
    run = Run(folder / "sharded_failing" / "run")
    seen = [told(folder, "sharded_failing", rank) for rank in range(PROCESSES)]
    for process in seen:
        assert_same(process["seen"][-1], told(folder, "sharded_unrecorded", 0)["seen"][-1])
    assert ["at step 2" in text for process in seen for text in process["warnings"]] == [True, True]
    assert "process 0 is incomplete" in seen[1]["warnings"][0]
    assert run.steps == [0, 1]
    assert_same(run.parameters(2), seen[0]["seen"][2])


def test_shards_too_large_to_be_gathered_are_refused_with_what_to_do(folder: Path) -> None:
    for rank in range(PROCESSES):
        error = told(folder, "sharded_too_large", rank)["error"]
        assert error.startswith("UsageError: the recorded parameters are sharded, and together have ")
        assert "Record fewer of them with parameters=" in error
