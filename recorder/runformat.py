"""A run opened for reading: any step, any θ.

    RUN/manifest.json                              recorder.manifest
    RUN/untrained.safetensors                      tensors that never received a gradient, once
    RUN/optimizer.safetensors                      optimizer state at the first step, unless it had none
    RUN/segments/00000000-00000016.safetensors     recorder.segments

Described for readers in any language in docs/formats/run.md. This module, `recorder.manifest` and `recorder.segments`
alone write, read and validate a run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from recorder import tensorfile
from recorder.errors import DamagedFileError, UsageError
from recorder.manifest import FORMAT, VERSION, Manifest
from recorder.ranges import describe_ranges, joined_ranges
from recorder.segments import SEGMENTS_FOLDER, Segment, Step, segment_file

UNTRAINED_FILE = "untrained.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"

_SEGMENT_NAME = re.compile(r"(\d{8})-(\d{8})\.safetensors")


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
