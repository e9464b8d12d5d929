"""Segments that are needed no longer: those of steps whose shards are all on the disk.

Only from the first recorded step on and without a gap, so that a chunk in the making always finds what it reads. Kept
are the first segments, which the self-check and the settings of the loss data go back to, the last one, and as many
steps before it as are asked for: where a training may be restarted, its parameters are compared with the recorded ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from recorder.pruned import prune
from recorder.runformat import Run
from replay.chunks import chunks
from replay.selfcheck import MOST_STEPS

if TYPE_CHECKING:
    from recorder.segments import SegmentName
    from replay.work import Replayer


def prune_finished(opened: Replayer, keep: int) -> None:
    """Delete the segments that are needed no longer.

    Parameters
    ----------
    opened
        The run, and the folders of what was computed from it.
    keep
        So many steps before the last recorded one are kept in any case.
    """
    run = Run(opened.run.path)
    names = _not_needed(run, opened, keep)
    if names:
        prune(run.path, names)


def _not_needed(run: Run, opened: Replayer, keep: int) -> list[SegmentName]:
    checked = run.steps[:MOST_STEPS][-1]
    start = next((first for first, _ in run.segments if first > checked), None)
    last_start, last_stop = run.segments[-1]
    stop = min(_finished_until(run, opened), last_start, last_stop - keep)
    return [] if start is None or start >= stop else run.files_of(start, stop)


def _finished_until(run: Run, opened: Replayer) -> int:
    finished = [set(folder.finished()) - opened.entries[name].missing() for name, folder in opened.folders.items()]
    until = run.ever_recorded[0][0]
    for chunk in chunks(run.ever_recorded, opened.job.chunk):
        if not all(chunk in there for there in finished):
            break
        until = chunk[1]
    return until
