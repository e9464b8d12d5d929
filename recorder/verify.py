"""Is a run whole? Every file read, every checksum checked, every θ decoded; what is lost and what is still usable."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from recorder import growing
from recorder.checkpoints import RECORD_FILE, CheckpointReader, checkpoint_folder
from recorder.chordrun import ChordRun
from recorder.errors import LossledgerError
from recorder.manifest import CHORD, MANIFEST_FILE, Manifest
from recorder.pruned import pruned_segments
from recorder.ranges import describe_ranges, joined_ranges
from recorder.recordedonce import UNTRAINED_FILE, open_once, optimizer_file
from recorder.runfolder import TRAINER_FOLDER
from recorder.runformat import Run
from recorder.segments import SEGMENTS_FOLDER, Segment, SegmentName, list_segments
from recorder.selection import StepSelection
from recorder.timeline import timeline

DAMAGED_FOLDER = "damaged"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Damage:
    """One file that is not as it was written.

    Parameters
    ----------
    file
        Its path.
    found
        What is wrong with it, with expected and actual sizes or checksums.
    lost
        The ranges of steps that it takes with it; empty if none.
    """

    file: str
    found: str
    lost: tuple[tuple[int, int], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What `verify` found.

    Parameters
    ----------
    run
        The run's folder.
    files, bytes
        How much was read.
    damages
        In the order found.
    usable
        Ranges of steps that can be replayed as they are.
    unfinished
        Segments in the making: of a recording that goes on, or left by a kill.
    pruned
        Ranges of steps that were deleted on purpose.
    """

    run: str
    files: int
    bytes: int
    damages: tuple[Damage, ...]
    usable: tuple[tuple[int, int], ...]
    unfinished: int
    pruned: tuple[tuple[int, int], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict as plain JSON types.

        Returns
        -------
        dict
            Field name to value.
        """
        return {**dataclasses.asdict(self), "whole": not self.damages}


def verify(path: Path, progress: Callable[[Path], None] = lambda file: None) -> Verdict:
    """Read a whole run and report every file that is damaged, missing or foreign.

    Parameters
    ----------
    path
        The run's folder.
    progress
        Called with each file before it is read.

    Returns
    -------
    Verdict
        What is damaged, what is lost with it, and what is usable.
    """
    manifest = Manifest.read(path)
    if manifest.path == CHORD:
        return _verify_checkpoints(ChordRun(path), progress)
    files = [path / MANIFEST_FILE]

    def begin(file: Path) -> None:
        files.append(file)
        progress(file)

    damages = [*_damaged_once(path, manifest, begin)]
    names = list_segments(path)
    good = []
    for name in names:
        file = path / SEGMENTS_FOLDER / name.file
        begin(file)
        found = _damage_of_segment(file, manifest)
        if found is None:
            good.append(name)
        else:
            damages.append(Damage(file=str(file), found=found, lost=((name.start, name.stop),)))
    damages += _strange_files(path)
    selection = StepSelection(manifest.steps)
    whole = timeline(good, manifest.attempts)
    pruned = pruned_segments(path)
    missing = _missing(path, manifest, sorted([*names, *pruned]), selection)
    damages += missing
    kept = [(t, t + 1) for part in whole for t in selection.between(part.start, part.stop)]
    fatal = any(not damage.lost and damage not in missing for damage in damages)
    return Verdict(
        run=str(path),
        files=len(files),
        bytes=sum(file.stat().st_size for file in files if file.exists()),
        damages=tuple(damages),
        usable=() if fatal else tuple(joined_ranges(kept)),
        unfinished=len(growing.unfinished(path / SEGMENTS_FOLDER)),
        pruned=tuple(joined_ranges([(name.start, name.stop) for name in pruned if name.rank == 0])),
    )


def _verify_checkpoints(run: ChordRun, progress: Callable[[Path], None]) -> Verdict:
    # Ranges are those of updates: a checkpoint takes the intervals on both sides with it.
    stops = run.manifest.checkpoints
    files, damages, good = [run.path / MANIFEST_FILE], [], []
    for k, step in enumerate(stops):
        file = checkpoint_folder(run.path, step) / RECORD_FILE
        files.append(file)
        progress(file.parent)
        try:
            record = run.record(k)
            files += [file.parent / entry.name for entry in record.files]
            reader = CheckpointReader(run.path, record)
            for name in record.tensors:
                reader.tensors([name])
        except (LossledgerError, OSError) as error:
            lost = ((stops[max(0, k - 1)], stops[min(k + 1, len(stops) - 1)]),)
            damages.append(Damage(file=str(file.parent), found=_without_path(error, file.parent), lost=lost))
        else:
            good.append(k)
    usable = [(stops[k], stops[k + 1]) for k in run.steps if {k, k + 1} <= set(good)]
    return Verdict(
        run=str(run.path),
        files=len(files),
        bytes=sum(file.stat().st_size for file in files if file.exists()),
        damages=tuple(damages),
        usable=tuple(joined_ranges(usable)),
        unfinished=0,
    )


def _damaged_once(path: Path, manifest: Manifest, progress: Callable[[Path], None]) -> Iterator[Damage]:
    expected = {UNTRAINED_FILE: "untrained"}
    run = Run(path)
    if not manifest.optimizer.fresh and run.attempts:
        expected[optimizer_file(run.attempts[0][0])] = "optimizer"
    for name, kind in expected.items():
        progress(path / name)
        try:
            file = open_once(path / name, kind, manifest.run_id)
            for tensor in file.names:
                file.tensor(tensor)
        except (LossledgerError, OSError) as error:
            yield Damage(file=str(path / name), found=_without_path(error, path / name))
    for name, checksum in manifest.files.items():
        copied = path / TRAINER_FOLDER / name
        progress(copied)
        try:
            content = copied.read_bytes()
        except OSError as error:
            yield Damage(file=str(copied), found=f"cannot be read: {error.strerror}")
            continue
        found = zlib.crc32(content)
        if found != checksum:
            yield Damage(file=str(copied), found=f"expected CRC-32 {checksum}, found {found} in {len(content):,} bytes")


def _damage_of_segment(file: Path, manifest: Manifest) -> str | None:
    try:
        segment = Segment(file)
        if segment.run_id != manifest.run_id:
            return f"expected a segment of run {manifest.run_id}, found one of {segment.run_id}"
        segment.verify()
    except (LossledgerError, OSError) as error:
        return _without_path(error, file)
    return None


def _without_path(error: Exception, file: Path) -> str:
    return str(error).removeprefix(f"{file}: ")


def _strange_files(path: Path) -> Iterator[Damage]:
    for entry in sorted((path / SEGMENTS_FOLDER).glob("*")):
        if SegmentName.parse(entry.name) is None and not entry.name.startswith("."):
            yield Damage(
                file=str(entry), found="expected a segment's name, ATTEMPT-START-STOP.safetensors; was it renamed?"
            )


def _missing(path: Path, manifest: Manifest, names: list[SegmentName], selection: StepSelection) -> list[Damage]:
    # From an attempt's first step to its last segment, or to the end that it tells.
    damages = []
    for attempt in manifest.attempts:
        own = timeline([name for name in names if name.attempt == attempt.number], [attempt])
        last = attempt.stop if attempt.stop is not None else max((part.stop for part in own), default=0)
        gaps, reached = [], attempt.first_step
        for part in [*own, None]:
            start = part.start if part else last
            gaps += [(t, t + 1) for t in selection.between(reached, start)]
            reached = max(reached, part.stop if part else last)
        if gaps:
            lost = tuple(joined_ranges(gaps))
            found = f"expected the segments of {describe_ranges(lost)} (attempt {attempt.number}), found none"
            damages.append(Damage(file=str(path / SEGMENTS_FOLDER), found=found, lost=lost))
    return damages


def set_aside(verdict: Verdict) -> list[Path]:
    """Move the damaged segments out of the run's timeline, into a folder of their own, so that the rest can be used.

    Parameters
    ----------
    verdict
        What `verify` found.

    Returns
    -------
    list of Path
        Where they are now.
    """
    moved = []
    for damage in verdict.damages:
        file = Path(damage.file)
        if damage.lost and file.is_file():
            target = Path(verdict.run) / DAMAGED_FOLDER / file.name
            target.parent.mkdir(exist_ok=True)
            moved.append(file.rename(target))
    return moved
