"""What is recorded of one optimizer step besides the parameters: its micro-batches, losses, learning rates."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch

from recorder import batches

RANDOM_STATES = ("rng_cpu", "rng_cuda")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """One forward and backward pass of a step.

    Parameters
    ----------
    indices
        Its examples' indices in the training data set, int64 of shape (examples,); empty where the data has none.
    nest
        The batch as JSON types, its tensors replaced by their paths; None where no batch was given.
    tensors
        Path to tensor in host memory; empty where only indices are recorded.
    checksums
        Path to CRC-32 of the tensor's bytes, also where the tensors themselves are not stored.
    random_state
        States of torch's generators just before the forward pass, by the names of `RANDOM_STATES`.
    loss_sum
        The loss as training measured it, summed over predictions, in nats; None where it is not known.
    predictions
        Number of predictions; None where it is not known.
    rank
        The process that ran it, in data-parallel training.
    """

    indices: torch.Tensor
    nest: Any = None
    tensors: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    checksums: Mapping[str, int] = dataclasses.field(default_factory=dict)
    random_state: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    loss_sum: float | None = None
    predictions: float | None = None
    rank: int = 0

    @property
    def stored(self) -> bool:
        """Whether the micro-batch can be rebuilt from the run alone."""
        return self.nest is not None and set(self.tensors) == set(self.checksums)

    def batch(self) -> Any:
        """Rebuild the micro-batch from its recorded tensors.

        Returns
        -------
        Any
            The batch as the training's loss received it, in host memory.
        """
        return batches.put_together(self.nest, lambda path: self.tensors[path])

    def set_random_state(self, device: torch.device) -> None:
        """Set torch's generators to where they were just before the micro-batch's forward pass.

        Parameters
        ----------
        device
            Where the model is: that of a GPU has a generator of its own.
        """
        set_random_state(self.random_state, device)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What is recorded of one optimizer step besides the parameters.

    Parameters
    ----------
    step
        t, the update θ_t → θ_{t+1}.
    epoch
        The training's epoch, from 1.
    seed
        ``torch.initial_seed()`` in force.
    learning_rates
        One for each parameter group, as used in this step.
    micro_batches
        In the order of their forward passes; in data-parallel training those of the first process, then the next's.
    gradient_norm
        Norm of the gradient that the optimizer used, over all parameters; recorded for the first steps only, where
        replay does an update again.
    updates
        Of an interval between two checkpoints far apart: after how many updates they were taken. None for one update.
    """

    step: int
    epoch: int
    seed: int
    learning_rates: tuple[float, ...]
    micro_batches: tuple[MicroBatch, ...]
    gradient_norm: float | None = None
    updates: tuple[int, int] | None = None

    @property
    def first_update(self) -> int:
        """How many updates had been done when it began."""
        return self.step if self.updates is None else self.updates[0]

    @property
    def predictions(self) -> float:
        """Predictions of the whole update, NaN where a micro-batch's number is not known."""
        counts = [micro_batch.predictions for micro_batch in self.micro_batches]
        return math.nan if None in counts else float(sum(count for count in counts if count is not None))


def set_random_state(random_state: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Set torch's generators to recorded states.

    Parameters
    ----------
    random_state
        By the names of `RANDOM_STATES`; a `KeyError` tells where the device's is missing.
    device
        Where the model is: that of a GPU has a generator of its own.
    """
    torch.set_rng_state(random_state["rng_cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(random_state["rng_cuda"], device)


def take_apart(step: Step) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Split a step into its row, as JSON types, and its tensors.

    Parameters
    ----------
    step
        The step; its micro-batches are of one process.

    Returns
    -------
    row : dict
        For `put_together`.
    tensors : dict of str to torch.Tensor
        By their names in a segment.
    """
    tensors = {}
    for position, micro_batch in enumerate(step.micro_batches):
        prefix = f"{step.step:08d}/{position}"
        tensors[f"indices/{prefix}"] = micro_batch.indices
        tensors |= {f"{name}/{prefix}": state for name, state in micro_batch.random_state.items()}
        tensors |= {f"batches/{prefix}/{path}": tensor for path, tensor in micro_batch.tensors.items()}
    row = {
        "step": step.step,
        "epoch": step.epoch,
        "seed": step.seed,
        "learning_rates": [_number_to_json(rate) for rate in step.learning_rates],
        "gradient_norm": _number_to_json(step.gradient_norm),
        "micro_batches": [
            {
                "nest": micro_batch.nest,
                "checksums": dict(micro_batch.checksums),
                "loss_sum": _number_to_json(micro_batch.loss_sum),
                "predictions": _number_to_json(micro_batch.predictions),
            }
            for micro_batch in step.micro_batches
        ],
    }
    return row, tensors


def put_together(row: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], rank: int) -> Step:
    """Rebuild a step from what `take_apart` gave.

    Parameters
    ----------
    row
        The JSON object.
    tensors
        By their names in a segment.
    rank
        The process whose micro-batches they are.

    Returns
    -------
    Step
        The step.
    """
    micro_batches = []
    for position, entry in enumerate(row["micro_batches"]):
        prefix = f"{row['step']:08d}/{position}"
        stored = f"batches/{prefix}/"
        micro_batches.append(
            MicroBatch(
                indices=tensors[f"indices/{prefix}"],
                nest=entry["nest"],
                tensors={path: tensors[stored + path] for path in entry["checksums"] if stored + path in tensors},
                checksums=entry["checksums"],
                random_state={
                    name: tensors[f"{name}/{prefix}"] for name in RANDOM_STATES if f"{name}/{prefix}" in tensors
                },
                loss_sum=_number_from_json(entry["loss_sum"]),
                predictions=_number_from_json(entry["predictions"]),
                rank=rank,
            )
        )
    return Step(
        step=row["step"],
        epoch=row["epoch"],
        seed=row["seed"],
        learning_rates=tuple(float(rate) for rate in row["learning_rates"]),
        gradient_norm=_number_from_json(row["gradient_norm"]),
        micro_batches=tuple(micro_batches),
    )


def _number_to_json(number: float | None) -> float | str | None:
    # JSON has no NaN and no infinity; a diverged training has both.
    return number if number is None or math.isfinite(number) else repr(number)


def _number_from_json(number: float | str | None) -> float | None:
    return float(number) if isinstance(number, str) else number
