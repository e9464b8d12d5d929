"""Tasks handed to workers, one at a time each, and what becomes of them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import time
import uuid
from collections import deque
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed import Future, KilledWorker

from recorder.errors import UsageError
from replay.cluster.schedulers import TICK, open_cluster
from replay.cluster.worker import TaskError, do_task
from replay.job import Job, Receipt, Task
from replay.lossdata import parse
from replay.outcomes import Failure, Outcome, StalledError
from replay.where import Where
from replay.work import replayer

if TYPE_CHECKING:
    from replay.follow import Following


def run_in_cluster(
    job: Job, tasks: Sequence[Task], where: Where, following: Following | None = None
) -> Generator[Outcome]:
    """Do the tasks in a cluster of worker processes.

    Parameters
    ----------
    job
        What to do.
    tasks
        Its parts.
    where
        In which processes.
    following
        Where more of its parts come from.

    Yields
    ------
    Receipt or Failure
        Of each task, in the order in which they end.

    Raises
    ------
    StalledError
        If no step is finished for too long, or the scheduler is gone; what was finished is on disk.
    """
    folders = replayer(job).folders
    # Workers started in another folder find the same files.
    away = dataclasses.replace(
        job, run=str(Path(job.run).resolve()), loss_data=tuple(from_anywhere(text) for text in job.loss_data)
    )
    expected = {name: folder.settings.hash for name, folder in folders.items()}
    token = uuid.uuid4().hex
    events: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    waiting = deque((task, 1) for task in tasks)
    doing: dict[str, _Effort] = {}
    with contextlib.closing(open_cluster(job, where.workers if following else len(tasks), where)) as cluster:
        client = cluster.client
        client.subscribe_topic(token, lambda event: events.put(("told", event[1])))
        progress, most, silent, stuck = time.monotonic(), 0, 0, 0
        while waiting or doing or (following is not None and not following.ended):
            if following is not None:
                waiting.extend((task, 1) for task in following.due())
            if not waiting and not doing:  # to wait for the training is not to stall
                progress = time.monotonic()
            ready = cluster.workers()
            if ready > most or (cluster.silent and not silent):  # to start is to go on; to start again and again is not
                progress, most, silent = time.monotonic(), max(ready, most), cluster.silent
            while waiting and len(doing) < ready:
                task, number = waiting.popleft()
                # Of this command alone: another replay may use the same scheduler.
                key = f"{token}-{task.start}-{task.stop}-{number}"
                future = client.submit(do_task, key, away, expected, task, key=key, pure=False)
                doing[key] = _Effort(task, number, future)
                future.add_done_callback(lambda future: events.put(("ended", future.key)))
            for key, effort in list(doing.items()):
                if effort.told and time.monotonic() - effort.heard > where.stall_seconds and cluster.ours:
                    del doing[key]
                    stuck += 1
                    # Before its worker is killed, or the scheduler would give it to the next one.
                    effort.future.cancel()
                    cluster.replace(effort.worker)
                    progress = time.monotonic()
                    yield Failure(task=effort.task, reason=_stalled(where, [effort], ready))
            # More than one for each worker, with nothing finished in between: it is not the chunks.
            if time.monotonic() - progress > where.stall_seconds or stuck > most:
                raise StalledError(_stalled(where, list(doing.values()), ready))
            try:
                what, content = events.get(timeout=TICK)
            except queue.Empty:
                continue
            progress = time.monotonic()
            if what == "told":
                key, name, line = content
                if key in doing:
                    doing[key].worker, doing[key].told, doing[key].heard = name, line, progress
                continue
            if content not in doing:  # given up
                continue
            effort = doing.pop(content)
            task, future = effort.task, effort.future
            if future.status == "cancelled":
                message = f"the dask scheduler{f' at {where.address}' if where.address else ''} is gone"
                raise StalledError(message)
            if future.status == "error":
                failure = _failure(task, future)
                if failure.trace and effort.number == 1:
                    # The fault may be the worker's: of too little memory left, of a GPU that has failed.
                    cluster.replace(future.exception(timeout=30).worker)
                    waiting.appendleft((task, 2))
                    failure = dataclasses.replace(failure, again=True)
                yield failure
            else:
                # Finished, or even lost again with its worker; what counts is on the disk.
                stuck = 0
                yield _receipt(task, [folders[name].file(task.start, task.stop) for name in task.loss_data])


def from_anywhere(loss_data: str) -> str:
    """Put a loss data so that it means the same in any folder.

    Parameters
    ----------
    loss_data
        As on the command line.

    Returns
    -------
    str
        The same, with the whole path of its file.
    """
    file = parse(loss_data).file
    return loss_data if file is None else loss_data.replace(f"file:{file}", f"file:{Path(file).resolve()}", 1)


@dataclasses.dataclass(slots=True)
class _Effort:
    """A task on the scheduler."""

    task: Task
    number: int
    future: Future
    told: str = ""
    heard: float = 0.0
    worker: str = ""


def _stalled(where: Where, doing: Sequence[_Effort], ready: int) -> str:
    at = "; ".join(effort.told for effort in doing if effort.told)
    return (
        f"no step was finished for {where.stall_seconds:g} s with {ready} workers ready{f' ({at})' if at else ''}; "
        "if a step may take longer, raise --stall-seconds"
    )


def _receipt(task: Task, files: Sequence[Path]) -> Outcome:
    unseen = [file for file in files if file.name not in os.listdir(file.parent)]  # noqa: PTH208 (lists anew over NFS)
    if unseen:
        reason = f"a worker wrote {unseen[0]}, which is not seen here: the run must be on a file system that all share"
        return Failure(task=task, reason=reason)
    return Receipt(task=task, files=tuple(map(str, files)))


def _failure(task: Task, future: Future) -> Failure:
    error = future.exception(timeout=30)
    if isinstance(error, TaskError):
        if error.of_all:
            raise UsageError(error.reason)
        return Failure(task=task, reason=error.reason, trace=error.trace)
    if isinstance(error, KilledWorker):
        reason = f"{error.allowed_failures + 1} workers died at it: of too little memory, a crash, or a kill"
        return Failure(task=task, reason=reason)
    return Failure(task=task, reason=f"{type(error).__name__}: {error}")
