"""Steps are read ahead of the computing: the same steps, in order, and what is wrong with one is told in its place."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from recorder.errors import DamagedFileError
from recorder.runformat import Run
from replay import reading
from replay.precision import PRECISIONS
from replay.reading import ReadAhead, RecordedStep
from replay.shards import ShardFolder

STEPS = 6


@pytest.fixture(params=[0, 1 << 40], ids=["a thread of its own", "in turn"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "WORTH_A_THREAD", request.param)


def _reader(run: Path, dtype: str = "float32") -> ReadAhead:
    return ReadAhead(Run(run), torch.device("cpu"), PRECISIONS[dtype])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("start", "stop"), [(0, STEPS), (1, 2), (2, 5)])
def test_every_step_comes_with_what_the_run_holds_of_it(recorded: Path, start: int, stop: int) -> None:
    run, found = Run(recorded), list(_reader(recorded).steps(start, stop))
    assert [step.record.step for step in found] == list(range(start, stop))
    for step in found:
        for theta, t in ((step.start, step.record.step), (step.end, step.record.step + 1)):
            expected = run.parameters(t)
            assert theta.keys() == expected.keys()
            assert all(torch.equal(theta[name], tensor) for name, tensor in expected.items())


@pytest.mark.usefixtures("way")
def test_a_step_begins_with_the_very_object_that_ended_the_one_before(recorded: Path) -> None:
    found = list(_reader(recorded, "float64").steps(0, STEPS))
    assert all(after.start is before.end for before, after in itertools.pairwise(found))
    assert next(iter(found[0].start.values())).dtype == torch.float64


@pytest.mark.usefixtures("way")
def test_a_damaged_segment_is_told_after_the_steps_before_it(run: Path) -> None:
    *_, last = sorted((run / "segments").iterdir())
    data = bytearray(last.read_bytes())
    data[-200] ^= 1
    last.write_bytes(data)
    found: list[RecordedStep] = []
    steps = _reader(run).steps(0, STEPS)
    with pytest.raises(DamagedFileError):
        found.extend(steps)
    assert 0 < len(found) < STEPS


def test_the_next_step_is_read_while_this_one_is_looked_at(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "WORTH_A_THREAD", 0)
    read, main = threading.Semaphore(0), threading.get_ident()
    parameters = Run.parameters

    def told(run: Run, t: int) -> dict[str, torch.Tensor]:
        assert threading.get_ident() != main
        theta = parameters(run, t)
        read.release()
        return theta

    monkeypatch.setattr(Run, "parameters", told)
    for step in _reader(recorded).steps(0, STEPS):
        ahead = 3 if step.record.step == 0 else 1
        for _ in range(ahead if step.record.step < STEPS - 1 else 0):
            assert read.acquire(timeout=60)


def test_the_reader_ends_with_the_one_who_stops_listening(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "WORTH_A_THREAD", 0)
    steps = _reader(recorded).steps(0, STEPS)
    next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lossledger-reader")]


def test_shards_are_the_same_bytes_whether_or_not_a_thread_reads_ahead(
    run: Path,
    tmp_path: Path,
    replay: Callable[..., int],
    folder: Callable[[Path, str], ShardFolder],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shards = []
    for limit in (0, 1 << 40):
        monkeypatch.setattr(reading, "WORTH_A_THREAD", limit)
        assert replay(run, "--overwrite", "--chunk", "4", "--rtol", "1") == 0
        shards.append([folder(run, "batch").file(*entry).read_bytes() for entry in ((0, 4), (4, STEPS))])
    assert shards[0] == shards[1]
