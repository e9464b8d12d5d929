"""Dropout: off, or as in the training, from the recorded states of the random generators."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from recorder.errors import UsageError
from recorder.steps import set_random_state

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from recorder.runformat import Run

RandomStates = Sequence[Mapping[str, torch.Tensor]]
"""For every micro-batch the states of torch's generators before its forward pass (`MicroBatch.random_state`)."""

OFF = "off"
RECORDED = "recorded"


@contextmanager
def as_recorded(model: nn.Module, states: RandomStates, device: torch.device) -> Iterator[Callable[[int], None]]:
    """Put a model into training mode, and draw in every forward pass what the recorded one drew.

    So the loss is one fixed function of the parameters, and its gradient at θ_t is the one that the optimizer saw.
    Afterwards the model's buffers and the process's random generators are as before.

    Parameters
    ----------
    model
        The model, in evaluation mode as before and after.
    states
        What to draw from.
    device
        Where the model is.

    Yields
    ------
    callable
        To be called with the position of each micro-batch before its forward pass.
    """
    model.train()
    # Batch normalisation moves its running statistics in training mode. They are put back only at the end: in the
    # training, too, a micro-batch found them as the one before had left them.
    before = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else [], device_type="cuda"):
            yield lambda position: set_random_state(states[position], device)
    finally:
        for name, (buffer, value) in before.items():
            owner, _, own_name = name.rpartition(".")
            # A module may also have put another tensor in the buffer's place.
            setattr(model.get_submodule(owner), own_name, buffer)
            buffer.copy_(value)
        model.eval()


def refuse_if_not_recorded(run: Run, device: str) -> None:
    """Make sure that the run can tell what its dropout drew, and that a device can draw it again.

    Parameters
    ----------
    run
        The run.
    device
        ``cpu`` or ``cuda``: where replay computes.

    Raises
    ------
    UsageError
        If the training ran on another kind of device, or recorded no states of the random generators.
    """
    trained_on = str(run.manifest.recipe["device"])
    if trained_on != device:
        message = (
            f"--dropout recorded: the training drew its random numbers on {trained_on}, and {device} draws others from "
            f"the same state; pass --device {trained_on}, or --dropout off"
        )
        raise UsageError(message)
    first = run.step(run.steps[0])
    needed = {"rng_cpu", "rng_cuda"} if device == "cuda" else {"rng_cpu"}
    for position, micro_batch in enumerate(first.micro_batches):
        missing = sorted(needed - set(micro_batch.random_state))
        if missing:
            message = (
                f"--dropout recorded: {run.path}, step {first.step}, micro-batch {position} lacks the recorded state "
                f"{missing[0]!r} of the random generators; pass --dropout off"
            )
            raise UsageError(message)
