"""The run format: segments of consecutive steps, and reading any step back.

    RUN/manifest.json                              recorder.manifest
    RUN/untrained.safetensors                      tensors that never received a gradient, once
    RUN/optimizer.safetensors                      optimizer state at the first step, unless it had none
    RUN/segments/00000000-00000016.safetensors     steps 0 to 15: parameters θ_0 ... θ_16, batches, losses

Described for readers in any language in docs/formats/run.md. This module and `recorder.manifest` alone write, read
and validate a run.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from recorder import batches, tensorfile
from recorder.errors import DamagedFileError, FormatError, UsageError
from recorder.manifest import FORMAT as FORMAT
from recorder.manifest import VERSION as VERSION
from recorder.manifest import Manifest

SEGMENTS_FOLDER = "segments"
UNTRAINED_FILE = "untrained.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
RANDOM_STATES = ("rng_cpu", "rng_cuda")

_SEGMENT_NAME = re.compile(r"(\d{8})-(\d{8})\.safetensors")


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


class Run:
    """A recorded run, opened for reading.

    Parameters
    ----------
    path
        The run's folder.

    Attributes
    ----------
    manifest : Manifest
        What is recorded once.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.manifest = Manifest.read(self.path)
        self._ranges = self._list_segments()
        self._open: Segment | None = None
        self._untrained: dict[str, torch.Tensor] | None = None

    def _list_segments(self) -> list[tuple[int, int]]:
        folder = self.path / SEGMENTS_FOLDER
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        matches = [match for match in map(_SEGMENT_NAME.fullmatch, names) if match]
        return sorted((int(match[1]), int(match[2])) for match in matches)

    @property
    def segments(self) -> list[tuple[int, int]]:
        """First step and stop of every segment, in order."""
        return list(self._ranges)

    @property
    def steps(self) -> list[int]:
        """Every recorded step, in order."""
        return [t for start, stop in self._ranges for t in range(start, stop)]

    @property
    def consecutive(self) -> list[tuple[int, int]]:
        """Start and stop of every range of consecutive recorded steps: the segments, neighbours joined."""
        return joined_ranges(self._ranges)

    def _segment(self, t: int, *, end: bool = False) -> Segment:
        # θ_t stands in the segment that t begins or lies in, and also, as its end, in the one before.
        ranges: Iterable[tuple[int, int]] = self._ranges
        found = next((r for r in ranges if r[0] <= t < r[1] or (end and t == r[1])), None)
        if found is None:
            message = f"{self.path}: step {t} is not recorded; recorded are {describe_ranges(self._ranges)}"
            raise UsageError(message)
        file = segment_file(self.path, *found)
        if self._open is None or self._open.path != file:
            self._open = Segment(file)
        return self._open

    def step(self, t: int) -> Step:
        """Read what is recorded of step t besides the parameters; a `UsageError` tells if it is not recorded.

        Parameters
        ----------
        t
            One of `steps`.

        Returns
        -------
        Step
            The step.
        """
        return self._segment(t).step(t)

    def parameters(self, t: int) -> dict[str, torch.Tensor]:
        """Read θ_t: every trained parameter at the start of step t, which is the end of step t-1.

        Parameters
        ----------
        t
            A recorded step, or one more than the last of a segment.

        Returns
        -------
        dict of str to torch.Tensor
            Name to tensor in host memory, in the order of the parameter table.

        Raises
        ------
        DamagedFileError
            If a parameter of the table is neither in the segment nor among the constants.
        """
        theta = self._segment(t, end=True).parameters(t)
        complete = {}
        for parameter in self.manifest.trained:
            # Before its first gradient a parameter stood among the untrained ones.
            tensor = theta[parameter.name] if parameter.name in theta else self.untrained().get(parameter.name)
            if tensor is None:
                message = f"{self.path}: parameter {parameter.name!r} is not recorded at step {t}"
                raise DamagedFileError(message)
            complete[parameter.name] = tensor
        return complete

    def untrained(self) -> dict[str, torch.Tensor]:
        """Read the tensors that received no gradient in the first step, at their initial values.

        Returns
        -------
        dict of str to torch.Tensor
            Name to tensor in host memory.
        """
        if self._untrained is None:
            file = tensorfile.TensorFile(self.path / UNTRAINED_FILE)
            self._untrained = {name: file.tensor(name) for name in file.names}
        return self._untrained

    def optimizer_state(self) -> dict[str, Any] | None:
        """Read the optimizer's state at the first recorded step.

        Returns
        -------
        dict or None
            As ``optimizer.state_dict()["state"]``; None if the optimizer had none yet.
        """
        if self.manifest.optimizer.fresh:
            return None
        file = tensorfile.TensorFile(self.path / OPTIMIZER_FILE)
        state: dict[Any, dict[str, Any]] = {}
        for name in file.names:
            index, key = name.split("/", 1)
            state.setdefault(int(index), {})[key] = file.tensor(name)
        for index, scalars in file.facts["scalars"].items():
            state.setdefault(int(index), {}).update(scalars)
        return state


def write_optimizer_state(run: Path, state: Mapping[int, Mapping[str, Any]]) -> None:
    """Write an optimizer's state, tensors and plain numbers.

    Parameters
    ----------
    run
        The run's folder.
    state
        As ``optimizer.state_dict()["state"]``.
    """
    tensors = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, entries in state.items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}/{key}"] = value.detach().cpu()
            else:
                scalars.setdefault(str(index), {})[key] = value
    tensorfile.write(run / OPTIMIZER_FILE, tensors, {"format": FORMAT, "version": VERSION, "scalars": scalars})


def joined_ranges(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join the neighbours of a list of half-open ranges.

    Parameters
    ----------
    ranges
        Start and stop of each range, in order.

    Returns
    -------
    list of (int, int)
        Start and stop of each joined range.

    Examples
    --------
    >>> joined_ranges([(0, 16), (16, 64), (80, 96)])
    [(0, 64), (80, 96)]
    """
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def describe_ranges(ranges: Sequence[tuple[int, int]]) -> str:
    """Say in words which steps a list of half-open ranges covers, neighbours joined.

    Parameters
    ----------
    ranges
        Start and stop of each range, in order.

    Returns
    -------
    str
        Such as ``steps 0-63, 80-95``.

    Examples
    --------
    >>> describe_ranges([(0, 16), (16, 64), (80, 96)])
    'steps 0-63, 80-95'
    >>> describe_ranges([])
    'no steps'
    """
    joined = joined_ranges(ranges)
    return "steps " + ", ".join(f"{start}-{stop - 1}" for start, stop in joined) if joined else "no steps"
