"""The LCA of every single entry, summed over windows of steps: one file a window, beside the shards.

    RUN/shards/<settings-hash>/entries-00000000-00000100.safetensors                           steps 0 to 99
    RUN/shards/<settings-hash>/entries-00000000-00000100.part-00000000-00000008.safetensors    of which 0 to 7

Described in docs/formats/shards.md. A chunk of steps leaves its part of each window; one process adds up the parts in
the order of steps, whatever the order in which they came. A sum of the first parts is a part again, so that what is
on the disk always says how far the sum has got: an interruption changes no bit of the result. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recorder import tensorfile
from recorder.errors import FormatError
from recorder.ranges import joined_ranges
from replay.chunks import Range, chunks, pieces

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    from replay.allocate import Allocation
    from replay.shards import Attempts, ShardFolder

FORMAT = "lossledger-entries"
VERSION = 1

PARTS_AT_ONCE = 8
"""Every addition writes a file as large as the model in float64: it waits for so many parts, or for the last one."""

_NAME = re.compile(r"entries-(\d{8})-(\d{8})(?:\.part-(\d{8})-(\d{8}))?\.safetensors")


class EntryFolder:
    """What one folder of shards keeps of single entries.

    Parameters
    ----------
    folder
        The folder of shards.
    windows
        Start and stop of each window, without overlap.
    recorded
        Start and stop of consecutive recorded steps.
    attempts_within
        Which attempts of the training recorded a range of steps.
    """

    def __init__(
        self,
        folder: ShardFolder,
        windows: Iterable[Range],
        recorded: Sequence[Range],
        attempts_within: Callable[[int, int], Attempts],
    ) -> None:
        self._folder = folder
        self._chunk = folder.settings.chunk
        self._recorded = tuple(recorded)
        self._attempts_within = attempts_within
        self._pieces = {window: pieces(window, recorded, self._chunk) for window in windows}

    def file(self, window: Range) -> Path:
        """Return the path of a window's sum, whether or not it exists.

        Parameters
        ----------
        window
            Its start and stop.

        Returns
        -------
        Path
            In the folder of shards.
        """
        return self._folder.path / f"entries-{window[0]:08d}-{window[1]:08d}.safetensors"

    def _part(self, window: Range, covered: Sequence[Range]) -> Path:
        steps = f"{covered[0][0]:08d}-{covered[-1][1]:08d}"
        return self._folder.path / f"entries-{window[0]:08d}-{window[1]:08d}.part-{steps}.safetensors"

    def _summed(self, window: Range) -> int:
        # How many of the window's first pieces are in one sum on the disk.
        own = self._pieces[window]
        if self.file(window).exists():
            return len(own)
        return next((n for n in range(len(own), 0, -1) if self._part(window, own[:n]).exists()), 0)

    def _wanted(self) -> Iterator[tuple[Range, Range]]:
        for window, own in self._pieces.items():
            for piece in own[self._summed(window) :]:
                yield window, piece

    def missing(self) -> set[Range]:
        """List the chunks of which a window still lacks its part.

        Returns
        -------
        set of (int, int)
            Start and stop of each.
        """
        absent = [piece for window, piece in self._wanted() if not self._part(window, [piece]).exists()]
        return {
            (start, stop)
            for start, stop in chunks(self._recorded, self._chunk)
            if any(start <= piece[0] < stop for piece in absent)
        }

    def collect(self, start: int, stop: int) -> Collector:
        """Make ready to add up the entries of a chunk.

        Parameters
        ----------
        start, stop
            The chunk.

        Returns
        -------
        Collector
            To be given every step of it.
        """
        wanted = [(window, piece) for window, piece in self._wanted() if start <= piece[0] < stop]
        return Collector(wanted, self._write_part)

    def _write_part(self, window: Range, piece: Range, sums: Mapping[str, Any]) -> None:
        self._write(self._part(window, [piece]), window, [piece], sums)

    def _write(self, path: Path, window: Range, covered: Sequence[Range], sums: Mapping[str, Any]) -> None:
        steps = joined_ranges(covered)
        facts = {
            "format": FORMAT,
            "version": VERSION,
            "settings": self._folder.settings.hash,
            "start": window[0],
            "stop": window[1],
            "steps": [list(entry) for entry in steps],
            "attempts": _attempts_of(steps, self._attempts_within),
        }
        tensors = {parameter.name: sums[parameter.name] for parameter in self._folder.trained}
        tensorfile.write(path, tensors, facts)

    def add_up(self) -> None:
        """Add the parts that are next in the order of steps to the sums of their windows, and remove them.

        By one process only.
        """
        for window, own in self._pieces.items():
            done = stop = self._summed(window)
            if not self.file(window).exists():
                while stop < len(own) and self._part(window, [own[stop]]).exists():
                    stop += 1
                complete = stop == len(own)
                if complete or stop - done >= PARTS_AT_ONCE:
                    files = [self._part(window, own[:done])] if done else []
                    files += [self._part(window, [piece]) for piece in own[done:stop]]
                    path = self.file(window) if complete else self._part(window, own[:stop])
                    self._write(path, window, own[:stop], self._sum(files))
                    done = stop
            self._remove_parts(window, keep_from=done)

    def _sum(self, files: Sequence[Path]) -> dict[str, npt.NDArray[Any]]:
        opened = [tensorfile.TensorFile(path) for path in files]
        for file in opened:
            found = (file.facts.get("format"), file.facts.get("version"), file.facts.get("settings"))
            expected = (FORMAT, VERSION, self._folder.settings.hash)
            if found != expected:
                message = (
                    f"{file.path}: expected format, version and settings {expected}, found {found}; it does not belong "
                    "here: remove it and replay again"
                )
                raise FormatError(message)
        sums = {}
        for parameter in self._folder.trained:
            # One after the other: the order of the additions decides the last bit.
            total = opened[0].array(parameter.name)
            for file in opened[1:]:
                total += file.array(parameter.name)
            sums[parameter.name] = total
        return sums

    def _remove_parts(self, window: Range, keep_from: int) -> None:
        own = self._pieces[window]
        keep = {self._part(window, [piece]) for piece in own[keep_from:]}
        if keep_from and not self.file(window).exists():
            keep.add(self._part(window, own[:keep_from]))
        for path, name in _files(self._folder.path):
            if name[2] is not None and (int(name[0]), int(name[1])) == window and path not in keep:
                path.unlink(missing_ok=True)

    def remove_sums_of(self, steps: Iterable[Range]) -> None:
        """Remove the sums and parts of every window that has one of some steps: they are computed again.

        Parameters
        ----------
        steps
            Start and stop of ranges of steps.
        """
        again = tuple(steps)
        for window in self._pieces:
            if any(start < window[1] and window[0] < stop for start, stop in again):
                self.file(window).unlink(missing_ok=True)
                for path, name in _files(self._folder.path):
                    if (int(name[0]), int(name[1])) == window:
                        path.unlink(missing_ok=True)

    def finished(self) -> list[Path]:
        """List the files of the windows whose sum is complete.

        Returns
        -------
        list of Path
            In the order of steps.
        """
        return [self.file(window) for window in self._pieces if self.file(window).exists()]

    @property
    def bytes_to_come(self) -> int:
        """Bytes of the windows' sums that are not there yet, without their headers and their parts."""
        return len(self.unfinished()) * 8 * sum(parameter.size for parameter in self._folder.trained)

    def unfinished(self) -> list[tuple[Range, int, int]]:
        """List the windows that still lack steps.

        Returns
        -------
        list of ((int, int), int, int)
            The window, how many chunks it has of it, and of how many.
        """
        found = []
        for window, own in self._pieces.items():
            if not self.file(window).exists():
                done = self._summed(window)
                there = done + sum(self._part(window, [piece]).exists() for piece in own[done:])
                found.append((window, there, len(own)))
        return found


