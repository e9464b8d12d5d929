"""`watch`: record every optimizer step of a training loop, without changing the training.

The optimizer's own hooks say when a step happens, so nothing of the loop is replaced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from recorder.errors import UsageError
from recorder.lock import RunLock
from recorder.manifest import Trainer
from recorder.modelbuffers import ModelBuffers
from recorder.patterns import select_names
from recorder.processes import in_all, in_first, this_process
from recorder.recording import Batches, Recording
from recorder.runfolder import RunFolder, Settings
from recorder.selection import StepSelection
from recorder.sharded import refuse_what_cannot_be_gathered
from recorder.telling import LOG, tell_on_the_terminal
from recorder.usermap import read_map
from recorder.watched import Watched

if TYPE_CHECKING:
    from torch import nn

    from recorder.usermap import Map, UserMap


def watch(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    run: Path | str,
    workload: str | None = None,
    batches: Batches = "store",
    steps: str = "all",
    parameters: Sequence[str] = (),
    map: Map | UserMap | None = None,  # noqa: A002 (the same word as in `python -m recorder map`)
    quota: int | None = None,
    updates: int | None = None,
    masters: Mapping[str, torch.Tensor] | None = None,
    first_step: int = 0,
    segment_steps: int | None = None,
    strict: bool = False,
    trainer: Trainer | None = None,
    files: Mapping[str, Path] | None = None,
) -> Recording:
    """Record every step of an optimizer into a run.

    A step is what the optimizer does: where a gradient scaler skips an update, no step is recorded.

    A folder that holds a run is taken up again, by a training restarted from its checkpoint: its parameters must be
    those recorded at `first_step`, redone steps replace the old ones, and the old attempt is kept.

    In data-parallel training every process calls it, after ``init_process_group``: process 0 records the parameters,
    each its micro-batches. Parameters sharded by ``fully_shard`` are gathered at every recorded step, up to
    `recorder.sharded.GATHERED_BYTES`; while gradients gather in shards, the recorder cannot see that a gradient scaler
    skipped an update: call `Recording.forget_pending` then.

    Parameters
    ----------
    model
        The model in training; its named parameters become the parameter table. A DistributedDataParallel wrapper is
        looked through.
    optimizer
        Any torch optimizer over parameters of `model`. A wrapper that steps it, as accelerate's, is looked through.
    run
        The folder to make, or the run to go on with.
    workload
        ``module:function`` that returns the `recorder.workload.Workload` from which replay rebuilds model, batches
        and loss. Nothing is imported from it now.
    batches
        ``store`` keeps the tensors of the micro-batches given to `Recording.batch`; ``indices`` only their checksums.
    steps
        Which steps to record: ``all``, or windows, strides and log-spaced windows (`recorder.selection`). Both ends of
        a step that is kept are recorded.
    parameters
        Which parameters to record: shell patterns over their names, with ``!`` before those to leave out; all by
        default. What is left out must not change, or the run cannot be replayed.
    map
        Which parameter is which, for a model that lossledger does not know: a TOML file of naming rules, or a function
        (`recorder.usermap.read_map`, docs/maps.md). It comes before the package's own rules.
    quota
        Bytes that the run's folder may have; before it would have more, recording ends and training goes on. Of
        several processes none knows the last micro-batches of the others: up to a segment of them may come on top.
    updates
        Where the training is planned to end; only for the estimate of the run's size in the first log line.
    masters
        In 16-bit training with float32 masters kept by the loop: parameter name to the tensor that the optimizer
        updates, in the parameter's shape (a view of a flat one, too). They are recorded instead.
    first_step
        Number of updates made before.
    segment_steps
        Steps to a segment, 64 by default and 128 for 16-bit parameters. A damaged file costs so many at most.
    strict
        Raise the recorder's own errors instead of warning and going on unrecorded.
    trainer, files
        Set by integrations: the training program, and what it needs to be rebuilt, name to path.

    Returns
    -------
    Recording
        A context manager; announce each micro-batch to its method ``batch``.

    Raises
    ------
    UsageError
        If the folder holds something else, is being recorded into, or an argument makes no sense.

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
    if batches not in get_args(Batches):
        message = f"batches is 'store' or 'indices', not {batches!r}"
        raise UsageError(message)
    for name, value in (("segment_steps", segment_steps), ("quota", quota)):
        if value is not None and value < 1:
            message = f"{name} is at least 1, not {value}"
            raise UsageError(message)
    if isinstance(model, DistributedDataParallel):
        model = model.module
    optimizer = _that_tells_its_steps(optimizer)
    selection = StepSelection(steps)
    user_map = None if map is None else read_map(map)
    names = [name for name, _ in model.named_parameters()]
    left_out = set(names) - select_names(names, parameters)
    if len(left_out) == len(names):
        message = f"parameters={list(parameters)} leaves out every parameter of the model"
        raise UsageError(message)
    settings = Settings(
        batches=batches,
        steps=selection.text,
        workload=workload,
        trainer=trainer or Trainer(name="torch", version=str(torch.__version__)),
        files=files or {},
        map=None if user_map is None else user_map.provenance(),
    )
    kept = {name: tensor for name, tensor in model.named_parameters() if name not in left_out}
    refuse_what_cannot_be_gathered(model, optimizer, kept)
    tell_on_the_terminal()
    watched = Watched(model, optimizer, left_out=left_out, masters=masters, user_map=user_map)
    try:
        folder, lock = _opened_together(Path(run), settings, first_step)
    except Exception:
        watched.release()
        raise
    if folder is not None and folder.recovered:
        LOG.info("recovered %s, which a killed training left in the making", folder.recovered)
    return Recording(
        watched,
        ModelBuffers(model),
        optimizer,
        folder,
        lock=lock,
        run=Path(run),
        steps=selection,
        batches=batches,
        quota=quota,
        updates=updates,
        first_step=first_step,
        segment_steps=segment_steps,
        strict=strict,
    )


def _that_tells_its_steps(optimizer: Any) -> Optimizer:
    # A wrapper may be called an Optimizer without having been made as one, and then has no hooks.
    found = optimizer
    while not (isinstance(found, Optimizer) and hasattr(found, "_optimizer_step_post_hooks")):
        inner = getattr(found, "optimizer", None)
        if inner is None or inner is found:
            kind = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
            message = (
                f"expected a torch optimizer, or a wrapper with one as its attribute optimizer; found a {kind}, which "
                "has no hooks that tell when it steps: pass the torch optimizer that updates the parameters"
            )
            raise UsageError(message)
        found = inner
    return found


def _opened_together(run: Path, settings: Settings, first_step: int) -> tuple[RunFolder | None, RunLock | None]:
    # A refusal reaches every process; alone, the others would wait for this one in the training's next exchange.
    folders: list[RunFolder] = []
    in_first(lambda: folders.append(RunFolder(run, settings, first_step)))
    folder = folders[0] if folders else None
    rank, _ = this_process()
    try:
        return folder, in_all(lambda: RunLock(run, rank) if rank else None)
    except UsageError:
        if folder is not None:
            folder.release()
        raise
