"""`watch`: record every optimizer step of a training loop, without changing the training.

The optimizer's own hooks say when a step happens, so nothing of the loop is replaced.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from recorder import durable
from recorder.errors import UsageError
from recorder.manifest import Trainer
from recorder.recording import Batches, Recording

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

SEGMENT_STEPS = 16
"""Steps to a segment: its start is stored twice, so 16 costs 6 % more than every step once."""


def watch(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    run: Path | str,
    workload: str | None = None,
    batches: Batches = "tensors",
    first_step: int = 0,
    segment_steps: int = SEGMENT_STEPS,
    strict: bool = False,
    trainer: Trainer | None = None,
) -> Recording:
    """Record every step of an optimizer into a run.

    A step is what the optimizer does: where a gradient scaler skips an update, no step is recorded, and the loop calls
    `Recording.forget_pending` to drop the micro-batches announced for it.

    Parameters
    ----------
    model
        The model in training; its named parameters become the parameter table.
    optimizer
        Any torch optimizer over parameters of `model`.
    run
        The folder to make. It must not exist, or be empty.
    workload
        ``module:function`` that returns the `recorder.workload.Workload` from which replay rebuilds model, batches
        and loss. Nothing is imported from it now.
    batches
        ``tensors`` stores the micro-batches given to `Recording.batch`; ``indices`` only their checksums.
    first_step
        Number of updates made before.
    segment_steps
        Steps to a segment. So many steps are held in memory, and lost by a kill.
    strict
        Raise the recorder's own errors instead of warning and going on unrecorded.
    trainer
        Set by integrations.

    Returns
    -------
    Recording
        A context manager; announce each micro-batch to its method ``batch``.

    Raises
    ------
    UsageError
        If the folder is not empty, or an argument makes no sense.

    Examples
    --------
    In a training loop::

        with recorder.watch(model, optimizer, run="runs/x", workload="my_project:workload") as rec:
            for batch in loader:
                rec.batch(batch["id"], batch)
                loss(model(batch)).backward()
                optimizer.step()
                optimizer.zero_grad()
    """
    if batches not in {"tensors", "indices"}:
        message = f"batches is 'tensors' or 'indices', not {batches!r}"
        raise UsageError(message)
    if segment_steps < 1:
        message = f"segment_steps is at least 1, not {segment_steps}"
        raise UsageError(message)
    folder = empty_folder(run)
    return Recording(
        model,
        optimizer,
        run=folder,
        workload=workload,
        trainer=trainer or Trainer(name="torch", version=str(torch.__version__)),
        batches=batches,
        first_step=first_step,
        segment_steps=segment_steps,
        strict=strict,
    )


def empty_folder(run: Path | str) -> Path:
    """Make the folder of a new run, refusing one that holds anything.

    Parameters
    ----------
    run
        The folder.

    Returns
    -------
    Path
        The folder, which exists now.

    Raises
    ------
    UsageError
        If it is not empty or cannot be made.
    """
    folder = Path(run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"the run folder {folder} cannot be made: {error.strerror}"
        raise UsageError(message) from error
    durable.sweep(folder)
    if any(folder.iterdir()):
        message = f"{folder} is not empty; a run is never overwritten. Give another folder, or remove this one"
        raise UsageError(message)
    return folder
