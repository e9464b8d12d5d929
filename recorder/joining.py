"""A training that goes on with a run: whether it stands where the run was, and what it takes over from the run's table.

A restarted training must have, bit for bit, the parameters that the run recorded at the step it goes on with.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from recorder import tensorfile
from recorder.errors import JoinError, UsageError
from recorder.ranges import describe_ranges
from recorder.table import place_of, with_place
from recorder.telling import LOG

if TYPE_CHECKING:
    from recorder.manifest import Manifest
    from recorder.runformat import Run
    from recorder.table import Parameter
    from recorder.watched import Watched


def join(before: Run, watched: Watched, first_step: int, step: int, *, own_map: bool) -> str:
    """Compare a training's parameters with those that the run recorded, and let its table go on from the run's.

    Parameters
    ----------
    before
        The run as it is.
    watched
        Model and optimizer, their table settled; it gets what the run knows.
    first_step
        The first step of the attempt.
    step
        The first step of it that is selected, which is about to be made.
    own_map
        Whether the training was given a map of its own.

    Returns
    -------
    str
        What was verified, for the attempt's ``joined``.

    Raises
    ------
    JoinError
        If the parameters are not those that the run recorded at this step.
    """
    merged = _merged(before.path, before.manifest.parameters, watched.table)
    watched.table = _places(merged, before.manifest, own_map=own_map)
    once = before.untrained()
    constant = {
        name: tensor
        for name, tensor in watched.copies(trained=False).items()
        if name in once and name in watched.frozen
    }
    recorded: dict[str, torch.Tensor] = {}
    if not before.steps:
        joined = "not verified: no step was recorded before"
    elif step != first_step:
        joined = f"not verified: step {first_step}, where the training went on, is not among the steps to record"
    else:
        try:
            recorded = before.parameters(first_step)
            joined = "verified"
        except UsageError:
            held = describe_ranges(before.consecutive)
            joined = f"not verified: the run holds no parameters of step {first_step}, it holds {held}"
    rounded = {row.name: getattr(torch, row.model_dtype) for row in watched.table if row.model_dtype}
    # The master of an untrained tensor may decay.
    live = {name: tensor for name, tensor in constant.items() if name not in rounded}
    live |= watched.copies(trained=True) if recorded else {}
    known = {**once, **recorded}
    different = _different(live, known)
    if different and rounded and recorded:
        # A checkpoint of 16-bit training may hold the model and not its masters, which then come back rounded.
        joined = "verified within the rounding of 16 bits"
        live, known = (
            {name: tensor.to(rounded.get(name, tensor.dtype)) for name, tensor in tensors.items()}
            for tensors in (live, known)
        )
        different = _different(live, known)
    if different:
        message = (
            f"{before.path}: this training does not go on where the run was at step {first_step}: "
            f"{len(different)} of {len(live)} parameters differ from the recorded ones, first {different[0]!r}. "
            "Restart from a checkpoint of the recorded training and give its number of updates as first_step, "
            "or record into another folder"
        )
        raise JoinError(message)
    return joined


def _places(live: tuple[Parameter, ...], found: Manifest, *, own_map: bool) -> tuple[Parameter, ...]:
    # A map corrected afterwards stands above the one that the training was started with, and is not undone by a
    # restart; nor is one that was given only the first time.
    keeps = found.correction is not None or ("map" in found.provenance and not own_map)
    if not keeps:
        return live
    kept = tuple(with_place(new, place_of(old)) for old, new in zip(found.parameters, live, strict=True))
    if kept != live:
        source = found.provenance["map"]["source"] if found.correction is None else found.correction.source
        LOG.info("which parameter is which stays as the run has it, by %s (python -m recorder map)", source)
    return kept


def _different(live: Mapping[str, torch.Tensor], recorded: Mapping[str, torch.Tensor]) -> list[str]:
    return [
        name
        for name, tensor in live.items()
        if name in recorded and tensorfile.content(tensor) != tensorfile.content(recorded[name])
    ]


def _merged(path: Path, recorded: tuple[Parameter, ...], live: tuple[Parameter, ...]) -> tuple[Parameter, ...]:
    if [(row.name, row.shape, row.dtype) for row in recorded] != [(row.name, row.shape, row.dtype) for row in live]:
        message = f"{path}: the model's parameters have other names, shapes or dtypes than those of the run"
        raise JoinError(message)
    # What an attempt found to be trained stays so.
    return tuple(
        old if old.trained and new.status == "untrained" else new for old, new in zip(recorded, live, strict=True)
    )
