"""What a replay is going to read, told from the headers of segments, is what is then read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recorder.runformat import Run
from recorder.tensorfile import TensorFile
from replay import work
from replay.chunks import chunks
from replay.job import Job, Task
from replay.precision import PRECISIONS
from replay.readcost import readings
from replay.reading import ReadAhead
from tests import cases, two_processes

Jobs = Callable[..., Job]

GOLDEN = Path(__file__).parents[1] / "golden/run-v1"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every tensor that is read."""
    sizes: list[int] = []
    read_tensor = TensorFile._read

    def reading(self: TensorFile, name: str, framework: str) -> Any:
        found = read_tensor(self, name, framework)
        sizes.append(found.nbytes)
        return found

    monkeypatch.setattr(TensorFile, "_read", reading)
    return sizes


@pytest.mark.parametrize("afresh", [False, True])
def test_bytes_to_read_are_those_that_the_workers_read(run: Path, afresh: bool, read: list[int], job: Jobs) -> None:
    tasks = [Task(start=start, stop=stop, loss_data=("batch",)) for start, stop in ((0, 2), (2, 4), (4, 5), (5, 6))]
    foretold = list(readings(Run(run), tasks, afresh=afresh))
    assert not read
    opened, found = work.Replayer(job(run)), []
    for task in tasks:
        opened = work.Replayer(job(run)) if afresh else opened
        read.clear()
        opened.replay(task)
        found.append(sum(read))
    assert [reading.bytes for reading in foretold] == found
    # Segments of three steps: each chunk needs the θ at both its ends, and those before them in their segments.
    assert [reading.states for reading in foretold] == ([3, 5, 3, 4] if afresh else [3, 2, 1, 1])


def test_steps_that_are_kept_apart_are_read_from_the_segments_start(tmp_path: Path, read: list[int], job: Jobs) -> None:
    cases.train(tmp_path, steps=8, steps_to_record="0::3")
    assert Run(tmp_path).consecutive == [(0, 1), (3, 4), (6, 7)]
    tasks = [Task(start=t, stop=t + 1, loss_data=("batch",)) for t in (3, 6)]
    foretold = list(readings(Run(tmp_path), tasks, afresh=True))
    for task, reading in zip(tasks, foretold, strict=True):
        opened = work.Replayer(job(tmp_path))
        read.clear()
        opened.replay(task)
        assert (reading.bytes, reading.states) == (sum(read), 2 * task.start // 3 + 2)


@pytest.mark.parametrize("name", ["attempts", "bfloat16", "buffers", "selected"])
@pytest.mark.parametrize("afresh", [False, True])
def test_bytes_to_read_of_attempts_buffers_sixteen_bit_and_gaps(name: str, afresh: bool, read: list[int]) -> None:
    _compare_with_what_is_read(GOLDEN / name, read, afresh)


@pytest.mark.cluster
def test_bytes_to_read_are_those_of_all_processes_of_the_training(tmp_path: Path, read: list[int]) -> None:
    two_processes.start(tmp_path, ["restarted"])
    assert Run(tmp_path / "restarted/run").step(1).micro_batches[-1].rank == 1
    _compare_with_what_is_read(tmp_path / "restarted/run", read, afresh=True)


def _compare_with_what_is_read(run: Path, read: list[int], afresh: bool) -> None:
    # From a step in the middle on: what lies before it in its segment is read too.
    ranges = list(chunks(Run(run).consecutive, 2))[1:]
    foretold = list(readings(Run(run), [Task(start=a, stop=b, loss_data=()) for a, b in ranges], afresh=afresh))
    reader, found = _reader(run), []
    for first, last in ranges:
        reader = _reader(run) if afresh else reader
        read.clear()
        list(reader.steps(first, last))
        found.append(sum(read))
    assert found
    assert [reading.bytes for reading in foretold] == found


def _reader(run: Path) -> ReadAhead:
    return ReadAhead(Run(run), torch.device("cpu"), PRECISIONS["float32"])
