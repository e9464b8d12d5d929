"""Segments: steps of a run in one immutable file, for reading.

    RUN/segments/001-00000000-00000064.safetensors          attempt 1, steps 0 to 63: θ_0 ... θ_64, batches, losses
    RUN/segments/001-00000000-00000064-rank1.safetensors    the batches and losses of its process 1

Part of the run format (docs/formats/run.md). A segment begins with whole parameters, the keyframe; the following ones
are coded as differences (`recorder.codec`). It needs no other segment, so that each can be read, moved or lost alone.
`recorder.segmentwriter` writes them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from recorder import steps, tensorfile
from recorder.codec import StepCoder
from recorder.errors import FormatError, UsageError
from recorder.layout import BUFFERS, PARAMETERS, Layout, bits
from recorder.manifest import FORMAT, VERSION
from recorder.steps import Step

SEGMENTS_FOLDER = "segments"
_NAME = re.compile(r"(\d{3})-(\d{8})-(\d{8})(?:-rank(\d+))?\.safetensors")


class SegmentName(NamedTuple):
    """What the name of a segment's file says.

    Parameters
    ----------
    attempt
        Number of the attempt, from 1.
    start, stop
        The range of steps; of those that the recording selects, it holds all.
    rank
        The process, in data-parallel training. The parameters are in the segments of process 0.
    """

    attempt: int
    start: int
    stop: int
    rank: int = 0

    @property
    def file(self) -> str:
        """The file's name."""
        rank = f"-rank{self.rank}" if self.rank else ""
        return f"{self.attempt:03d}-{self.start:08d}-{self.stop:08d}{rank}.safetensors"

    @classmethod
    def parse(cls, file: str) -> SegmentName | None:
        """Read a file's name.

        Parameters
        ----------
        file
            The name.

        Returns
        -------
        SegmentName or None
            None if it is no segment's.
        """
        match = _NAME.fullmatch(file)
        return cls(*(int(part or 0) for part in match.groups())) if match else None


def segment_file(run: Path, start: int, stop: int, *, attempt: int = 1, rank: int = 0) -> Path:
    """Return the path of a segment.

    Parameters
    ----------
    run
        The run's folder.
    start, stop, attempt, rank
        As for `SegmentName`.

    Returns
    -------
    Path
        The segment's path, whether or not it exists.
    """
    return run / SEGMENTS_FOLDER / SegmentName(attempt, start, stop, rank).file


def list_segments(run: Path) -> list[SegmentName]:
    """List the segments of a run.

    Parameters
    ----------
    run
        The run's folder.

    Returns
    -------
    list of SegmentName
        By attempt, step and process.
    """
    folder = run / SEGMENTS_FOLDER
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return sorted(name for name in map(SegmentName.parse, names) if name)


