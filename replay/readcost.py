"""What reading the run takes, told before the work from the headers of its segments: bytes, and decoded states.

A θ is decoded from the one before it, back to the first of its segment. Whoever does one chunk after the other reads on
where the last one ended; whoever takes up a chunk in the middle of a segment begins with the segment.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from recorder.chordrun import ChordRun
from recorder.segments import Segment, SegmentName, list_segments, segment_file

if TYPE_CHECKING:
    from recorder.runformat import Run
    from replay.job import Task


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What reading takes for one task.

    Parameters
    ----------
    bytes
        Of parameters and buffers as they are stored, and of batches; without the headers of files.
    states
        How many θ are decoded.
    """

    bytes: int
    states: int


def readings(run: Run, tasks: Sequence[Task], *, afresh: bool) -> Iterator[Reading]:
    """Tell what reading takes for each of some tasks.

    Parameters
    ----------
    run
        The run.
    tasks
        In the order of steps.
    afresh
        Whether each is read from the start of its segments: the most that several workers may read. Otherwise one
        process does them one after the other.

    Yields
    ------
    Reading
        Of each task. A `DamagedFileError` tells if the header of a segment is damaged.
    """
    if isinstance(run, ChordRun):
        yield from _of_checkpoints(run, tasks, afresh=afresh)
        return

    @functools.lru_cache(maxsize=2)
    def stored(name: SegmentName) -> tuple[dict[int, int], dict[int, int]]:
        file = segment_file(run.path, name.start, name.stop, attempt=name.attempt, rank=name.rank)
        return Segment(file).stored_bytes()

    beside = _of_other_processes(run, tasks)
    at: tuple[SegmentName, int] | None = None
    for task in tasks:
        size = states = 0
        at = None if afresh else at
        for t in range(task.start, task.stop + 1):
            name = run.segment_of_state(t)
            of_states, of_steps = stored(name)
            if t < task.stop:
                size += of_steps[t] + beside.get((name.attempt, t), 0)
            # As `Segment` moves: on from where it is, or again from its first state.
            from_start = at is None or at[0] != name or at[1] > t
            decoded = [number for number in of_states if number <= t and (from_start or at is None or number > at[1])]
            size += sum(of_states[number] for number in decoded)
            states += len(decoded)
            at = name, t
        yield Reading(bytes=size, states=states)


def _of_checkpoints(run: ChordRun, tasks: Sequence[Task], *, afresh: bool) -> Iterator[Reading]:
    # Each checkpoint stands whole; whoever reads on has the first one of a task already.
    last = None
    for task in tasks:
        first = task.start + (not afresh and last == task.start)
        yield Reading(bytes=sum(run.stored_bytes(k) for k in range(first, task.stop + 1)), states=task.stop + 1 - first)
        last = task.stop


def _of_other_processes(run: Run, tasks: Sequence[Task]) -> dict[tuple[int, int], int]:
    # In data-parallel training, the batches of all processes but the first: by attempt and step.
    sizes: dict[tuple[int, int], int] = defaultdict(int)
    first, last = (tasks[0].start, tasks[-1].stop) if tasks else (0, 0)
    for name in list_segments(run.path):
        if name.rank and first < name.stop and name.start < last:
            file = segment_file(run.path, name.start, name.stop, attempt=name.attempt, rank=name.rank)
            for t, size in Segment(file).stored_bytes()[1].items():
                sizes[name.attempt, t] += size
    return sizes