class Collector:
    """Adds up the entries of one chunk's steps, window by window.

    Parameters
    ----------
    wanted
        The window and the steps of each part, in the order of steps.
    write
        Called with window, steps and sums of each part that is complete.
    """

    def __init__(
        self, wanted: Sequence[tuple[Range, Range]], write: Callable[[Range, Range, dict[str, torch.Tensor]], None]
    ) -> None:
        self._wanted = list(wanted)
        self._write = write
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, t: int, allocation: Allocation) -> None:
        """Add the entries of a step, if it is in a window; what is complete with it is written.

        Parameters
        ----------
        t
            The step.
        allocation
            Its ledger.
        """
        if not any(start <= t < stop for _, (start, stop) in self._wanted):
            return
        for name in allocation.gradient:
            lca = allocation.lca(name)
            self._sums[name] = self._sums[name].add_(lca) if name in self._sums else lca
        window, (_, stop) = self._wanted[0]
        if stop == t + 1:
            _, piece = self._wanted.pop(0)
            self._write(window, piece, {name: entries.cpu() for name, entries in self._sums.items()})
            self._sums = {}


def remove_stale(folder: Path, attempts_within: Callable[[int, int], Attempts]) -> int:
    """Remove the sums and parts of steps that the run has recorded anew since.

    Parameters
    ----------
    folder
        A folder of shards.
    attempts_within
        Which attempts recorded a range of steps, as the run is now.

    Returns
    -------
    int
        How many files.
    """
    stale = []
    for path, _ in _files(folder):
        facts = tensorfile.TensorFile(path).facts
        if facts["attempts"] != _attempts_of(facts["steps"], attempts_within):
            stale.append(path)
    for path in stale:
        path.unlink(missing_ok=True)
    return len(stale)


def _attempts_of(steps: Iterable[Sequence[int]], attempts_within: Callable[[int, int], Attempts]) -> list[list[int]]:
    return [list(entry) for start, stop in steps for entry in attempts_within(start, stop)]


def _files(folder: Path) -> list[tuple[Path, tuple[str, str, str | None, str | None]]]:
    matches = [(path, _NAME.fullmatch(path.name)) for path in sorted(folder.iterdir())]
    return [(path, (match[1], match[2], match[3], match[4])) for path, match in matches if match]
