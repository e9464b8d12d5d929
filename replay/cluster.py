"""Run tasks in worker processes through dask.distributed: the only place of replay that names dask.

By default a scheduler in this process, with workers of our own (`replay.workers`), one thread of torch each, on
loopback with TLS and without a dashboard: a default LocalCluster lets any local user run code as its owner. Or any
scheduler that is there already, with whatever workers it has.

A worker is given one chunk at a time. So a worker's death is blamed on the chunk it was at, not on those that waited,
and what is lost with this process is the chunks in the making.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import logging
import os
import queue
import sys
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import dask
from distributed import Client, Future, KilledWorker, LocalCluster, Security, Worker, get_worker
from distributed.utils import silence_logging_cmgr

from recorder import commandline
from recorder.errors import UsageError
from replay import heap
from replay.job import Job, Receipt, Task
from replay.lossdata import parse
from replay.outcomes import Failure, Outcome, StalledError, reason_and_trace
from replay.where import Where
from replay.work import do, replayer
from replay.workers import WorkerProcesses, end_with_the_driver

TICK = 0.2
"""Seconds between two looks at the workers."""

DEATHS = 3
"""So many workers may die at a chunk until it is given up."""

_CREDENTIALS = ("tls_ca_file", "tls_worker_cert", "tls_worker_key")


class _Cluster(Protocol):
    """A scheduler to submit to, and a look at its workers."""

    client: Client
    ours: bool
    """Whether its workers are processes of our own."""

    def workers(self) -> int:
        """Count the workers that are ready; never waits."""

    def replace(self, name: str) -> None:
        """Put another process in the place of a worker, if it is ours."""

    def close(self) -> None:
        """Leave it as it was found."""


def run_in_cluster(job: Job, tasks: Sequence[Task], where: Where) -> Generator[Outcome]:
    """Do the tasks in a cluster of worker processes.

    Parameters
    ----------
    job
        What to do.
    tasks
        Its parts.
    where
        In which processes.

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
        job, run=str(Path(job.run).resolve()), loss_data=tuple(_from_anywhere(text) for text in job.loss_data)
    )
    expected = {name: folder.settings.hash for name, folder in folders.items()}
    token = uuid.uuid4().hex
    events: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    waiting = deque((task, 1) for task in tasks)
    doing: dict[str, _Effort] = {}
    with contextlib.closing(_cluster(job, len(tasks), where)) as cluster:
        client = cluster.client
        client.subscribe_topic(token, lambda event: events.put(("told", event[1])))
        progress, most, stuck = time.monotonic(), 0, 0
        while waiting or doing:
            ready = cluster.workers()
            if ready > most:  # to start is to go on; to start again and again is not
                progress, most = time.monotonic(), ready
            while waiting and len(doing) < ready:
                task, number = waiting.popleft()
                # Of this command alone: another replay may use the same scheduler.
                key = f"{token}-{task.start}-{task.stop}-{number}"
                future = client.submit(_do, key, away, expected, task, key=key, pure=False)
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


def _from_anywhere(loss_data: str) -> str:
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
    if isinstance(error, _TaskError):
        if error.of_all:
            raise UsageError(error.reason)
        return Failure(task=task, reason=error.reason, trace=error.trace)
    if isinstance(error, KilledWorker):
        reason = f"{error.allowed_failures + 1} workers died at it: of too little memory, a crash, or a kill"
        return Failure(task=task, reason=reason)
    return Failure(task=task, reason=f"{type(error).__name__}: {error}")


# ---------------------------------------------------------------------------------------------- in a worker


class _TaskError(Exception):
    """What went wrong at a task, as plain facts that travel from any worker."""

    def __init__(self, worker: str, reason: str, trace: str = "", *, of_all: bool = False) -> None:
        super().__init__(worker, reason, trace)
        self.worker, self.reason, self.trace, self.of_all = worker, reason, trace, of_all

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(_TaskError, of_all=self.of_all), self.args


_one_at_a_time = threading.Lock()
_served = ""


def _do(key: str, job: Job, expected: Mapping[str, str], task: Task) -> None:
    worker = get_worker()
    # A worker of somebody else's cluster may have several threads; a replayer has one model.
    with _one_at_a_time:
        try:
            _do_alone(key, job, expected, task)
        except Exception as error:
            try:
                reason, trace = reason_and_trace(error)
            except UsageError:
                raise _TaskError(str(worker.name), str(error), of_all=True) from None
            raise _TaskError(str(worker.name), reason, trace) from None


def _do_alone(key: str, job: Job, expected: Mapping[str, str], task: Task) -> None:
    global _served
    token = key.partition("-")[0]
    if _served != token:
        # The run may have grown since an earlier command that this worker served.
        replayer.cache_clear()
        _served = token
    worker = get_worker()
    whose = f"steps {task.start}-{task.stop - 1} at worker {worker.address}, process {os.getpid()}"
    worker.log_event(token, (key, str(worker.name), f"{whose}: begun"))
    opened = replayer(job)
    for name, folder in opened.folders.items():
        if folder.settings.hash != expected[name]:
            message = (
                f"worker {worker.address} computes otherwise than the process that asks: its recipe is "
                f"{dict(folder.settings.recipe)}, and its results would not be those of one process. Start the command "
                "on a machine like the workers', with the same versions"
            )
            raise UsageError(message)
    opened.on_step = lambda t: worker.log_event(token, (key, str(worker.name), f"{whose}: step {t} done"))
    do(job, task)


