"""A run of path ``chord``: checkpoints far apart, read by the same face as a recorded run.

What stands between two neighbouring checkpoints takes the place of a step: interval k leads from checkpoint k to
checkpoint k + 1, and wherever `Run` counts steps, intervals are counted, from 0. `Run.updates` tells the updates.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from recorder.checkpoints import CheckpointReader, Record
from recorder.errors import UsageError
from recorder.manifest import CHORD, Manifest
from recorder.runformat import Run
from recorder.segments import SegmentName
from recorder.steps import Step


def open_run(path: Path) -> Run:
    """Open a run of either path for reading.

    Parameters
    ----------
    path
        The run's folder.

    Returns
    -------
    Run
        The run.
    """
    return ChordRun(path) if Manifest.read(path).path == CHORD else Run(path)


class ChordRun(Run):
    """A run of checkpoints, opened for reading: intervals are its steps.

    Parameters
    ----------
    path
        The run's folder.
    """

    noun = "interval"

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.manifest = Manifest.read(self.path)
        self._stops = self.manifest.checkpoints
        self._record = functools.lru_cache(maxsize=None)(functools.partial(Record.read, self.path))
        # Neighbouring intervals share a checkpoint.
        self._reader = functools.lru_cache(maxsize=2)(self._opened)
        self._untrained = None

    def _opened(self, k: int) -> CheckpointReader:
        return CheckpointReader(self.path, self.record(k))

    def record(self, k: int) -> Record:
        """Read the record of a checkpoint.

        Parameters
        ----------
        k
            Its position, from 0.

        Returns
        -------
        Record
            The record.

        Raises
        ------
        UsageError
            If there is no such checkpoint.
        """
        if not 0 <= k < len(self._stops):
            message = f"{self.path}: has checkpoints 0 to {len(self._stops) - 1}, not {k}"
            raise UsageError(message)
        return self._record(self._stops[k])

    def stored_bytes(self, k: int) -> int:
        """Count the bytes that reading a checkpoint takes.

        Parameters
        ----------
        k
            Its position.

        Returns
        -------
        int
            Of its parameters and recorded buffers.
        """
        return sum(row.size * getattr(torch, row.dtype).itemsize for row in self.manifest.trained)

    # --- What a run tells of its steps ------------------------------------------------------------------------------

    def updates(self, t: int) -> tuple[int, int]:
        """Tell between which updates an interval lies: those of its two checkpoints.

        Parameters
        ----------
        t
            The interval.

        Returns
        -------
        tuple of int
            After how many updates its two checkpoints were taken.
        """
        return self._stops[t], self._stops[t + 1]

    def describe(self) -> str:
        """Say in words what the run holds.

        Returns
        -------
        str
            Its path, its checkpoints, their updates.
        """
        return f"path {CHORD}, {len(self._stops)} checkpoints from update {self._stops[0]} to {self._stops[-1]}"

    def describe_steps(self, ranges: Iterable[tuple[int, int]]) -> str:
        """Say in words which updates ranges of intervals cover.

        Parameters
        ----------
        ranges
            Start and stop of ranges of intervals.

        Returns
        -------
        str
            Such as ``updates 0 to 400``.
        """
        parts = [f"{self._stops[start]} to {self._stops[stop]}" for start, stop in ranges if start < stop]
        return f"updates {', '.join(parts)}" if parts else "no updates"

    def position(self, update: int, what: str) -> int:
        """Find the checkpoint after a number of updates.

        Parameters
        ----------
        update
            The number of updates.
        what
            Names it in errors.

        Returns
        -------
        int
            Its position.

        Raises
        ------
        UsageError
            If there is no such checkpoint.
        """
        position = bisect.bisect_left(self._stops, update)
        if position == len(self._stops) or self._stops[position] != update:
            near = self._stops[max(0, position - 1) : position + 1]
            message = (
                f"{what}: update {update} is no checkpoint of {self.path}, and what lies between two cannot be told "
                f"apart; the nearest are {' and '.join(map(str, near))}"
            )
            raise UsageError(message)
        return position

    @property
    def steps(self) -> list[int]:
        """Every interval, in order."""
        return list(range(len(self._stops) - 1))

    @property
    def consecutive(self) -> list[tuple[int, int]]:
        """All intervals as one range."""
        return [(0, len(self._stops) - 1)]

    @property
    def ever_recorded(self) -> list[tuple[int, int]]:
        """The same: no checkpoint is pruned."""
        return self.consecutive

    @property
    def segments(self) -> list[tuple[int, int]]:
        """Every interval as a range of its own."""
        return [(k, k + 1) for k in self.steps]

    @property
    def pruned(self) -> list[tuple[int, int]]:
        """None."""
        return []

    @property
    def attempts(self) -> list[tuple[int, int, int]]:
        """The import, and all intervals."""
        return [(self.manifest.attempt.number, 0, len(self._stops) - 1)]

    def files_of(self, start: int, stop: int) -> list[SegmentName]:
        """Name no segments: there are none.

        Parameters
        ----------
        start, stop
            A range of intervals.

        Returns
        -------
        list
            Empty.
        """
        return []

    def to_be_recorded(self, stop: int) -> list[tuple[int, int]]:
        """Tell of all intervals: no further ones are to come.

        Parameters
        ----------
        stop
            Not looked at.

        Returns
        -------
        list of (int, int)
            As `consecutive`.
        """
        return self.consecutive

    # --- What it holds ----------------------------------------------------------------------------------------------

    def step(self, t: int) -> Step:
        """Tell what is known of an interval besides the parameters: its updates, and no batches.

        Parameters
        ----------
        t
            The interval.

        Returns
        -------
        Step
            Without micro-batches; its learning rate is NaN.
        """
        return Step(
            step=t,
            epoch=self.record(t).epoch,
            seed=0,
            learning_rates=(float("nan"),),
            micro_batches=(),
            updates=self.updates(t),
        )

    def parameters(self, t: int) -> dict[str, torch.Tensor]:
        """Read the trained parameters of a checkpoint.

        Parameters
        ----------
        t
            Its position: the start of interval t, and the end of the one before.

        Returns
        -------
        dict of str to torch.Tensor
            Name to tensor in host memory, in the order of the parameter table.
        """
        return self._reader(t).tensors(row.name for row in self.manifest.trained)

    def with_gradient(self, t: int) -> set[str]:
        """Name the parameters in the ledger: the same in all intervals.

        Parameters
        ----------
        t
            Not looked at.

        Returns
        -------
        set of str
            Their names.
        """
        return {row.name for row in self.manifest.trained}

    def buffers(self, t: int) -> dict[str, torch.Tensor]:
        """Read the recorded buffers of a checkpoint.

        Parameters
        ----------
        t
            Its position.

        Returns
        -------
        dict of str to torch.Tensor
            Name to tensor in host memory.
        """
        return self._reader(t).tensors(self.manifest.buffers)

    def untrained(self) -> dict[str, torch.Tensor]:
        """Read the parameters that are the same in all checkpoints, from the first.

        Returns
        -------
        dict of str to torch.Tensor
            Name to tensor in host memory.
        """
        if self._untrained is None:
            names = (row.name for row in self.manifest.parameters if not row.trained)
            self._untrained = self._reader(0).tensors(names)
        return self._untrained

    def optimizer_state(self) -> dict[str, Any] | None:
        """Tell of none: it is not imported.

        Returns
        -------
        None
            Always.
        """
        return None

    def records(self) -> Iterator[Record]:
        """Read the records of all checkpoints.

        Yields
        ------
        Record
            In the order of updates.
        """
        for k in range(len(self._stops)):
            yield self.record(k)
