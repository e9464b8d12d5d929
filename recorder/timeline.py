"""The timeline of a run: of the segments of all its attempts those that hold its steps, in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from recorder.manifest import Attempt
from recorder.ranges import joined_ranges
from recorder.segments import SegmentName


class Part(NamedTuple):
    """Steps of a run that stand in one segment.

    Parameters
    ----------
    start, stop
        The range of steps.
    segment
        The segment with their parameters.
    """

    start: int
    stop: int
    segment: SegmentName


def timeline(files: Sequence[SegmentName], attempts: Sequence[Attempt]) -> list[Part]:
    """Order the segments of all attempts: where an attempt began, it replaces what earlier ones recorded from there on.

    Parameters
    ----------
    files
        All segments.
    attempts
        The attempts to follow, in order.

    Returns
    -------
    list of Part
        By step. Only steps of which every process left its segment.
    """
    parts: list[Part] = []
    for attempt in attempts:
        own = [name for name in files if name.attempt == attempt.number]
        recorded = [Part(name.start, name.stop, name) for name in own if name.rank == 0]
        for rank in range(1, attempt.processes):
            recorded = _within(recorded, joined_ranges([(name.start, name.stop) for name in own if name.rank == rank]))
        if recorded:
            parts = [*_within(parts, [(0, attempt.first_step)]), *recorded]
    return parts


def _within(parts: Sequence[Part], ranges: Sequence[tuple[int, int]]) -> list[Part]:
    cut = [Part(max(part.start, start), min(part.stop, stop), part.segment) for part in parts for start, stop in ranges]
    return [part for part in cut if part.start < part.stop]
