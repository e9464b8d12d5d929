from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

import recorder
from recorder.lock import RunLock
from recorder.manifest import Manifest
from recorder.parameters import UnmappedParameterWarning
from recorder.recording import RecorderWarning, Recording
from recorder.runformat import Run

# The small models below have names that no naming rule knows.
pytestmark = pytest.mark.filterwarnings("ignore::recorder.parameters.UnmappedParameterWarning")


def model(width: int = 32) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


def size_of(run: Path) -> int:
    return sum(file.stat().st_size for file in run.rglob("*") if file.is_file())


def train(
    network: nn.Module,
    run: Path | None = None,
    *,
    steps: int = 30,
    examples: Callable[[int], int] = lambda step: 4,
    after: Callable[[Recording, int], None] = lambda rec, step: None,
    selection: str = "all",
    **watch_arguments: Any,
) -> list[torch.Tensor]:
    """Train; return the first weight before the first and after every step."""
    optimizer = SGD(network.parameters(), lr=0.5)
    weight = next(network.parameters())
    seen = [weight.detach().clone()]
    rec = None if run is None else recorder.watch(network, optimizer, run=run, steps=selection, **watch_arguments)
    for step in range(steps):
        batch = torch.randn(examples(step), weight.shape[1], generator=torch.Generator().manual_seed(step))
        if rec is not None:
            rec.batch([step], batch)
        network(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(weight.detach().clone())
        if rec is not None:
            after(rec, step)
    if rec is not None:
        rec.close()
    return seen


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


# --- The quota ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quota", "growing_batches", "segment_steps"),
    [(200_000, False, 3), (300_000, False, 64), (300_000, True, 3), (450_000, True, 64)],
)
def test_a_run_never_exceeds_its_quota_and_the_training_goes_on(
    tmp_path: Path, quota: int, growing_batches: bool, segment_steps: int
) -> None:
    sizes = []

    def look(rec: Recording, step: int) -> None:
        rec.flush()
        sizes.append(size_of(tmp_path / "run"))

    arguments: dict[str, Any] = {"steps": 60, "examples": lambda step: 4 * step + 1 if growing_batches else 4}
    with pytest.warns(RecorderWarning, match=r"the quota is reached at step \d+.*goes on unrecorded"):
        seen = train(model(), tmp_path / "run", quota=quota, segment_steps=segment_steps, after=look, **arguments)
    assert max([*sizes, size_of(tmp_path / "run")]) <= quota
    assert_same(seen, train(model(), **arguments))
    run = Run(tmp_path / "run")
    stop = len(run.steps)
    assert run.manifest.state.startswith(f"incomplete: the quota is reached at step {stop}: ")
    assert run.manifest.attempt.stop == (stop or None)
    assert run.steps == list(range(stop))
    for t in range(stop + 1 if stop else 0):
        assert torch.equal(run.parameters(t)["0.weight"], seen[t])


def test_one_batch_that_is_larger_than_all_before_does_not_break_the_quota(tmp_path: Path) -> None:
    with pytest.warns(RecorderWarning, match="the quota is reached at step 7"):
        train(model(), tmp_path / "run", quota=500_000, examples=lambda step: 3000 if step == 7 else 4)
    assert size_of(tmp_path / "run") <= 500_000
    assert Run(tmp_path / "run").steps == list(range(7))


@pytest.mark.parametrize("quota", [1, 10_000, 70_000, 100_000])
def test_a_quota_too_small_for_a_single_step_records_none(tmp_path: Path, quota: int) -> None:
    with pytest.warns(RecorderWarning, match="the quota is reached at step 0"):
        train(model(64), tmp_path / "run", quota=quota, steps=4)
    assert Run(tmp_path / "run").steps == []
    assert list((tmp_path / "run" / "segments").iterdir()) == []


def test_a_quota_is_used_well(tmp_path: Path) -> None:
    quota = 1_000_000
    with pytest.warns(RecorderWarning, match="the quota is reached"):
        train(model(), tmp_path / "run", quota=quota, steps=400)
    assert 0.75 * quota < size_of(tmp_path / "run") <= quota


def test_a_quota_covers_what_earlier_attempts_have_written(tmp_path: Path) -> None:
    network = model()
    train(network, tmp_path / "run", steps=5)
    size = size_of(tmp_path / "run")
    with pytest.warns(RecorderWarning, match="the quota is reached at step 5"):
        train(network, tmp_path / "run", steps=5, first_step=5, quota=size)
    assert Run(tmp_path / "run").steps == [0, 1, 2, 3, 4]


