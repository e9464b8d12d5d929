"""A run opened for replay: made whole, with steps, and with all that its loss depends on."""

from __future__ import annotations

from pathlib import Path

from recorder import chordrun, commandline
from recorder.errors import UsageError
from recorder.recovery import recover
from recorder.runformat import Run


def open_run(path: Path) -> Run:
    """Open a run; what a killed training left in the making is made whole before.

    Parameters
    ----------
    path
        The run's folder.

    Returns
    -------
    Run
        The run.

    Raises
    ------
    UsageError
        If it holds no step yet, or its loss cannot be replayed.
    """
    recovered = recover(path)
    if recovered:
        commandline.say(f"{path}: recovered {recovered}, which a killed training left in the making")
    run = chordrun.open_run(path)
    if not run.steps:
        message = f"{path} holds no recorded step yet (state: {run.manifest.state})"
        raise UsageError(message)
    refuse_unrecorded_changes(run)
    return run


def refuse_unrecorded_changes(run: Run) -> None:
    """Make sure that all that changed in training was recorded.

    Parameters
    ----------
    run
        The run.

    Raises
    ------
    UsageError
        If something changed that no step records.
    """
    if run.manifest.unrecorded_changes:
        message = (
            f"{run.path}: {', '.join(run.manifest.unrecorded_changes)} changed in training although no step records "
            "them: buffers such as the statistics of batch normalisation, or parameters of an optimizer that was not "
            "watched. Without them the loss cannot be replayed"
        )
        raise UsageError(message)
