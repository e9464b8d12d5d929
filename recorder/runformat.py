"""A run opened for reading: any step, any θ.

    RUN/manifest.json                                  recorder.manifest
    RUN/untrained.safetensors                          tensors that are recorded once
    RUN/optimizer.safetensors                          optimizer state at the first step, unless it had none
    RUN/segments/001-00000000-00000064.safetensors     recorder.segments

Described for readers in any language in docs/formats/run.md. This module, `recorder.manifest`, `recorder.segments`,
`recorder.recordedonce` and `recorder.steps` alone write, read and validate a run.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from recorder.errors import DamagedFileError, UsageError
from recorder.manifest import RECORDED, Manifest
from recorder.pruned import pruned_segments
from recorder.ranges import describe_ranges, joined_ranges
from recorder.recordedonce import UNTRAINED_FILE, open_once, optimizer_file
from recorder.segments import Segment, SegmentName, list_segments, segment_file
from recorder.selection import StepSelection
from recorder.steps import Step
from recorder.timeline import Part, timeline


class Run:
    """A recorded run, opened for reading.

    Parameters
    ----------
    path
        The run's folder. What `recorder.chordrun.open_run` opens may be of either path.
    attempt
        Read the run as it was at the end of this attempt; the last one by default.

    Attributes
    ----------
    manifest : Manifest
        What is recorded once.

    Raises
    ------
    UsageError
        If the run has no such attempt.
    """

    noun = "step"
    """What lies between two of its θ."""

    def __init__(self, path: Path, attempt: int | None = None) -> None:
        self.path = Path(path)
        self.manifest, self._files = _look(self.path)
        if self.manifest.path != RECORDED:
            message = f"{self.path}: expected a recorded run, found one of path {self.manifest.path}"
            raise UsageError(message)
        numbers = [entry.number for entry in self.manifest.attempts]
        if attempt is not None and attempt not in numbers:
            message = f"{self.path}: has no attempt {attempt}; it has {', '.join(map(str, numbers))}"
            raise UsageError(message)
        self._selection = StepSelection(self.manifest.steps)
        pruned = pruned_segments(self.path)
        self._whole_timeline = timeline(sorted([*self._files, *pruned]), self.manifest.attempts[: attempt or None])
        self._timeline = [part for part in self._whole_timeline if part.segment not in set(pruned)]
        self._open: dict[int, Segment] = {}
        self._untrained: dict[str, torch.Tensor] | None = None

    @property
    def segments(self) -> list[tuple[int, int]]:
        """Start and stop of every segment, in order, without steps that a later attempt replaced."""
        return [(part.start, part.stop) for part in self._timeline]

    @property
    def pruned(self) -> list[tuple[int, int]]:
        """Start and stop of every range of steps that were recorded, and deleted on purpose since."""
        there = set(self._timeline)
        return joined_ranges([(part.start, part.stop) for part in self._whole_timeline if part not in there])

    def files_of(self, start: int, stop: int) -> list[SegmentName]:
        """Name the segments that hold nothing but a range of steps, and steps that a later attempt replaced.

        Parameters
        ----------
        start, stop
            The range of steps.

        Returns
        -------
        list of SegmentName
            Of all processes.
        """
        needed = {part.segment for part in self._timeline if part.start < start or part.stop > stop}
        within = [part.segment for part in self._timeline if part.segment not in needed]
        return [
            name
            for name in self._files
            if any(name.attempt == own.attempt and own.start <= name.start and name.stop <= own.stop for own in within)
        ]

    @property
    def attempts(self) -> list[tuple[int, int, int]]:
        """Number of the attempt, start and stop of every range of steps that one attempt recorded, pruned or not."""
        ranges: list[tuple[int, int, int]] = []
        for part in self._whole_timeline:
            if ranges and ranges[-1][0] == part.segment.attempt and ranges[-1][2] == part.start:
                ranges[-1] = (part.segment.attempt, ranges[-1][1], part.stop)
            else:
                ranges.append((part.segment.attempt, part.start, part.stop))
        return ranges

    def attempts_within(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Say which attempts recorded a range of steps.

        Parameters
        ----------
        start, stop
            The range of steps.

        Returns
        -------
        list of (int, int, int)
            Number of the attempt, start and stop, in order.
        """
        cut = [(number, max(first, start), min(last, stop)) for number, first, last in self.attempts]
        return [(number, first, last) for number, first, last in cut if first < last]

    @property
    def steps(self) -> list[int]:
        """Every recorded step, in order."""
        return [t for part in self._timeline for t in self._selection.between(part.start, part.stop)]

    @property
    def consecutive(self) -> list[tuple[int, int]]:
        """Start and stop of every range of consecutive recorded steps."""
        return self._consecutive(self._timeline)

    @property
    def ever_recorded(self) -> list[tuple[int, int]]:
        """The same as `consecutive`, with the steps that were pruned since."""
        return self._consecutive(self._whole_timeline)

    def to_be_recorded(self, stop: int) -> list[tuple[int, int]]:
        """Tell what `ever_recorded` will be when the recording has come to a step.

        Parameters
        ----------
        stop
            One more than the last step to come.

        Returns
        -------
        list of (int, int)
            Start and stop of every range of consecutive steps.
        """
        last = self._whole_timeline[-1]
        to_come = [Part(last.stop, stop, last.segment)] if stop > last.stop else []
        return self._consecutive([*self._whole_timeline, *to_come])

    def _consecutive(self, parts: Sequence[Part]) -> list[tuple[int, int]]:
        ranges = [(part.start, part.stop) for part in parts]
        if self._selection.text == "all":
            return joined_ranges(ranges)
        return joined_ranges([(t, t + 1) for start, stop in ranges for t in self._selection.between(start, stop)])

    def _part(self, t: int) -> Part | None:
        if not self._selection.keeps(t):
            return None
        position = bisect.bisect_right(self._timeline, t, key=lambda part: part.start)
        part = self._timeline[position - 1] if position else None
        return part if part is not None and t < part.stop else None

    def segment_of_state(self, t: int) -> SegmentName:
        """Name the segment that θ_t is read from, as long as that is whole.

        Parameters
        ----------
        t
            A recorded step, or one more than a recorded step.

        Returns
        -------
        SegmentName
            The one of step t, else the one of step t - 1. A `UsageError` tells if neither is recorded.
        """
        part = self._part(t) or (self._part(t - 1) if t else None)
        if part is None:
            raise self._not_recorded(t)
        return part.segment

    def _segment(self, name: SegmentName) -> Segment:
        segment = self._open.get(name.rank)
        if segment is None or segment.name != name:
            file = segment_file(self.path, name.start, name.stop, attempt=name.attempt, rank=name.rank)
            segment = self._open[name.rank] = Segment(file)
            if segment.run_id != self.manifest.run_id:
                message = f"{file}: expected a segment of run {self.manifest.run_id}, found one of {segment.run_id}"
                raise DamagedFileError(message)
        return segment

    def _not_recorded(self, t: int) -> UsageError:
        return UsageError(f"{self.path}: step {t} is not recorded; recorded are {describe_ranges(self.consecutive)}")

    def updates(self, t: int) -> tuple[int, int]:
        """Tell after how many updates step t begins and ends.

        Parameters
        ----------
        t
            The step.

        Returns
        -------
        tuple of int
            t and t + 1: in a recorded run each update is a step.
        """
        return t, t + 1

    def describe(self) -> str:
        """Say in words what the run holds.

        Returns
        -------
        str
            Such as ``steps 0-59 recorded so far``.
        """
        return f"{describe_ranges(self.consecutive)} recorded{' so far' if self.manifest.state == 'recording' else ''}"

    def describe_steps(self, ranges: Iterable[tuple[int, int]]) -> str:
        """Say in words which steps ranges cover.

        Parameters
        ----------
        ranges
            Start and stop of each range.

        Returns
        -------
        str
            Such as ``steps 0-59``.
        """
        return describe_ranges(list(ranges))

    def position(self, update: int, what: str) -> int:
        """Find the step that begins after a number of updates.

        Parameters
        ----------
        update
            The number of updates.
        what
            Names it in errors.

        Returns
        -------
        int
            The same number: in a recorded run each update is a step.
        """
        return update

    def step(self, t: int) -> Step:
        """Read what is recorded of step t besides the parameters.

        Parameters
        ----------
        t
            One of `steps`.

        Returns
        -------
        Step
            The step, with the micro-batches of all processes. A `UsageError` tells if it is not recorded.
        """
        part = self._part(t)
        if part is None:
            raise self._not_recorded(t)
        # By process: their segments need not end at the same steps.
        names = sorted(
            (name for name in self._files if name.attempt == part.segment.attempt and name.start <= t < name.stop),
            key=lambda name: name.rank,
        )
        of_processes = [self._segment(name).step(t) for name in names]
        micro_batches = tuple(micro_batch for step in of_processes for micro_batch in step.micro_batches)
        return dataclasses.replace(of_processes[0], micro_batches=micro_batches)

    def parameters(self, t: int) -> dict[str, torch.Tensor]:
        """Read θ_t: every trained parameter at the start of step t, which is the end of step t-1.

        Parameters
        ----------
        t
            A recorded step, or one more than a recorded step.

        Returns
        -------
        dict of str to torch.Tensor
            Name to tensor in host memory, in the order of the parameter table.

        Raises
        ------
        DamagedFileError
            If a parameter of the table is neither in the segment nor among the constants.
        """
        theta = self._read_state(t, lambda segment: segment.parameters(t))
        complete = {}
        for parameter in self.manifest.trained:
            # Before its first gradient a parameter stood among the untrained ones.
            tensor = theta[parameter.name] if parameter.name in theta else self.untrained().get(parameter.name)
            if tensor is None:
                message = f"{self.path}: parameter {parameter.name!r} is not recorded at step {t}"
                raise DamagedFileError(message)
            complete[parameter.name] = tensor
        return complete

    def with_gradient(self, t: int) -> set[str]:
        """Name the parameters that had received a gradient by step t.

        Parameters
        ----------
        t
            One of `steps`.

        Returns
        -------
        set of str
            Of the trained ones of the parameter table those that had joined the ledger.
        """
        part = self._part(t)
        if part is None:
            raise self._not_recorded(t)
        return set(self._segment(part.segment).parameter_names)

    def buffers(self, t: int) -> dict[str, torch.Tensor]:
        """Read the buffers that change in training, as they were before step t.

        Parameters
        ----------
        t
            As for `parameters`.

        Returns
        -------
        dict of str to torch.Tensor
            Name to tensor in host memory.
        """
        return self._read_state(t, lambda segment: segment.buffers(t))

    def _read_state(self, t: int, read: Callable[[Segment], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        # θ_t stands in the segment of step t, and also, as its end, in the one of step t-1: one of them may be damaged.
        of_step, before = self._part(t), self._part(t - 1) if t else None
        if of_step is None and before is None:
            raise self._not_recorded(t)
        if of_step is not None:
            try:
                return read(self._segment(of_step.segment))
            except DamagedFileError:
                if before is None or before.segment == of_step.segment:
                    raise
        assert before is not None
        return read(self._segment(before.segment))

    def untrained(self) -> dict[str, torch.Tensor]:
        """Read the tensors that received no gradient in the first step, at their initial values.

        Returns
        -------
        dict of str to torch.Tensor
            Name to tensor in host memory.
        """
        if self._untrained is None:
            file = open_once(self.path / UNTRAINED_FILE, "untrained", self.manifest.run_id)
            self._untrained = {name: file.tensor(name) for name in file.names}
        return self._untrained

    def optimizer_state(self) -> dict[str, Any] | None:
        """Read the optimizer's state at the first recorded step.

        Returns
        -------
        dict or None
            As ``optimizer.state_dict()["state"]``; None if the optimizer had none yet.
        """
        if self.manifest.optimizer.fresh or not self._timeline:
            return None
        attempt = self._timeline[0].segment.attempt
        file = open_once(self.path / optimizer_file(attempt), "optimizer", self.manifest.run_id)
        state: dict[Any, dict[str, Any]] = {}
        for name in file.names:
            index, key = name.split("/", 1)
            state.setdefault(int(index), {})[key] = file.tensor(name)
        for index, scalars in file.facts["scalars"].items():
            state.setdefault(int(index), {}).update(scalars)
        return state


def _look(path: Path) -> tuple[Manifest, list[SegmentName]]:
    # A training that goes on may change its table of parameters, and end; what it changed comes before the segments
    # that need it, and its end after the last one.
    manifest = Manifest.read(path)
    while True:
        files, after = list_segments(path), Manifest.read(path)
        if after == manifest:
            return manifest, files
        manifest = after
