"""Hugging Face folders: ``checkpoint-N/`` of a training, or the revisions of a repository in the hub's cache.

SOURCE/checkpoint-500/model.safetensors             what transformers.Trainer leaves
models--ORG--NAME/refs/step1000                     holds a hash, the name of
models--ORG--NAME/snapshots/HASH/                   the revision's files, links into blobs/
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

from recorder.errors import UsageError
from recorder.importing.found import Found, Source, number_in, open_file, weights_file, whole_number

KIND = "huggingface"
_PATTERN = "checkpoint-*"


def recognises(source: Path) -> bool:
    """Tell whether a source is a training's folder or a repository in the cache.

    Parameters
    ----------
    source
        The folder.

    Returns
    -------
    bool
        Whether it has such folders in it.
    """
    return _cached(source) or any(_steps_folders(source))


def _cached(source: Path) -> bool:
    return (source / "snapshots").is_dir() and (source / "refs").is_dir()


def _steps_folders(source: Path) -> list[Path]:
    return [folder for folder in sorted(source.glob(_PATTERN)) if folder.is_dir() and weights_file(folder) is not None]


def find(source: Path) -> Source:
    """Find the checkpoints.

    Parameters
    ----------
    source
        The folder.

    Returns
    -------
    Source
        Every checkpoint with weights and a number.

    Raises
    ------
    UsageError
        If there are none.
    """
    found = _of_cache(source) if _cached(source) else _of_training(source)
    if not found.checkpoints:
        notes = f" ({'; '.join(found.notes)})" if found.notes else ""
        message = (
            f"{source}: expected folders {_PATTERN} with model.safetensors or pytorch_model.bin, or a repository of "
            f"the hub's cache with numbered revisions such as step1000; found none{notes}"
        )
        raise UsageError(message)
    return found


def _of_training(source: Path) -> Source:
    checkpoints, notes = [], []
    for folder in sorted(source.glob(_PATTERN)):
        file = weights_file(folder) if folder.is_dir() else None
        named = number_in(folder.name)
        if file is None:
            adapter = (folder / "adapter_model.safetensors").is_file()
            notes.append(f"{folder.name} holds {'an adapter alone' if adapter else 'no weights'} and is left out")
            continue
        step, epoch = _trainer_state(folder)
        if step is None:
            step = named
        if step is None:
            notes.append(f"{folder.name} does not tell its number of updates and is left out")
            continue
        if named is not None and named != step:
            notes.append(f"{folder.name} is after {step} updates by its own trainer_state.json")
        checkpoints.append(Found(step=step, path=folder, open=functools.partial(open_file, file), epoch=epoch))
    return Source(kind=KIND, checkpoints=tuple(checkpoints), notes=tuple(notes))


def _trainer_state(folder: Path) -> tuple[int | None, int]:
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None, 0
    if not isinstance(state, dict):
        return None, 0
    epochs = state.get("epoch")
    # A fraction of epochs done; the one it is in counts from 1.
    return whole_number(state, "global_step"), int(epochs) + 1 if isinstance(epochs, int | float) else 0


def _of_cache(source: Path) -> Source:
    checkpoints, unnumbered, empty = [], [], []
    refs = source / "refs"
    for ref in sorted(path for path in refs.rglob("*") if path.is_file()):
        revision = ref.relative_to(refs).as_posix()
        folder = source / "snapshots" / ref.read_text(encoding="utf-8").strip()
        step, file = number_in(revision), weights_file(folder)
        if step is None or revision.startswith("pr/"):
            unnumbered.append(revision)
        elif file is None:
            empty.append(revision)
        else:
            checkpoints.append(Found(step=step, path=folder, open=functools.partial(open_file, file)))
    notes = []
    if unnumbered:
        notes.append(f"left out, for their names have no number of updates: revisions {', '.join(unnumbered)}")
    if empty:
        notes.append(f"left out, for their weights were not downloaded: revisions {', '.join(empty)}")
    return Source(kind=KIND, checkpoints=tuple(checkpoints), notes=tuple(notes))