# ---------------------------------------------------------------------------------------------- clusters


def _cluster(job: Job, tasks: int, where: Where) -> _Cluster:
    if where.existing:
        return _Existing(where)
    return _Local(job, min(where.workers, tasks), where)


class _Existing:
    """A scheduler that somebody else has started, and its workers."""

    ours = False

    def __init__(self, where: Where) -> None:
        address = where.address if where.address is not None else _address_in(where.file, where.stall_seconds)
        self._stack = contextlib.ExitStack()
        # What dask has to say of a scheduler that is gone would bury the one line for the user.
        self._stack.enter_context(silence_logging_cmgr(logging.CRITICAL))
        try:
            self.client = Client(address, timeout=where.stall_seconds, set_as_default=False)
        except (OSError, ValueError) as error:
            self._stack.close()
            message = f"no dask scheduler answers at {address} within {where.stall_seconds:g} s: {error}"
            raise StalledError(message) from error
        self._ready = 0
        self._asked = 0.0

    def workers(self) -> int:
        if time.monotonic() - self._asked > TICK:
            self._asked = time.monotonic()
            self.client.loop.add_callback(self._ask)
        return self._ready

    def replace(self, name: str) -> None:
        pass

    async def _ask(self) -> None:
        with contextlib.suppress(Exception):  # the scheduler is gone, which the futures tell
            self._ready = len(await self.client.scheduler.ncores())

    def close(self) -> None:
        with contextlib.suppress(Exception):  # a scheduler that does not answer any more needs no farewell
            self.client.close(timeout=5)
        self._stack.close()


def _address_in(file: Path | None, seconds: float) -> str:
    assert file is not None
    until = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not there yet, or half written
            return str(json.loads(file.read_text())["address"])
        if time.monotonic() > until:
            message = f"--scheduler-file {file}: no dask scheduler has written its address there within {seconds:g} s"
            raise StalledError(message)
        time.sleep(TICK)


class _Local:
    """A scheduler in this process, and worker processes of our own."""

    ours = True

    def __init__(self, job: Job, count: int, where: Where) -> None:
        self._stack = contextlib.ExitStack()
        try:
            # A worker whose process was stopped counts as gone. One at work sends heartbeats from another thread.
            silence = min(60.0, where.stall_seconds / 3)
            settings = {
                "distributed.scheduler.worker-ttl": f"{silence}s",
                "distributed.scheduler.allowed-failures": DEATHS - 1,
            }
            self._stack.enter_context(dask.config.set(settings))
            self._cluster = LocalCluster(
                n_workers=0,
                processes=True,
                threads_per_worker=1,
                host="127.0.0.1",
                security=True,
                dashboard_address="127.0.0.1:8787" if where.dashboard else None,
                # The scheduler's health page is served all the same; at port 0 two replays at a time do not meet.
                scheduler_kwargs={} if where.dashboard else {"dashboard_address": "127.0.0.1:0"},
                silence_logs=logging.CRITICAL,
            )
            self._stack.callback(_close, self._cluster)
            self.client = Client(self._cluster, set_as_default=False)
            self._stack.callback(_close, self.client)
            if where.dashboard:
                commandline.say(f"dashboard: {self._cluster.dashboard_link}")
            scratch = self._stack.enter_context(
                tempfile.TemporaryDirectory(prefix="lossledger-", ignore_cleanup_errors=True)
            )
            facts = {
                "address": self._cluster.scheduler.address,
                "scratch": scratch,
                **{name: getattr(self._cluster.security, name) for name in _CREDENTIALS},
            }
            self._processes = WorkerProcesses(
                "from replay.cluster import serve; serve()",
                facts,
                _environments(job, count, where),
                # Not so short that a worker on a busy machine is killed before it can be ready, again and again.
                patience=max(60.0, where.stall_seconds / 2),
            )
            self._stack.callback(self._processes.stop)
        except BaseException:
            self._stack.close()
            raise

    def workers(self) -> int:
        return self._processes.keep_up({str(worker.name) for worker in list(self._cluster.scheduler.workers.values())})

    def replace(self, name: str) -> None:
        self._processes.kill(name)

    def close(self) -> None:
        self._stack.close()


def _close(what: Client | LocalCluster) -> None:
    with contextlib.suppress(Exception):  # at the end of a command that must end
        what.close(timeout=5)


def _environments(job: Job, count: int, where: Where) -> list[dict[str, str]]:
    threads = {name: str(job.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    # dask reads its log level when it is imported, in a worker from the environment. What it logs of workers stopped at
    # their work, after an error or an interrupt, would bury the one line for the user.
    quiet = {"DASK_DISTRIBUTED__LOGGING__DISTRIBUTED": "critical"}
    gpus = where.gpus if job.device == "cuda" and len(where.gpus) > 1 else ()
    return [
        {**heap.ENVIRONMENT, **threads, **quiet, **({"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {})}
        for number in range(count)
    ]


def serve() -> None:
    """Be a worker of a local cluster: what its standard input says, until that ends."""
    facts = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=end_with_the_driver, daemon=True).start()
    asyncio.run(_serve(facts))


async def _serve(facts: Mapping[str, str]) -> None:
    security = Security(require_encryption=True, **{name: facts[name] for name in _CREDENTIALS})
    worker = Worker(
        facts["address"],
        name=facts["name"],
        nthreads=1,
        host="127.0.0.1",
        security=security,
        local_directory=facts["scratch"],
        memory_limit=0,
        dashboard=False,
    )
    async with worker:
        await worker.finished()
