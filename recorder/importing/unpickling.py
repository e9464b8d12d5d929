"""Pickle files opened without running anything that they bring along.

``torch.load(weights_only=True)`` builds tensors and plain Python values, and refuses every other object; fairseq's
checkpoints also hold ``argparse.Namespace``, which is plain data.
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from recorder.errors import UsageError
from recorder.importing.weights import InMemory, indexed_files

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")

_KEYS = ("state_dict", "model", "model_state_dict", "module", "weights")
"""Where loops of many kinds put the weights of their model, in the order in which they are looked for."""


def load(path: Path) -> Any:
    """Load a pickle file that torch wrote; nothing that it names is imported or called.

    Parameters
    ----------
    path
        The file.

    Returns
    -------
    Any
        Tensors, in host memory, among plain values.

    Raises
    ------
    UsageError
        If it holds other objects, or cannot be read.
    """
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return _load(path)
        except pickle.UnpicklingError as error:
            message = (
                f"{path}: was not loaded: it holds more than tensors and plain values, or is no file of torch.save, "
                f"and loading that could run code of whoever made it ({_first_line(error)}). Where you trust the file, "
                "save its weights alone: torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW)"
            )
            raise UsageError(message) from error
        except (OSError, RuntimeError, EOFError, ValueError) as error:
            message = f"{path}: cannot be read as a file of torch.save ({_first_line(error)})"
            raise UsageError(message) from error


def _load(path: Path) -> Any:
    # Mapped, so that of a checkpoint with optimizer state only the weights are read. torch before 1.6 wrote files that
    # cannot be mapped.
    mapped = _is_zip(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped or None)


def _is_zip(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # torch's text gives advice first, and what was found after it.
    told = [line for line in lines if "GLOBAL" in line or "Unsupported" in line or "WeightsUnpickler error" in line]
    return " ".join((told or lines or [type(error).__name__])[:1])[:300]


def state_dict(document: Any, path: Path, keys: tuple[str, ...] = _KEYS) -> dict[str, torch.Tensor]:
    """Find the model's weights in what a file was loaded to.

    Parameters
    ----------
    document
        What `load` returned.
    path
        The file, for errors.
    keys
        Under which entries the weights may stand.

    Returns
    -------
    dict of str to torch.Tensor
        Name to tensor.

    Raises
    ------
    UsageError
        If there are none, or several groups of tensors and no way to tell which are the model's.
    """
    if not isinstance(document, Mapping):
        message = f"{path}: expected a dictionary of tensors, found {type(document).__name__}"
        raise UsageError(message)
    if _tensors(document):
        return _tensors(document)
    groups = {key: _tensors(value) for key, value in document.items() if isinstance(value, Mapping)}
    groups = {key: tensors for key, tensors in groups.items() if tensors}
    chosen = next((key for key in keys if key in groups), None)
    if chosen is None and len(groups) == 1:
        chosen = next(iter(groups))
    if chosen is None:
        found = ", ".join(map(repr, groups or document)) or "nothing"
        message = f"{path}: expected the model's tensors under one of {', '.join(keys)}, found {found}"
        raise UsageError(message)
    return groups[chosen]


def _tensors(document: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in document.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}


def pickled(path: Path, keys: tuple[str, ...] = _KEYS) -> InMemory:
    """Open the weights of a pickle file.

    Parameters
    ----------
    path
        The file, or the index of several.
    keys
        As for `state_dict`.

    Returns
    -------
    InMemory
        The weights.
    """
    files = indexed_files(path) if path.suffix == ".json" else (path,)
    return InMemory(files, tuple(state_dict(load(file), file, keys) for file in files))
