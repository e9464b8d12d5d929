"""Segments in the making: states and steps come in, coded and checksummed they go to the disk.

Used by one thread, `recorder.writer`. A step is safe from a kill of the training once `SegmentWriter.add` has
returned, and safe from a loss of power once its segment is sealed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from recorder import growing, steps
from recorder.codec import StepCoder
from recorder.errors import FormatError
from recorder.growing import GrowingTensorFile
from recorder.layout import Layout, bits
from recorder.segments import SEGMENTS_FOLDER, SegmentName, facts_of
from recorder.steps import Step

if TYPE_CHECKING:
    from recorder.tensorfile import Array

_HEADER_MARGIN = 1.1
"""Micro-batches differ in size from step to step."""


class QuotaReached(Exception):  # noqa: N818 (no error: what the user asked for)
    """The run has reached the size it may have."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class State:
    """One θ in flat host memory.

    Parameters
    ----------
    number
        The t of θ_t.
    layout
        What lies where.
    vectors
        Dtype to vector.
    release
        Called once the memory may be used again.
    wait
        Returns once the memory is filled.
    """

    number: int
    layout: Layout
    vectors: dict[str, torch.Tensor]
    release: Callable[[], None] = lambda: None
    wait: Callable[[], None] = lambda: None


class SegmentWriter:
    """Writes the segments of one attempt, in order.

    Parameters
    ----------
    run
        The run's folder.
    run_id
        The run's identity.
    attempt, rank
        As for `recorder.segments.SegmentName`.
    steps_per_segment
        A segment is sealed when it holds so many.
    quota
        Bytes that all processes of the attempt may write; None for no limit. `add` raises `QuotaReached` rather than
        write more. What the other processes have written is looked up at the beginning of each segment.
    """

    def __init__(
        self, run: Path, run_id: str, attempt: int, rank: int, steps_per_segment: int, quota: int | None = None
    ) -> None:
        self._folder = run / SEGMENTS_FOLDER
        self._facts = {"run_id": run_id, "attempt": attempt, "rank": rank}
        self._steps_per_segment = steps_per_segment
        self._quota = quota
        self._file: GrowingTensorFile | None = None
        self._steps = 0
        self._previous: State | None = None
        self._before: State | None = None
        self._coders: dict[tuple[str, int], StepCoder] = {}
        self._sealed_bytes = 0
        self._bytes_of_others = 0

    @property
    def bytes(self) -> int:
        """Bytes written so far."""
        return self._sealed_bytes + (self._file.bytes if self._file else 0)

    def add(self, state: State | None, step: Step | None) -> None:
        """Add a state, and the step that it ends.

        Parameters
        ----------
        state
            θ_{t+1} with step t; or θ_t alone, before a step t that does not follow the last one. None in a process
            that records no parameters.
        step
            The step, or None.

        Raises
        ------
        FormatError
            If the step has more tensors than a file's header can name.
        """
        changed = state and self._previous and state.layout != self._previous.layout
        if state and (changed or (step is None and self._file is None)):
            self._start_at(state)
            return
        row, tensors = (None, {}) if step is None else steps.take_apart(step)
        if self._file is None:
            self._begin(row, tensors)
        if not self._append(state, row, tensors):
            # The header is full: the micro-batches have grown.
            self.seal()
            if state and step is None:
                self._start_at(state)
                return
            self._begin(row, tensors)
            if not self._append(state, row, tensors):
                message = f"{self._folder}: a step has {len(tensors)} tensors, more than a file's header can name"
                raise FormatError(message)
        self._rotate(state)
        self._steps += step is not None
        if self._steps == self._steps_per_segment:
            self.seal()

    def _start_at(self, state: State) -> None:
        self.seal()
        self._forget()
        self._previous = state

    def _begin(self, row: dict[str, Any] | None, tensors: dict[str, torch.Tensor]) -> None:
        start = self._previous.number if self._previous else row["step"] if row else 0
        layout = self._previous.layout if self._previous else Layout(())
        keyframe = {}
        if self._previous:
            views = layout.views(self._previous.vectors)
            keyframe = {
                f"{slot.kind}/{start:08d}/{slot.name}": view for slot, view in zip(layout.slots, views, strict=True)
            }
        first = {
            "segment": self._facts,
            "layout": layout.to_list(),
            "state": start if self._previous else None,
            "step": None,
        }
        # Where the selection jumps, both ends of a step are added.
        coded = {f"coded/{start:08d}/{dtype}": np.empty(0, np.uint8) for dtype in layout.sizes}
        of_step = growing.header_bytes(tensors, row or {})
        of_step += 2 * growing.header_bytes(coded, {"state": start, "step": None})
        room = growing.header_bytes(keyframe, first) + int(self._steps_per_segment * _HEADER_MARGIN * of_step)
        rank = f"-rank{self._facts['rank']}" if self._facts["rank"] else ""
        if self._quota is not None:
            self._bytes_of_others = self._measure_others()
        self._refuse_beyond_quota(keyframe, first, growing.room_for(room))
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = GrowingTensorFile(self._folder, f"{self._facts['attempt']:03d}-{start:08d}{rank}", room)
        self._file.append(keyframe, first)
        self._release_before()

    def _append(self, state: State | None, row: dict[str, Any] | None, tensors: dict[str, torch.Tensor]) -> bool:
        assert self._file is not None
        coded = {}
        if state is not None:
            assert self._previous is not None
            for dtype, vector in state.vectors.items():
                coder = self._coder(dtype, len(vector))
                before = None if self._before is None else bits(self._before.vectors[dtype])
                body = coder.encode(bits(vector), bits(self._previous.vectors[dtype]), before)
                coded[f"coded/{state.number:08d}/{dtype}"] = np.frombuffer(body, np.uint8)
        added: dict[str, Array] = {**coded, **tensors}
        entry = {"state": None if state is None else state.number, "step": row}
        self._refuse_beyond_quota(added, entry)
        return self._file.append(added, entry)

    def _refuse_beyond_quota(self, tensors: Mapping[str, Array], row: Mapping[str, Any], room: int = 0) -> None:
        if self._quota is None:
            return
        written = self._bytes_of_others + self.bytes + (self._file.journal_bytes if self._file else 0)
        if written + room + growing.append_bytes(tensors, row) > self._quota:
            message = f"the next step would exceed the {self._quota:,} bytes left of the quota"
            raise QuotaReached(message)

    def _measure_others(self) -> int:
        attempt, rank = f"{self._facts['attempt']:03d}-", self._facts["rank"]
        sizes = []
        for file in self._folder.glob(f"*{attempt}*"):
            of_other = re.search(r"-rank(\d+)", file.name)
            if file.name.lstrip(".").startswith(attempt) and int(of_other[1] if of_other else 0) != rank:
                with suppress(FileNotFoundError):  # it has just been sealed under its name
                    sizes.append(file.stat().st_size)
        return sum(sizes)

    def _coder(self, dtype: str, size: int) -> StepCoder:
        if (dtype, size) not in self._coders:
            self._coders[dtype, size] = StepCoder(dtype, size)
        return self._coders[dtype, size]

    def _rotate(self, state: State | None) -> None:
        if state is not None:
            self._release_before()
            self._before, self._previous = self._previous, state

    def _release_before(self) -> None:
        if self._before is not None:
            self._before.release()
            self._before = None

    def _forget(self) -> None:
        self._release_before()
        if self._previous is not None:
            self._previous.release()
            self._previous = None

    def sync(self) -> None:
        """Put everything added so far on the disk, safe from a loss of power."""
        if self._file is not None:
            self._file.sync()

    def seal(self) -> None:
        """End the segment in the making, if there is one; the next step begins another."""
        file, self._file = self._file, None
        self._release_before()
        if file is not None:
            self._sealed_bytes += file.bytes
            self._steps = 0
            seal_segment(self._folder, file)


def seal_segment(folder: Path, file: GrowingTensorFile) -> SegmentName | None:
    """Give a segment in the making its header and its name.

    Parameters
    ----------
    folder
        The run's folder of segments.
    file
        The segment, at any of its steps.

    Returns
    -------
    SegmentName or None
        None if it held no step yet; it is removed then.
    """
    rows = [append.row for append in file.appends]
    if all(row["step"] is None for row in rows):
        file.discard()
        return None
    facts = facts_of(rows)
    name = SegmentName(facts["attempt"], facts["start"], facts["stop"], facts["rank"])
    try:
        file.seal(folder / name.file, facts)
    finally:
        file.close()
    return name


def recover_segments(run: Path) -> list[SegmentName]:
    """Seal the segments that a killed training left in the making.

    Parameters
    ----------
    run
        The run's folder; nobody records into it.

    Returns
    -------
    list of SegmentName
        What was recovered.
    """
    folder = run / SEGMENTS_FOLDER
    recovered = []
    for name in growing.unfinished(folder):
        file = GrowingTensorFile.recover(folder, name)
        sealed = seal_segment(folder, file) if file else None
        growing.remove(folder, name)
        if sealed:
            recovered.append(sealed)
    return recovered
