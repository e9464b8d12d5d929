"""What a replay is asked to do, and the tasks that it is cut into.

Both travel to any process: they carry paths and ranges of steps, never models.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from replay import dropout
from replay.chunks import chunks

if TYPE_CHECKING:
    from recorder.runformat import Run
    from replay.entries import EntryFolder
    from replay.shardfolder import ShardFolder


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Everything a worker needs to know: hashable, and of plain types so that it travels to any process.

    Parameters
    ----------
    run
        The run's folder.
    run_id
        The run's identity: another run may take the same folder.
    loss_data
        As on the command line.
    rule
        Name of the quadrature rule.
    rtol, atol
        The tolerance of an entry.
    chunk
        Steps to a shard.
    device
        ``cpu`` or ``cuda``.
    dtype
        Name of the precision; None for what fits the recorded parameters.
    threads
        Threads of torch in each worker.
    workload, data
        As on the command line.
    check_every
        Take the losses at both ends at steps that are multiples of this.
    dropout
        ``off``, or ``recorded`` for the loss data whose examples the training saw in that order.
    windows
        Start and stop of the windows of steps whose LCA is kept for every entry.
    table
        Digest of the run's parameter table: a training that is followed may go on to unfreeze parameters.
    whole
        Names of the tied parameters whose uses are not told apart.
    """

    run: str
    run_id: str
    loss_data: tuple[str, ...]
    rule: str
    rtol: float
    atol: float
    chunk: int
    device: str
    dtype: str | None
    threads: int
    workload: str | None
    data: str | None
    check_every: int = 1
    dropout: str = dropout.OFF
    windows: tuple[tuple[int, int], ...] = ()
    table: str = ""
    whole: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A chunk of steps, and the loss data whose shard of it is still missing.

    Parameters
    ----------
    start, stop
        The range of steps.
    loss_data
        Names.
    """

    start: int
    stop: int
    loss_data: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """Says that a task's shards are on disk.

    Parameters
    ----------
    task
        The task.
    files
        Its shards.
    """

    task: Task
    files: tuple[str, ...]


def plan(
    job: Job,
    folders: Mapping[str, ShardFolder],
    run: Run,
    *,
    entries: Mapping[str, EntryFolder] | None = None,
    outdated: Mapping[str, Iterable[tuple[int, int]]] | None = None,
    again: bool = False,
    whole: bool = False,
) -> list[Task]:
    """List what is still to do: chunks of consecutive recorded steps whose shard is missing.

    Parameters
    ----------
    job
        Says the chunk length.
    folders
        Loss data to its folder of shards.
    run
        Says which steps are recorded. Of a chunk that was pruned in part what is left is a chunk.
    entries
        Loss data to what it keeps of single entries: a chunk of which that is missing is done again.
    outdated
        Loss data to the shards that do not count as finished: of steps that were recorded anew.
    again
        List the finished chunks too.
    whole
        Leave out a last chunk that further steps would make longer.

    Returns
    -------
    list of Task
        In the order of steps.
    """
    finished = {name: set() if again else set(folder.finished()) for name, folder in folders.items()}
    for name, of_entries in (entries or {}).items():
        finished[name] -= of_entries.missing()
    for name, of_name in (outdated or {}).items():
        finished[name] -= set(of_name)
    tasks = []
    left = list(chunks(run.consecutive, job.chunk))
    starts = [start for start, _ in left]
    for first, last in chunks(run.ever_recorded, job.chunk):
        unfinished = [name for name in folders if (first, last) not in finished[name]]
        for start, stop in left[bisect_left(starts, first) : bisect_left(starts, last)]:
            missing = tuple(name for name in unfinished if (start, stop) not in finished[name])
            if missing:
                tasks.append(Task(start=start, stop=stop, loss_data=missing))
    if whole and tasks and tasks[-1].stop == left[-1][1] and tasks[-1].stop % job.chunk:
        tasks.pop()
    return tasks
