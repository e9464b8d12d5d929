"""The LCA of every single entry, summed over windows of steps: one file a window, beside the shards.

    RUN/shards/<settings-hash>/entries-00000000-00000100.safetensors                           steps 0 to 99
    RUN/shards/<settings-hash>/entries-00000000-00000100.part-00000000-00000008.safetensors    of which 0 to 7

Described in docs/formats/shards.md; what is in a file is the matter of `entryfile`. A chunk of steps leaves its part of
each window; one process adds up the parts in the order of steps, whatever the order in which they came. A sum of the
first parts is a part again, so that what is on the disk always says how far the sum has got: an interruption changes no
bit of the result. Imports no torch.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from recorder.errors import UsageError
from recorder.ranges import describe_ranges, joined_ranges, overlap
from replay.chunks import Range, chunks, pieces
from replay.collector import Collector
from replay.entryfile import added_up, entry_files, name_of, summed_over, write_entries
from replay.ledger import sharers

if TYPE_CHECKING:
    from replay.shardfile import Attempts
    from replay.shardfolder import ShardFolder

LOCK_FILE = ".entries-lock"

PARTS_AT_ONCE = 8
"""Every addition writes a file as large as the model in float64: it waits for so many parts, or for the last one."""


class EntryFolder:
    """What one folder of shards keeps of single entries.

    Parameters
    ----------
    folder
        The folder of shards.
    windows
        Start and stop of each window, without overlap.
    recorded
        Start and stop of consecutive recorded steps, with those that were pruned since, and with those to come: until
        they have come, a window is not complete.
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
        # One tensor for each parameter of the model, whatever the number of its uses.
        self._parameters = [row for row in folder.trained if row.tied_to is None]
        self._chunk = folder.settings.chunk
        self._recorded = tuple(recorded)
        self._attempts_within = attempts_within
        cut = {window: pieces(window, recorded, self._chunk) for window in windows}
        self._pieces = {window: own for window, own in cut.items() if own}

    def holds(self, window: Range) -> bool:
        """Tell whether any step of a window was recorded, or is to come.

        Parameters
        ----------
        window
            Its start and stop.

        Returns
        -------
        bool
            False where there is nothing to sum.
        """
        return window in self._pieces

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
        return self._folder.path / name_of(window)

    def _part(self, window: Range, covered: Sequence[Range]) -> Path:
        return self._folder.path / name_of(window, (covered[0][0], covered[-1][1]))

    def _there(self) -> dict[Range, set[Range]]:
        # For every window the steps of what is on the disk; one look at the folder, for that may be far away.
        there: dict[Range, set[Range]] = {window: set() for window in self._pieces}
        for _, window, steps in entry_files(self._folder.path):
            if window in there:
                there[window].add(steps or window)
        return there

    def _summed(self, window: Range, there: set[Range]) -> int:
        # How many of the window's first pieces are in one sum.
        own = self._pieces[window]
        if self.file(window).exists():
            return len(own)
        ends = {last: number for number, (_, last) in enumerate(own, start=1)}
        return max((ends.get(last, 0) for first, last in there if first == own[0][0]), default=0)

    def _wanted(self) -> Iterator[tuple[Range, Range, bool]]:
        # Pieces that are in no sum yet, and whether their part is there.
        for window, there in self._there().items():
            for piece in self._pieces[window][self._summed(window, there) :]:
                yield window, piece, piece in there

    def missing(self) -> set[Range]:
        """List the chunks of which a window still lacks its part.

        Returns
        -------
        set of (int, int)
            Start and stop of each.
        """
        absent = sorted(piece[0] for _, piece, there in self._wanted() if not there)
        return {
            (start, stop)
            for start, stop in chunks(self._recorded, self._chunk)
            if bisect.bisect_left(absent, start) < bisect.bisect_left(absent, stop)
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
        wanted = [(window, piece) for window, piece, _ in self._wanted() if start <= piece[0] < stop]
        return Collector(wanted, self._write_part, sharers(self._folder.trained))

    def _write_part(self, window: Range, piece: Range, sums: Mapping[str, Any]) -> None:
        self._write(self._part(window, [piece]), window, [piece], sums)

    def _write(self, path: Path, window: Range, covered: Sequence[Range], sums: Mapping[str, Any]) -> None:
        steps = joined_ranges(covered)
        write_entries(
            path,
            {parameter.name: sums[parameter.name] for parameter in self._parameters},
            settings=self._folder.settings.hash,
            window=window,
            steps=steps,
            attempts=_attempts_of(steps, self._attempts_within),
        )

    def add_up(self) -> None:
        """Add the parts that are next in the order of steps to the sums of their windows, and remove them.

        By one process at a time: another one waits.
        """
        if self._pieces:
            with _alone(self._folder.path):
                self._add_up()

    def _add_up(self) -> None:
        for window, there in self._there().items():
            own = self._pieces[window]
            done = stop = self._summed(window, there)
            if not self.file(window).exists():
                while stop < len(own) and own[stop] in there:
                    stop += 1
                complete = stop == len(own)
                if complete or stop - done >= PARTS_AT_ONCE:
                    files = [self._part(window, own[:done])] if done else []
                    files += [self._part(window, [piece]) for piece in own[done:stop]]
                    path = self.file(window) if complete else self._part(window, own[:stop])
                    names = [row.name for row in self._parameters]
                    sums = added_up(files, names, settings=self._folder.settings.hash)
                    self._write(path, window, own[:stop], sums)
                    done = stop
            self._remove_parts(window, keep_from=done)

    def _remove_parts(self, window: Range, keep_from: int) -> None:
        own = self._pieces[window]
        keep = {self._part(window, [piece]) for piece in own[keep_from:]}
        if keep_from and not self.file(window).exists():
            keep.add(self._part(window, own[:keep_from]))
        for path, of_window, steps in entry_files(self._folder.path):
            if of_window == window and steps is not None and path not in keep:
                path.unlink(missing_ok=True)

    def refuse_pruned(self, pruned: Sequence[Range], recorded: Sequence[Range]) -> None:
        """Make sure that what the windows lack can still be computed.

        Parameters
        ----------
        pruned
            Start and stop of ranges of steps that were pruned.
        recorded
            The same of those that are there.

        Raises
        ------
        UsageError
            If steps were pruned before their entries were kept.
        """
        lost = sorted(chunk for chunk in self.missing() if overlap(pruned, *chunk))
        if lost:
            message = (
                f"--per-parameter: of {describe_ranges(lost)} the entries on {self._folder.settings.loss_data} were "
                f"not kept, and the steps were pruned since; ask for windows within {describe_ranges(recorded)}"
            )
            raise UsageError(message)

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
                for path, of_window, _ in entry_files(self._folder.path):
                    if of_window == window:
                        path.unlink(missing_ok=True)

    def finished(self) -> list[Path]:
        """List the files of the windows whose sum is complete.

        Returns
        -------
        list of Path
            In the order of steps.
        """
        return [self.file(window) for window in self._pieces if self.file(window).exists()]

    def bytes_to_come(self, steps: Iterable[Range], *, again: bool = False) -> int:
        """Count the bytes of the sums of the windows that have one of some steps, without their headers and parts.

        Parameters
        ----------
        steps
            Start and stop of ranges of steps.
        again
            Count also the sums that are there: they are computed again.

        Returns
        -------
        int
            Bytes.
        """
        ranges = tuple(steps)
        windows = [
            window
            for window in self._pieces
            if any(start < window[1] and window[0] < stop for start, stop in ranges)
            and (again or not self.file(window).exists())
        ]
        return len(windows) * 8 * sum(parameter.size for parameter in self._parameters)

    def unfinished(self) -> list[tuple[Range, int, int]]:
        """List the windows that still lack steps.

        Returns
        -------
        list of ((int, int), int, int)
            The window, how many chunks it has of it, and of how many.
        """
        found = []
        for window, there in self._there().items():
            if not self.file(window).exists():
                own = self._pieces[window]
                done = self._summed(window, there)
                found.append((window, done + sum(piece in there for piece in own[done:]), len(own)))
        return found


def remove_stale(folder: Path, recorded: Sequence[Range], attempts_within: Callable[[int, int], Attempts]) -> int:
    """Remove the sums and parts of steps that the run has recorded anew since, or of which it has recorded more.

    Parameters
    ----------
    folder
        A folder of shards.
    recorded
        Start and stop of consecutive recorded steps, as the run is now, with those that were pruned since.
    attempts_within
        Which attempts recorded a range of steps, as the run is now.

    Returns
    -------
    int
        How many files.
    """
    if next(entry_files(folder), None) is None:
        return 0
    with _alone(folder):
        return _remove_stale(folder, recorded, attempts_within)


def _remove_stale(folder: Path, recorded: Sequence[Range], attempts_within: Callable[[int, int], Attempts]) -> int:
    stale = []
    for path, window, steps in entry_files(folder):
        now = joined_ranges(pieces(steps or window, recorded, length=1))
        if summed_over(path) != ([list(entry) for entry in now], _attempts_of(now, attempts_within)):
            stale.append(path)
    for path in stale:
        path.unlink(missing_ok=True)
    return len(stale)


def _alone(folder: Path) -> FileLock:
    # Commands may work side by side in one folder; the operating system gives back what a killed one held.
    return FileLock(folder / LOCK_FILE, is_singleton=False)


def _attempts_of(steps: Iterable[Sequence[int]], attempts_within: Callable[[int, int], Attempts]) -> list[list[int]]:
    return [list(entry) for start, stop in steps for entry in attempts_within(start, stop)]
