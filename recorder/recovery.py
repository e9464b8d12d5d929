"""What a killed training left behind, made whole: before reading a run, and before recording into it again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from recorder import durable, growing
from recorder.errors import UsageError
from recorder.lock import RunLock, locks_of_others
from recorder.manifest import MANIFEST_FILE, Manifest
from recorder.ranges import describe_ranges
from recorder.segments import SEGMENTS_FOLDER, list_segments
from recorder.segmentwriter import recover_segments

KILLED = "incomplete: the training was killed"


def recover(run: Path) -> str:
    """Make a run whole that nobody records into any more; one that is being recorded is left alone.

    Parameters
    ----------
    run
        The run's folder, or one that is none.

    Returns
    -------
    str
        In words, the steps that were recovered; empty if there were none.
    """
    if not (run / MANIFEST_FILE).is_file():
        return ""
    # One process of several may have been killed alone.
    if Manifest.read(run).state != "recording" and not growing.unfinished(run / SEGMENTS_FOLDER):
        return ""
    try:
        lock = RunLock(run)
    except UsageError:
        return ""
    try:
        return recover_locked(run)
    except UsageError:
        return ""
    finally:
        lock.release()


def recover_locked(run: Path) -> str:
    """Make a run whole, under its lock.

    Parameters
    ----------
    run
        The run's folder.

    Returns
    -------
    str
        In words, the steps that were recovered; empty if there were none. A `UsageError` tells if another process of
        the training still records.
    """
    with locks_of_others(run):
        durable.sweep(run)
        recovered = recover_segments(run)
    manifest = Manifest.read(run)
    if manifest.state == "recording":
        stops = [name.stop for name in list_segments(run) if name[::3] == (manifest.attempt.number, 0)]
        ended = dataclasses.replace(manifest.attempt, state=KILLED, stop=max(stops, default=None))
        dataclasses.replace(manifest, attempts=(*manifest.attempts[:-1], ended)).write(run)
    first = min((name.rank for name in recovered), default=0)
    return describe_ranges([(name.start, name.stop) for name in recovered if name.rank == first]) if recovered else ""
