"""The import as a whole: find the checkpoints, check them against the model, store them, write the manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from recorder.checkpoints import FOLDER, Record
from recorder.errors import UsageError
from recorder.importing import kinds
from recorder.importing.concluding import manifest_of, sentences
from recorder.importing.fitting import matches_of, ordered
from recorder.importing.matching import Match, Model
from recorder.importing.storing import different_tensors, store, stored_before
from recorder.lock import LOCK_FILE, RunLock
from recorder.manifest import CHORD, MANIFEST_FILE, Manifest
from recorder.parameters import parameter_table

if TYPE_CHECKING:
    from recorder.importing.found import Found
    from recorder.importing.wish import Wish
    from recorder.workload import Workload


def import_checkpoints(wish: Wish, workload: Workload, say: Callable[[str], None]) -> Manifest:
    """Make a run of path ``chord``, or add to one what its source has more.

    Parameters
    ----------
    wish
        What the user asks for.
    workload
        Builds the model that was trained.
    say
        Tells the user a sentence.

    Returns
    -------
    Manifest
        Of the finished run.
    """
    source = kinds.find(wish.source, wish.kind, wish.named)
    for note in source.notes:
        say(note)
    model = workload.model()
    table = parameter_table(model)
    checkpoints = ordered(wish, source)
    matches = matches_of(wish, checkpoints, Model.of(model, table))
    for sentence in dict.fromkeys(found.said for found in matches.values() if found.said):
        say(sentence)
    _make_folder(wish)
    lock = RunLock(wish.run)
    try:
        before = _finished_before(wish)
        records = _stored(wish, checkpoints, matches, before, say)
        facts = matches[checkpoints[0][0].path].facts
        manifest = manifest_of(wish, source, model, table, facts, records, before)
        for sentence in sentences(records, manifest):
            say(sentence)
        manifest.write(wish.run)
    finally:
        lock.release()
    return manifest


def _make_folder(wish: Wish) -> None:
    try:
        wish.run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"the run folder {wish.run} cannot be made: {error.strerror}"
        raise UsageError(message) from error


def _finished_before(wish: Wish) -> Manifest | None:
    # None where no import has finished yet.
    if (wish.run / MANIFEST_FILE).exists():
        before = Manifest.read(wish.run)
        if before.path != CHORD:
            message = f"{wish.run} holds a run of path {before.path}; give another folder to import into"
            raise UsageError(message)
        return before
    strange = sorted(entry.name for entry in wish.run.iterdir() if entry.name not in {FOLDER, LOCK_FILE})
    if strange:
        message = (
            f"{wish.run} holds {strange[0]!r} and is no run; give a new folder, or the one of an import that was "
            "interrupted"
        )
        raise UsageError(message)
    return None


def _stored(
    wish: Wish,
    checkpoints: Sequence[Sequence[Found]],
    matches: Mapping[Path, Match],
    before: Manifest | None,
    say: Callable[[str], None],
) -> list[Record]:
    known = set(before.checkpoints) if before else set()
    last = max(known, default=-1)
    gone = known - {of_step[0].step for of_step in checkpoints}
    if gone:
        message = (
            f"{wish.run} holds the checkpoint after {min(gone)} updates, which {wish.place} does not have; "
            "import into a new folder"
        )
        raise UsageError(message)
    records = []
    for of_step in checkpoints:
        first, *others = of_step
        weights = first.open()
        record = stored_before(wish.run, first, weights, matches[first.path])
        if record is None and (first.step in known or first.step < last):
            what = "has changed since it was imported" if first.step in known else "lies between those of the run"
            message = f"{first.path}: the checkpoint after {first.step} updates {what}; import into a new folder"
            raise UsageError(message)
        if record is None:
            record = store(wish.run, first, weights, matches[first.path])
        for other in others:
            _check_copy(first, other, record, matches[other.path])
            say(f"{other.path.name} is a copy of {first.path.name}, both after {first.step} updates: left out")
        records.append(record)
    return records


def _check_copy(first: Found, other: Found, record: Record, of_other: Match) -> None:
    different = different_tensors(record, other.open(), of_other)
    if different:
        message = (
            f"{first.path} and {other.path} are both after {first.step} updates, and {len(different)} tensors differ, "
            f"first {different[0]!r}; import one of them: --step N=PATH, or a list"
        )
        raise UsageError(message)
