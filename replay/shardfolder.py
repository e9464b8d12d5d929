"""A folder of shards: what replay computed under one set of settings, a file for each range of steps.

Part of the shard format (docs/formats/shards.md); imports no torch. The settings decide the folder, so a rerun with
other settings never mixes with these, and the same settings give the same bytes whatever the number of workers or
interruptions.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recorder import durable
from recorder.errors import FormatError
from recorder.table import Parameter
from replay.columns import COUNTS, Shard
from replay.settings import Settings
from replay.settingsfile import read_settings, write_settings
from replay.shardfile import open_shard, read_per_step, read_shard, read_updates, write_shard

if TYPE_CHECKING:
    import numpy.typing as npt

    from recorder import tensorfile
    from replay.shardfile import Attempts

FOLDER = "shards"
LEFTOVER_SECONDS = 3600.0
"""A temporary file this old is a killed writer's; a younger one may be another process's, at work in the folder."""

_SHARD_NAME = re.compile(r"(\d{8})-(\d{8})\.safetensors")


class ShardFolder:
    """The shards of one run under one set of settings.

    Parameters
    ----------
    path
        ``RUN/shards/<settings-hash>``.
    settings
        What the shards were computed with.
    parameters
        The run's parameter table, untrained parameters included.
    provenance
        The run's manifest entries that a cube carries along: any JSON object.
    """

    def __init__(
        self, path: Path, settings: Settings, parameters: Sequence[Parameter], provenance: Mapping[str, Any]
    ) -> None:
        self.path = Path(path)
        self.settings = settings
        self.parameters = tuple(parameters)
        self.provenance = dict(provenance)

    @property
    def trained(self) -> tuple[Parameter, ...]:
        """The parameters that are in the ledger."""
        return tuple(parameter for parameter in self.parameters if parameter.trained)

    @classmethod
    def create(
        cls, run: Path, settings: Settings, parameters: Sequence[Parameter], provenance: Mapping[str, Any]
    ) -> ShardFolder:
        """Make the folder for these settings, or take the one that exists.

        Parameters
        ----------
        run
            The run's folder.
        settings, parameters, provenance
            As for the class.

        Returns
        -------
        ShardFolder
            The folder, swept of what a killed writer left. Settings that are there already are not written again:
            other processes make the same folder at the same time.
        """
        folder = cls.of(run, settings, parameters, provenance)
        folder.make()
        return folder

    @classmethod
    def of(
        cls, run: Path, settings: Settings, parameters: Sequence[Parameter], provenance: Mapping[str, Any]
    ) -> ShardFolder:
        """Name the folder for these settings, whether or not it exists; nothing is written.

        Parameters
        ----------
        run
            The run's folder.
        settings, parameters, provenance
            As for the class.

        Returns
        -------
        ShardFolder
            The folder; where it does not exist, it holds no shard.
        """
        return cls(Path(run) / FOLDER / settings.hash, settings, parameters, provenance)

    def make(self) -> None:
        """Make the folder, or sweep the one that exists, as `create` does."""
        self.path.mkdir(parents=True, exist_ok=True)
        _sweep(self.path)
        write_settings(self.path, self.settings, self.parameters, self.provenance)

    @classmethod
    def open(cls, path: Path) -> ShardFolder:
        """Open an existing folder of shards.

        A `FormatError` tells if its settings file is missing, of another version, or not understood.

        Parameters
        ----------
        path
            ``RUN/shards/<settings-hash>``.

        Returns
        -------
        ShardFolder
            The folder.
        """
        return cls(path, *read_settings(path))

    def file(self, start: int, stop: int) -> Path:
        """Return the path of the shard of steps `start` to `stop` - 1.

        Parameters
        ----------
        start, stop
            The range of steps.

        Returns
        -------
        Path
            The shard's path, whether or not it exists.
        """
        return self.path / f"{start:08d}-{stop:08d}.safetensors"

    def _ranges(self) -> list[tuple[int, int]]:
        if not self.path.is_dir():
            return []
        matches = [_SHARD_NAME.fullmatch(entry.name) for entry in self.path.iterdir()]
        return sorted(((int(match[1]), int(match[2])) for match in matches if match), key=lambda r: (r[0], -r[1]))

    def finished(self) -> list[tuple[int, int]]:
        """List the ranges of steps whose shard is there, in order.

        A shard is visible only when it is whole and on disk, so being there is being finished. A shard of a part of
        another one's steps, from when the run had fewer, does not count.

        Returns
        -------
        list of (int, int)
            Start and stop of each shard.

        Raises
        ------
        FormatError
            If two shards overlap otherwise.
        """
        ranges: list[tuple[int, int]] = []
        for start, stop in self._ranges():
            if ranges and stop <= ranges[-1][1]:
                continue
            if ranges and start < ranges[-1][1]:
                message = f"{self.path}: two shards both hold step {start}; remove one of them"
                raise FormatError(message)
            ranges.append((start, stop))
        return ranges

    def stale(self, attempts_within: Callable[[int, int], Attempts]) -> list[tuple[int, int]]:
        """List the shards of steps that the run has recorded anew since.

        Parameters
        ----------
        attempts_within
            Which attempts recorded a range of steps, as the run is now.

        Returns
        -------
        list of (int, int)
            Start and stop of each such shard.
        """
        return [
            (start, stop)
            for start, stop in self._ranges()
            if self._open_shard(start, stop).facts.get("attempts")
            != [list(entry) for entry in attempts_within(start, stop)]
        ]

    def remove(self, start: int, stop: int) -> None:
        """Remove the shard of steps `start` to `stop` - 1.

        Parameters
        ----------
        start, stop
            The range of steps.
        """
        self.file(start, stop).unlink(missing_ok=True)

    def attempts(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Say which attempts of the training the shard of steps `start` to `stop` - 1 was computed from.

        Parameters
        ----------
        start, stop
            The range of steps.

        Returns
        -------
        list of (int, int, int)
            Number of the attempt, start and stop, in order.
        """
        return [
            (number, first, last) for number, first, last in self._open_shard(start, stop).facts.get("attempts", ())
        ]

    def write(self, start: int, stop: int, shard: Shard, attempts: Attempts = ()) -> Path:
        """Write the shard of steps `start` to `stop` - 1, durably and all at once.

        A shard of a part of these steps, from when the run had fewer, gives way.

        Parameters
        ----------
        start, stop
            The range of steps.
        shard
            Its content; checked against the formats `PER_STEP`, `PER_UNIT` and `PER_PARAMETER`.
        attempts
            Which attempts of the training recorded these steps: number, start and stop of each.

        Returns
        -------
        Path
            The shard's file.
        """
        path = self.file(start, stop)
        write_shard(path, shard, self.trained, settings=self.settings.hash, start=start, stop=stop, attempts=attempts)
        for first, last in self._ranges():
            if start <= first and last <= stop and (first, last) != (start, stop):
                self.file(first, last).unlink(missing_ok=True)
        return path

    def read(self, start: int, stop: int) -> Shard:
        """Read the shard of steps `start` to `stop` - 1, every checksum verified.

        A `FormatError` tells if the file was moved here from other settings, or bears the name of other steps.

        Parameters
        ----------
        start, stop
            One of the ranges of `finished`.

        Returns
        -------
        Shard
            Its content.
        """
        return read_shard(self._open_shard(start, stop), self.trained)

    def read_per_step(self, start: int, stop: int) -> dict[str, npt.NDArray[Any]]:
        """Read of a shard only what it holds once a step: little, however large the model.

        Parameters
        ----------
        start, stop
            One of the ranges of `finished`.

        Returns
        -------
        dict of str to numpy.ndarray
            The arrays of `PER_STEP`.
        """
        return read_per_step(self._open_shard(start, stop))

    def sampled(self, start: int, stop: int) -> bool:
        """Say whether a shard holds what standard errors are made of; nothing else of it is read.

        Parameters
        ----------
        start, stop
            One of the ranges of `finished`.

        Returns
        -------
        bool
            Whether it does.
        """
        return COUNTS in self._open_shard(start, stop).names

    def updates(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Read after how many updates the steps of a shard begin and end.

        Parameters
        ----------
        start, stop
            One of the ranges of `finished`.

        Returns
        -------
        numpy.ndarray
            int64 of shape (steps, 2); t and t + 1 for step t of a recorded run.
        """
        return read_updates(self._open_shard(start, stop))

    def _open_shard(self, start: int, stop: int) -> tensorfile.TensorFile:
        return open_shard(self.file(start, stop), settings=self.settings.hash, start=start, stop=stop)


def _sweep(folder: Path) -> None:
    for leftover in folder.glob(f".*{durable.TEMPORARY_SUFFIX}"):
        try:
            if time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:
                leftover.unlink()
        except FileNotFoundError:
            continue  # its writer has just renamed it
