"""Segments that were deleted on purpose, once what they were recorded for had been computed from them.

`RUN/pruned.json` names them, so that a run that was pruned is told from one that lost files, and results keep telling
which attempt their steps are of.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recorder import sealedjson
from recorder.errors import FormatError
from recorder.manifest import VERSION
from recorder.segments import SEGMENTS_FOLDER, SegmentName, list_segments

PRUNED_FILE = "pruned.json"
FORMAT = "lossledger-pruned"


def pruned_segments(run: Path) -> list[SegmentName]:
    """List the segments that were pruned.

    Parameters
    ----------
    run
        The run's folder.

    Returns
    -------
    list of SegmentName
        Those of which the file is gone, by attempt, step and process.
    """
    there = set(list_segments(run))
    return sorted(name for name in _listed(run) if name not in there)


def prune(run: Path, segments: Sequence[SegmentName]) -> None:
    """Delete segments, and keep their names.

    Parameters
    ----------
    run
        The run's folder.
    segments
        Those to delete.
    """
    known = sorted({*_listed(run), *segments})
    document = {"format": FORMAT, "version": VERSION, "segments": [name.file for name in known]}
    # First the names: a kill in between leaves a segment too many, never one that is missed.
    sealedjson.write(run / PRUNED_FILE, document)
    for name in segments:
        (run / SEGMENTS_FOLDER / name.file).unlink(missing_ok=True)


def _listed(run: Path) -> list[SegmentName]:
    file = run / PRUNED_FILE
    if not file.exists():
        return []
    document = sealedjson.read(file, (FORMAT, VERSION))
    names = [SegmentName.parse(str(name)) for name in document.get("segments", [None])]
    if (document.get("format"), document.get("version")) != (FORMAT, VERSION) or None in names:
        message = f"{file}: expected {FORMAT} version {VERSION}, a list of pruned segments. Restore it from a copy"
        raise FormatError(message)
    return [name for name in names if name is not None]