def facts_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Make a segment's facts of the rows that its appends left.

    Parameters
    ----------
    rows
        ``{"state": number of the θ or None, "step": row or None}``; the first has ``segment`` and ``layout`` besides.

    Returns
    -------
    dict
        For the header.
    """
    recorded = [row["step"] for row in rows if row["step"] is not None]
    return {
        "format": FORMAT,
        "version": VERSION,
        **rows[0]["segment"],
        "start": recorded[0]["step"],
        "stop": recorded[-1]["step"] + 1,
        "layout": rows[0]["layout"],
        "states": [row["state"] for row in rows if row["state"] is not None],
        "steps": recorded,
    }


class Segment:
    """One segment, opened for reading.

    Parameters
    ----------
    path
        The segment's file; the steps it holds are in its name and again in its header.

    Attributes
    ----------
    run_id : str
        The run it belongs to.
    name : SegmentName
        Attempt, steps, process.
    states : tuple of int
        The t of every θ_t it holds.

    Raises
    ------
    FormatError
        If the file is no segment of this version, or its name is another's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = tensorfile.TensorFile(path)
        facts = self._file.facts
        if facts.get("format") != FORMAT or facts.get("version") != VERSION or "states" not in facts:
            message = (
                f"{path}: expected a segment of {FORMAT} version {VERSION}, found {facts.get('format')!r} "
                f"version {facts.get('version')!r}"
            )
            raise FormatError(message)
        self.run_id: str = facts["run_id"]
        self.name = SegmentName(facts["attempt"], facts["start"], facts["stop"], facts["rank"])
        if path.name != self.name.file:
            message = (
                f"{path}: expected the steps of its name, found attempt {self.name.attempt}, steps {self.name.start} "
                f"to {self.name.stop - 1}, process {self.name.rank}; was it renamed?"
            )
            raise FormatError(message)
        self.states: tuple[int, ...] = tuple(facts["states"])
        self._rows = {row["step"]: row for row in facts["steps"]}
        self._layout = Layout.from_list(facts["layout"])
        self._coders: dict[str, StepCoder] = {}
        # The decoded state at position `_at` of `states`, and the one before.
        self._at = -1
        self._vectors: dict[str, torch.Tensor] = {}
        self._before: dict[str, torch.Tensor] | None = None

    @property
    def steps(self) -> list[int]:
        """Every step it holds, in order."""
        return list(self._rows)

    @property
    def parameter_names(self) -> list[str]:
        """Names of the parameters that its θ consist of; one that joins later is not among them."""
        return [slot.name for slot in self._layout.slots if slot.kind == PARAMETERS]

    def parameters(self, t: int) -> dict[str, torch.Tensor]:
        """Read the parameters of θ_t, as far as this segment holds them.

        Parameters
        ----------
        t
            One of `states`.

        Returns
        -------
        dict of str to torch.Tensor
            Name to tensor in host memory.
        """
        return self._tensors(t, PARAMETERS)

    def buffers(self, t: int) -> dict[str, torch.Tensor]:
        """Read the buffers as they were before step t.

        Parameters
        ----------
        t
            One of `states`.

        Returns
        -------
        dict of str to torch.Tensor
            Name to tensor in host memory.
        """
        return self._tensors(t, BUFFERS)

    def _tensors(self, t: int, kind: str) -> dict[str, torch.Tensor]:
        self._move_to(t)
        views = self._layout.views(self._vectors)
        return {slot.name: view for slot, view in zip(self._layout.slots, views, strict=True) if slot.kind == kind}

    def _move_to(self, t: int) -> None:
        if t not in self.states:
            message = f"{self.path}: holds no parameters of step {t}"
            raise UsageError(message)
        target = self.states.index(t)
        if self._at < 0 or target < self._at:
            self._read_keyframe()
        while self._at < target:
            self._decode_next()

    def _read_keyframe(self) -> None:
        # Fresh vectors: the caller may still hold tensors that share the memory of the last ones.
        self._vectors, self._before, self._at = self._layout.allocate(), None, 0
        for slot, view in zip(self._layout.slots, self._layout.views(self._vectors), strict=True):
            view.copy_(self._file.tensor(f"{slot.kind}/{self.states[0]:08d}/{slot.name}"))
        self._file.let_go()

    def _decode_next(self) -> None:
        number = self.states[self._at + 1]
        out = self._layout.allocate()
        for dtype, size in self._layout.sizes.items():
            if dtype not in self._coders:
                self._coders[dtype] = StepCoder(dtype, size)
            coder = self._coders[dtype]
            coded = self._file.array(f"coded/{number:08d}/{dtype}")
            before = None if self._before is None else bits(self._before[dtype])
            coder.decode(coded, bits(self._vectors[dtype]), before, bits(out[dtype]))
        self._file.let_go()
        self._before, self._vectors = self._vectors, out
        self._at += 1

    def step(self, t: int) -> Step:
        """Read what is recorded of step t besides the parameters.

        Parameters
        ----------
        t
            One of `steps`.

        Returns
        -------
        Step
            The step, with the micro-batches of this segment's process.
        """
        names = self._tensors_of_steps.get(f"{t:08d}", ())
        return steps.put_together(self._rows[t], {name: self._file.tensor(name) for name in names}, self.name.rank)

    @cached_property
    def _tensors_of_steps(self) -> dict[str, list[str]]:
        kinds = {"indices", "batches", *steps.RANDOM_STATES}
        found: dict[str, list[str]] = {}
        for name in self._file.names:
            kind, _, rest = name.partition("/")
            if kind in kinds:
                found.setdefault(rest.partition("/")[0], []).append(name)
        return found

    def stored_bytes(self) -> tuple[dict[int, int], dict[int, int]]:
        """Count the bytes that reading takes, without the file's header; nothing is read but that.

        Returns
        -------
        (dict of int to int, dict of int to int)
            For every t of `states`, in their order, what θ_t and the buffers take as they are stored: a state is
            decoded from the one before it, back to the first. And for every step what it holds besides.
        """
        of_states, of_steps = dict.fromkeys(self.states, 0), dict.fromkeys(self._rows, 0)
        for name, size in self._file.sizes().items():
            kind, number, _ = name.split("/", 2)
            of_kind = of_states if kind in {PARAMETERS, BUFFERS, "coded"} else of_steps
            of_kind[int(number)] += size
        return of_states, of_steps

    def verify(self) -> None:
        """Read everything: every checksum is checked, every θ decoded; a `DamagedFileError` tells what is wrong."""
        for name in self._file.names:
            self._file.tensor(name)
        if self.states:
            self._move_to(self.states[-1])
