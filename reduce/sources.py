"""Which folders of shards go into a cube: one for every loss data, all of the same run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recorder.errors import FormatError, UsageError
from replay import shards

if TYPE_CHECKING:
    import numpy.typing as npt

    Steps = npt.NDArray[np.int64]
    Updates = npt.NDArray[np.int64]

_RANGES_SHOWN = 8
RECORDED = "recorded"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Source:
    """The shards of one loss data.

    Parameters
    ----------
    folder
        Their folder.
    ranges
        Start and stop of each shard, in order.
    """

    folder: shards.ShardFolder
    ranges: tuple[tuple[int, int], ...]

    @property
    def loss_data(self) -> str:
        """Name of the loss data."""
        return self.folder.settings.loss_data

    @property
    def steps(self) -> Steps:
        """The steps that were replayed, in order."""
        parts = [np.arange(start, stop, dtype=np.int64) for start, stop in self.ranges]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def choose(run: Path, hashes: Sequence[str] = ()) -> tuple[Source, ...]:
    """Choose one folder of shards for every loss data that the run was replayed on.

    Parameters
    ----------
    run
        The run's folder.
    hashes
        Settings hashes that decide where a loss data was replayed with several settings.

    Returns
    -------
    tuple of Source
        Ordered by the name of the loss data. Where no hash decides, shards of a former parameter table are passed
        over, as long as there are some of the present one.

    Raises
    ------
    UsageError
        If a hash is unknown, or a choice is left open, or the chosen follow different paths.
    """
    folders = shards.folders(run)
    outdated = {folder.settings.hash for folder in _outdated(run, folders)}
    chosen = []
    unknown = set(hashes) - {folder.settings.hash for folder in folders}
    if unknown:
        known = "; ".join(_describe(folder, ("rule",)) for folder in folders)
        message = f"{run}: no shards of settings {', '.join(sorted(unknown))}; there are: {known}"
        raise UsageError(message)
    for name in dict.fromkeys(folder.settings.loss_data for folder in folders):
        candidates = [folder for folder in folders if folder.settings.loss_data == name]
        wanted = (
            [folder for folder in candidates if folder.settings.hash in hashes]
            or [folder for folder in candidates if folder.settings.hash not in outdated]
            or candidates
        )
        if len(wanted) > 1:
            fields = tuple(dict.fromkeys(("rule", *_differing(wanted))))
            found = "; ".join(_describe(folder, fields) for folder in wanted)
            message = (
                f"{run}: loss data {name!r} was replayed with {len(wanted)} settings: {found}. "
                "Pass --settings HASH once for this loss data."
            )
            raise UsageError(message)
        chosen.append(wanted[0])
    _check_same_run(chosen)
    if len({folder.settings.path for folder in chosen}) > 1:
        found = "; ".join(_describe(folder, ("path",)) for folder in chosen)
        message = f"{run}: expected shards along one path, found {found}. Replay all loss data along the same path."
        raise UsageError(message)
    return tuple(Source(folder=folder, ranges=tuple(folder.finished())) for folder in chosen)


def passed_over(run: Path, chosen: Sequence[Source]) -> list[str]:
    """Say which shards were not chosen because the parameter table has changed since.

    Parameters
    ----------
    run
        The run's folder.
    chosen
        What `choose` gave.

    Returns
    -------
    list of str
        A line for each folder.
    """
    taken = {source.folder.settings.hash: source for source in chosen}
    return [
        f"{folder.settings.loss_data}: the shards {folder.settings.hash} of a former parameter table are passed over"
        for folder in _outdated(run, shards.folders(run))
        if folder.settings.hash not in taken
    ]


def _outdated(run: Path, folders: Sequence[shards.ShardFolder]) -> list[shards.ShardFolder]:
    table = shards.marked_table(run)
    present = {folder.settings.loss_data for folder in folders if folder.settings.parameter_table == table}
    return [
        folder
        for folder in folders
        if folder.settings.parameter_table != table and folder.settings.loss_data in present
    ]


def all_steps(sources: Sequence[Source]) -> Steps:
    """Return the steps that were replayed on any loss data.

    Parameters
    ----------
    sources
        The chosen shards.

    Returns
    -------
    numpy.ndarray
        Array of shape (steps,), int64, ascending.
    """
    steps: Steps = np.unique(np.concatenate([source.steps for source in sources]))
    return steps


def updates(sources: Sequence[Source], steps: Steps) -> Updates:
    """Tell after how many updates each step begins and ends.

    Parameters
    ----------
    sources
        The chosen shards.
    steps
        Array of shape (steps,), int64, ascending: steps of a recorded run, intervals between checkpoints of path
        ``chord``.

    Returns
    -------
    numpy.ndarray
        int64 of shape (steps, 2).

    Raises
    ------
    FormatError
        If loss data contradict each other: they were not replayed from the same checkpoints.
    """
    if sources[0].folder.settings.path == RECORDED:
        return np.stack([steps, steps + 1], axis=1)
    found: Updates = np.full((len(steps), 2), -1, dtype=np.int64)
    for source in sources:
        for start, stop in source.ranges:
            rows = np.searchsorted(steps, np.arange(start, stop))
            of_shard = source.folder.updates(start, stop)
            known = found[rows, 0] >= 0
            if not np.array_equal(found[rows][known], of_shard[known]):
                message = (
                    f"{source.folder.file(start, stop)}: expected the updates {found[rows].tolist()} as on the other "
                    f"loss data, found {of_shard.tolist()}; the loss data were not replayed from the same checkpoints"
                )
                raise FormatError(message)
            found[rows] = of_shard
    return found


def missing(source: Source, steps: Steps, ends: Updates | None = None) -> str:
    """Describe the steps that were not replayed on a loss data.

    Parameters
    ----------
    source
        Its shards.
    steps
        All steps of the cube, ascending.
    ends
        As `updates` gives them; by default each step is one update.

    Returns
    -------
    str
        Such as ``8-11, 20``, in updates; empty where nothing is missing. Steps next to each other in the cube make a
        range.
    """
    ends = np.stack([steps, steps + 1], axis=1) if ends is None else ends
    there = np.isin(steps, source.steps, assume_unique=True)
    edges = np.flatnonzero(np.diff(np.concatenate(([True], there, [True]))))
    gaps = [(ends[first, 0], ends[stop - 1, 1] - 1) for first, stop in zip(edges[::2], edges[1::2], strict=True)]
    texts = [f"{first}" if first == last else f"{first}-{last}" for first, last in gaps[:_RANGES_SHOWN]]
    if len(gaps) > _RANGES_SHOWN:
        texts.append(f"and {len(gaps) - _RANGES_SHOWN} more ranges")
    return ", ".join(texts)


def provenance(sources: Sequence[Source]) -> dict[str, Any]:
    """Return the run's provenance, and under ``loss_data`` what every loss data was replayed with.

    Parameters
    ----------
    sources
        The chosen shards.

    Returns
    -------
    dict
        A JSON object.
    """
    replayed = {
        source.loss_data: {
            "hash": source.folder.settings.hash,
            **dataclasses.asdict(source.folder.settings),
        }
        for source in sources
    }
    return {**sources[0].folder.provenance, "loss_data": replayed}


def _check_same_run(folders: Sequence[shards.ShardFolder]) -> None:
    first = folders[0]
    for folder in folders[1:]:
        if folder.settings.run_id != first.settings.run_id:
            message = (
                f"{folder.path}: expected shards of run {first.settings.run_id!r} as in {first.path}, "
                f"found run {folder.settings.run_id!r}; move them to their own run's folder"
            )
            raise FormatError(message)
        if folder.parameters != first.parameters:
            differing = set(folder.parameters) ^ set(first.parameters)
            names = ", ".join(sorted({parameter.name for parameter in differing})) or "their order"
            message = (
                f"{folder.path}: expected the parameter table of {first.path}, found another (different: {names}); "
                "replay both with the same lossledger: python -m replay takes over what it can of a former table"
            )
            raise FormatError(message)


def _differing(folders: Sequence[shards.ShardFolder]) -> list[str]:
    documents = [dataclasses.asdict(folder.settings) for folder in folders]
    return [name for name in documents[0] if any(other[name] != documents[0][name] for other in documents)]


def _describe(folder: shards.ShardFolder, fields: Sequence[str]) -> str:
    settings = dataclasses.asdict(folder.settings)
    steps = sum(stop - start for start, stop in folder.finished())
    facts = [f"{name} {_text(settings[name])}" for name in fields]
    return f"{folder.settings.hash} (loss data {folder.settings.loss_data}, {', '.join(facts)}, {steps} steps)"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
