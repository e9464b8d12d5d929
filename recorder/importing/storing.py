"""One checkpoint put into the run: safetensors files linked, all others written as safetensors; whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from recorder import durable, tensorfile
from recorder.checkpoints import (
    HARD_LINK,
    RECORD_FILE,
    SYMBOLIC_LINK,
    WRITTEN,
    File,
    Record,
    Stored,
    checkpoint_folder,
)
from recorder.errors import UsageError

if TYPE_CHECKING:
    from recorder.importing.found import Found
    from recorder.importing.matching import Match
    from recorder.importing.weights import Weights

FILE = "model.safetensors"


def stored_before(run: Path, found: Found, weights: Weights, match: Match) -> Record | None:
    """Find the record of a checkpoint that an earlier import has finished.

    Parameters
    ----------
    run
        The run's folder.
    found, weights, match
        The checkpoint in the source.

    Returns
    -------
    Record or None
        None if there is none, or it is of other content, or of other names.
    """
    if not (checkpoint_folder(run, found.step) / RECORD_FILE).is_file():
        return None
    record = Record.read(run, found.step)
    if set(record.tensors) != set(match.tensors) or dict(record.taken_from) != _renamed(match):
        return None
    # A source that was moved or copied has other stamps; its bytes decide.
    same = dict(record.source) == _stamps(weights) or not different_tensors(record, weights, match)
    return record if same else None


def different_tensors(record: Record, weights: Weights, match: Match) -> list[str]:
    """Compare the tensors of a source with those of a checkpoint in the run.

    Parameters
    ----------
    record
        The checkpoint's record.
    weights, match
        The tensors in the source.

    Returns
    -------
    list of str
        Names, in the model, of those that differ or that the run does not have.
    """
    return [
        name
        for name, original in match.tensors.items()
        if name not in record.tensors or tensorfile.checksum(weights.read(original)) != record.tensors[name].crc32
    ]


def store(run: Path, found: Found, weights: Weights, match: Match) -> Record:
    """Put a checkpoint into the run.

    Parameters
    ----------
    run
        The run's folder.
    found, weights, match
        The checkpoint in the source. A `UsageError` tells if weights that the model ties differ in it.

    Returns
    -------
    Record
        What was written last: the checkpoint is whole.
    """
    folder = checkpoint_folder(run, found.step)
    folder.mkdir(parents=True, exist_ok=True)
    durable.sweep(folder)
    # What a killed import left, or one of other files, is done again; without a record it counts for nothing.
    (folder / RECORD_FILE).unlink(missing_ok=True)
    _check_tied(found, weights, match)
    stamps = _stamps(weights)
    files, tensors = (_link if weights.linkable else _write)(folder, weights, match.tensors)
    record = Record(
        step=found.step,
        epoch=found.epoch,
        source=stamps,
        taken_from=_renamed(match),
        files=files,
        tensors=tensors,
    )
    record.write(run)
    return record


def _renamed(match: Match) -> dict[str, str]:
    return {name: original for name, original in match.tensors.items() if name != original}


def _stamps(weights: Weights) -> dict[str, tuple[int, int]]:
    stats = {file: file.stat() for file in weights.files}
    return {str(file.absolute()): (stat.st_size, stat.st_mtime_ns) for file, stat in stats.items()}


def _check_tied(found: Found, weights: Weights, match: Match) -> None:
    for name, others in match.duplicates.items():
        first = weights.read(match.tensors[name])
        for other in others:
            if not torch.equal(first, weights.read(other)):
                message = (
                    f"{found.path}: {match.tensors[name]!r} and {other!r} are one tensor in the model that the "
                    "workload builds, and differ in the checkpoint: they were not tied in the training. Let the "
                    "workload build the model that was trained"
                )
                raise UsageError(message)


def _link(folder: Path, weights: Weights, names: Mapping[str, str]) -> tuple[tuple[File, ...], dict[str, Stored]]:
    places = {file: file.name for file in weights.linkable}
    files = tuple(
        File(name=name, bytes=file.stat().st_size, kind=_linked(file, folder / name)) for file, name in places.items()
    )
    tensors = {
        name: Stored(
            file=places[weights.file_of(original)], tensor=original, crc32=tensorfile.checksum(weights.read(original))
        )
        for name, original in names.items()
    }
    return files, tensors


def _linked(source: Path, target: Path) -> str:
    # A file of the hub's cache is itself a link: what counts is the file behind it.
    source = source.resolve()
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        # Another file system, or one without hard links.
        target.symlink_to(source)
        return SYMBOLIC_LINK
    return HARD_LINK


def _write(folder: Path, weights: Weights, names: Mapping[str, str]) -> tuple[tuple[File, ...], dict[str, Stored]]:
    tensors = {name: weights.read(original) for name, original in names.items()}
    facts = {"format": "lossledger-checkpoint-tensors", "version": 1}
    path = folder / FILE
    tensorfile.write(path, tensors, facts)
    file = File(name=FILE, bytes=path.stat().st_size, kind=WRITTEN)
    checksums = {name: tensorfile.checksum(tensor) for name, tensor in tensors.items()}
    return (file,), {name: Stored(file=FILE, tensor=name, crc32=crc) for name, crc in checksums.items()}