def test_a_quota_that_is_not_reached_changes_nothing(tmp_path: Path) -> None:
    train(model(), tmp_path / "run", quota=10**9)
    assert Run(tmp_path / "run").manifest.state == "complete"
    assert len(Run(tmp_path / "run").steps) == 30


# --- The end of the selection ---------------------------------------------------------------------------------------


def test_a_recording_is_complete_once_its_last_selected_step_is_made_and_the_training_goes_on(tmp_path: Path) -> None:
    states: list[str] = []

    def look(rec: Recording, step: int) -> None:
        states.append(Manifest.read(tmp_path / "run").state if (tmp_path / "run" / "manifest.json").exists() else "")

    seen = train(model(), tmp_path / "run", steps=12, selection="2:4,6:9:2", after=look)
    assert states == ["", "", *["recording"] * 6, *["complete"] * 4]
    assert_same(seen, train(model(), steps=12))
    run = Run(tmp_path / "run")
    assert (run.steps, run.manifest.attempt.stop) == ([2, 3, 6, 8], 9)
    for t in (2, 3, 4, 6, 7, 8, 9):
        assert torch.equal(run.parameters(t)["0.weight"], seen[t])


def test_after_the_last_selected_step_no_thread_is_left(tmp_path: Path) -> None:
    alive = []

    def look(rec: Recording, step: int) -> None:
        alive.append(any(thread.name == "lossledger-recorder" for thread in threading.enumerate()))

    train(model(), tmp_path / "run", steps=4, selection=":2", after=look)
    assert alive == [True, False, False, False]


def test_a_training_that_ends_before_its_selection_is_complete_as_far_as_it_came(tmp_path: Path) -> None:
    train(model(), tmp_path / "run", steps=5, selection="0:100:2")
    run = Run(tmp_path / "run")
    assert (run.manifest.state, run.steps) == ("complete", [0, 2, 4])


def test_a_training_that_ends_before_its_first_selected_step_leaves_no_run(tmp_path: Path) -> None:
    train(model(), tmp_path / "run", steps=5, selection="100:")
    assert not (tmp_path / "run" / "manifest.json").exists()
    train(model(), tmp_path / "run", steps=5)  # the folder is as good as empty
    assert Run(tmp_path / "run").manifest.state == "complete"


# --- Warnings that are errors -------------------------------------------------------------------------------------


def closed_where_warnings_are_errors(run: Path, warning: type[Warning], **watch_arguments: Any) -> None:
    recordings: list[Recording] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(warning):
            train(model(), run, steps=3, after=lambda rec, step: recordings.append(rec), **watch_arguments)
        recordings[0].close()  # a second one finds nothing to say
    assert Run(run).manifest.state == "complete"
    assert Run(run).steps == [0, 1, 2]
    RunLock(run).release()  # another recorder may go on


def test_a_parameter_in_other_leaves_the_run_complete(tmp_path: Path) -> None:
    closed_where_warnings_are_errors(tmp_path / "run", UnmappedParameterWarning)


def test_a_parameter_left_out_that_moves_leaves_the_run_complete(tmp_path: Path) -> None:
    closed_where_warnings_are_errors(tmp_path / "run", RecorderWarning, parameters=["!0.*"])
    assert Run(tmp_path / "run").manifest.unrecorded_changes == ("0.bias", "0.weight")


def test_the_end_of_the_selection_completes_the_run_too(tmp_path: Path) -> None:
    closed_where_warnings_are_errors(tmp_path / "run", UnmappedParameterWarning, selection="0:3")


# --- Flush ----------------------------------------------------------------------------------------------------------


def test_flush_puts_every_step_so_far_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def spy(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def look(rec: Recording, step: int) -> None:
        if step == 5:
            synced.clear()
            rec.flush()
            assert {".001-00000000.growing", ".001-00000000.journal"} <= set(synced)
            journal = (tmp_path / "run" / "segments" / ".001-00000000.journal").read_text()
            assert sum('"step":{' in line for line in journal.splitlines()) == 6

    monkeypatch.setattr(os, "fsync", spy)
    train(model(), tmp_path / "run", steps=8, after=look)


def test_flush_before_the_first_step_and_after_the_end_does_nothing(tmp_path: Path) -> None:
    network = model()
    rec = recorder.watch(network, SGD(network.parameters(), lr=0.1), run=tmp_path / "run")
    rec.flush()
    rec.close()
    rec.flush()


def test_a_failure_shows_at_a_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = model()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    def look(rec: Recording, step: int) -> None:
        if step == 2:
            rec.flush()
            monkeypatch.setattr("recorder.growing._write_all", full)
        if step == 3:
            with pytest.warns(RecorderWarning, match="OSError at step 3.*No space left on device"):
                rec.flush()

    train(network, tmp_path / "run", steps=6, after=look)
