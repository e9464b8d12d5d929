"""Files of a run that are written once: tensors without a gradient, the optimizer's state at the first step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from recorder import tensorfile
from recorder.errors import DamagedFileError
from recorder.manifest import FORMAT, VERSION

UNTRAINED_FILE = "untrained.safetensors"


def optimizer_file(attempt: int) -> str:
    """Name the file of the optimizer's state at the first step of an attempt.

    Parameters
    ----------
    attempt
        Its number.

    Returns
    -------
    str
        The file's name in the run's folder.
    """
    return "optimizer.safetensors" if attempt == 1 else f"optimizer-{attempt:03d}.safetensors"


def once(kind: str, run_id: str) -> dict[str, Any]:
    """Make the facts of a file of what is recorded once.

    Parameters
    ----------
    kind
        ``untrained`` or ``optimizer``.
    run_id
        The run it belongs to.

    Returns
    -------
    dict
        For its header.
    """
    return {"format": FORMAT, "version": VERSION, "kind": kind, "run_id": run_id}


def open_once(path: Path, kind: str, run_id: str) -> tensorfile.TensorFile:
    """Open a file of what is recorded once.

    Parameters
    ----------
    path
        The file.
    kind
        ``untrained`` or ``optimizer``.
    run_id
        The run it must belong to.

    Returns
    -------
    TensorFile
        The file.

    Raises
    ------
    DamagedFileError
        If it is of another kind, format, version or run.
    """
    file = tensorfile.TensorFile(path)
    expected = once(kind, run_id)
    found = {key: file.facts.get(key) for key in expected}
    if found != expected:
        message = f"{path}: expected {expected}, found {found}: another file under this name"
        raise DamagedFileError(message)
    return file


def write_optimizer_state(run: Path, run_id: str, state: Mapping[int, Mapping[str, Any]], attempt: int) -> None:
    """Write an optimizer's state, tensors and plain numbers.

    Parameters
    ----------
    run, run_id
        The run's folder, and its identity.
    state
        As ``optimizer.state_dict()["state"]``.
    attempt
        The attempt that begins with it.
    """
    tensors = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, entries in state.items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}/{key}"] = value.detach().cpu()
            else:
                scalars.setdefault(str(index), {})[key] = value
    tensorfile.write(run / optimizer_file(attempt), tensors, {**once("optimizer", run_id), "scalars": scalars})
