"""Load the workload of a run, and import what it names only if the user says so.

A run is data: opening one executes nothing of it.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from recorder.errors import UsageError
from recorder.manifest import Manifest
from recorder.workload import Workload


def load_workload(run: Path, manifest: Manifest, choice: str | None, data: str | None) -> Workload:
    """Build the workload of a run.

    Parameters
    ----------
    run
        The run's folder.
    manifest
        Its manifest.
    choice
        ``module:function``, or ``recorded`` for the one the manifest names; None where the run needs none.
    data
        Where the training data is now, for trainers whose arguments name a place.

    Returns
    -------
    Workload
        The workload.

    Raises
    ------
    UsageError
        If one is needed and none is chosen, or none is named.
    """
    if manifest.trainer.name == "fairseq" and manifest.workload is None and choice in {None, "recorded"}:
        from recorder.integrations.fairseq_workload import FairseqWorkload

        return FairseqWorkload(run, manifest.trainer, data=data, run_user_code=choice == "recorded")
    if choice is None:
        remedy = (
            f"--workload {manifest.workload} (or --workload recorded)"
            if manifest.workload
            else "--workload module:function"
        )
        message = (
            "a run is data, and nothing it names is imported unless you say so; to rebuild model, batches and loss "
            f"pass {remedy}"
        )
        raise UsageError(message)
    name = manifest.workload if choice == "recorded" else choice
    if name is None:
        message = "--workload recorded: the run names no workload; pass --workload module:function"
        raise UsageError(message)
    return named_workload(name)


def named_workload(name: str) -> Workload:
    """Import a workload that the user names, and build it.

    Parameters
    ----------
    name
        ``module:function``.

    Returns
    -------
    Workload
        The workload.

    Raises
    ------
    UsageError
        If it cannot be imported or is no workload.
    """
    workload = _import_factory(name)()
    if not isinstance(workload, Workload):
        message = (
            f"{name} returned {type(workload).__name__}, which lacks one of the methods model, indices, batch, loss"
        )
        raise UsageError(message)
    return workload


def _import_factory(name: str) -> Any:
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        message = f"--workload expects module:function, got {name!r}"
        raise UsageError(message)
    if str(Path.cwd()) not in sys.path:
        # python -m puts the working folder there; the installed lossledger-replay does not.
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        message = f"--workload {name}: {error}. Run from the folder that the training was started in, or set PYTHONPATH"
        raise UsageError(message) from error
    if not hasattr(module, function_name):
        message = f"--workload {name}: module {module_name!r} has no function {function_name!r}"
        raise UsageError(message)
    return getattr(module, function_name)
