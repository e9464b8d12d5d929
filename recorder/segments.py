"""Segments: consecutive steps of a run in one immutable file.

    RUN/segments/00000000-00000016.safetensors     steps 0 to 15: parameters θ_0 ... θ_16, batches, losses

Part of the run format (docs/formats/run.md). A segment holds its first parameters although the one before ends with
them, so that each can be read, moved or lost alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from recorder import batches, tensorfile
from recorder.errors import FormatError
from recorder.manifest import FORMAT, VERSION

SEGMENTS_FOLDER = "segments"
RANDOM_STATES = ("rng_cpu", "rng_cuda")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """One forward and backward pass of a step.

    Parameters
    ----------
    indices
        Its examples' indices in the training data set, int64 of shape (examples,).
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
    """

    indices: torch.Tensor
    nest: Any = None
    tensors: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    checksums: Mapping[str, int] = dataclasses.field(default_factory=dict)
    random_state: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    loss_sum: float | None = None
    predictions: float | None = None

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
        In the order of their forward passes.
    gradient_norm
        Norm of the gradient that the optimizer used, over all parameters; recorded for the first steps only, where
        replay does an update again.
    """

    step: int
    epoch: int
    seed: int
    learning_rates: tuple[float, ...]
    micro_batches: tuple[MicroBatch, ...]
    gradient_norm: float | None = None

    @property
    def predictions(self) -> float:
        """Predictions of the whole update, NaN where a micro-batch's number is not known."""
        counts = [micro_batch.predictions for micro_batch in self.micro_batches]
        return math.nan if None in counts else float(sum(count for count in counts if count is not None))


def segment_file(run: Path, start: int, stop: int) -> Path:
    """Return the path of the segment of steps `start` to `stop` - 1.

    Parameters
    ----------
    run
        The run's folder.
    start, stop
        The range of steps.

    Returns
    -------
    Path
        The segment's path, whether or not it exists.
    """
    return run / SEGMENTS_FOLDER / f"{start:08d}-{stop:08d}.safetensors"


def write_segment(run: Path, parameters: Sequence[Mapping[str, torch.Tensor]], steps: Sequence[Step]) -> Path:
    """Write consecutive steps as one segment, durably and all at once.

    Parameters
    ----------
    run
        The run's folder.
    parameters
        θ at the start of the first step and after each step: one more than `steps`. A parameter that is not in
        the first ones received its first gradient on the way.
    steps
        The steps, consecutive.

    Returns
    -------
    Path
        The segment's file.
    """
    start, stop = steps[0].step, steps[-1].step + 1
    tensors: dict[str, torch.Tensor] = {}
    rows = []
    for number, theta in enumerate(parameters):
        for name, tensor in theta.items():
            tensors[f"parameters/{start + number:08d}/{name}"] = tensor
    for step in steps:
        rows.append(_step_to_dict(step))
        for position, micro_batch in enumerate(step.micro_batches):
            prefix = f"{step.step:08d}/{position}"
            tensors[f"indices/{prefix}"] = micro_batch.indices
            for name, state in micro_batch.random_state.items():
                tensors[f"{name}/{prefix}"] = state
            for path, tensor in micro_batch.tensors.items():
                tensors[f"batches/{prefix}/{path}"] = tensor
    file = segment_file(run, start, stop)
    facts = {"format": FORMAT, "version": VERSION, "start": start, "stop": stop, "steps": rows}
    tensorfile.write(file, tensors, facts)
    return file


def _step_to_dict(step: Step) -> dict[str, Any]:
    return {
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


def _number_to_json(number: float | None) -> float | str | None:
    # JSON has no NaN and no infinity; a diverged training has both.
    return number if number is None or math.isfinite(number) else repr(number)


def _number_from_json(number: float | str | None) -> float | None:
    return float(number) if isinstance(number, str) else number


class Segment:
    """One segment, opened for reading.

    Parameters
    ----------
    path
        The segment's file; the steps it holds are in its name and again in its header.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = tensorfile.TensorFile(path)
        facts = self._file.facts
        if facts.get("format") != FORMAT or facts.get("version") != VERSION:
            message = (
                f"{path}: expected a segment of {FORMAT} version {VERSION}, found {facts.get('format')!r} "
                f"version {facts.get('version')!r}"
            )
            raise FormatError(message)
        self.start: int = facts["start"]
        self.stop: int = facts["stop"]
        if path.name != segment_file(path, self.start, self.stop).name:
            message = (
                f"{path}: expected the steps of its name, found steps {self.start} to {self.stop - 1}; was it renamed?"
            )
            raise FormatError(message)

    def parameters(self, t: int) -> dict[str, torch.Tensor]:
        """Read θ_t, as far as this segment holds it.

        Parameters
        ----------
        t
            From `start` to `stop`, both included.

        Returns
        -------
        dict of str to torch.Tensor
            Parameter name to tensor.
        """
        prefix = f"parameters/{t:08d}/"
        names = [name for name in self._file.names if name.startswith(prefix)]
        return {name.removeprefix(prefix): self._file.tensor(name) for name in names}

    def step(self, t: int) -> Step:
        """Read what is recorded of step t besides the parameters.

        Parameters
        ----------
        t
            From `start` to `stop` - 1.

        Returns
        -------
        Step
            The step.
        """
        row = self._file.facts["steps"][t - self.start]
        return Step(
            step=row["step"],
            epoch=row["epoch"],
            seed=row["seed"],
            learning_rates=tuple(float(rate) for rate in row["learning_rates"]),
            gradient_norm=_number_from_json(row["gradient_norm"]),
            micro_batches=tuple(
                self._micro_batch(f"{t:08d}/{position}", entry) for position, entry in enumerate(row["micro_batches"])
            ),
        )

    def _micro_batch(self, prefix: str, row: Mapping[str, Any]) -> MicroBatch:
        names = set(self._file.names)
        tensors = {
            path: self._file.tensor(f"batches/{prefix}/{path}")
            for path in row["checksums"]
            if f"batches/{prefix}/{path}" in names
        }
        return MicroBatch(
            indices=self._file.tensor(f"indices/{prefix}"),
            nest=row["nest"],
            tensors=tensors,
            checksums=row["checksums"],
            random_state={
                name: self._file.tensor(f"{name}/{prefix}") for name in RANDOM_STATES if f"{name}/{prefix}" in names
            },
            loss_sum=_number_from_json(row["loss_sum"]),
            predictions=_number_from_json(row["predictions"]),
        )
