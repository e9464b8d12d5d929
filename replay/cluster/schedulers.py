"""A scheduler with its workers: one that is there already, or one in this process with workers of our own."""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Protocol

import dask
from distributed import Client, LocalCluster
from distributed.utils import silence_logging_cmgr

from recorder import commandline
from replay import heap
from replay.cluster.worker import CREDENTIALS
from replay.job import Job
from replay.outcomes import StalledError
from replay.where import Where
from replay.workers import WorkerProcesses

TICK = 0.2
"""Seconds between two looks at the workers."""

DEATHS = 3
"""So many workers may die at a chunk until it is given up."""


class Cluster(Protocol):
    """A scheduler to submit to, and a look at its workers."""

    client: Client
    ours: bool
    """Whether its workers are processes of our own."""

    def workers(self) -> int:
        """Count the workers that are ready; never waits."""

    @property
    def silent(self) -> int:
        """How many workers of our own were replaced because they did not become ready."""

    def replace(self, name: str) -> None:
        """Put another process in the place of a worker, if it is ours."""

    def close(self) -> None:
        """Leave it as it was found."""


def open_cluster(job: Job, tasks: int, where: Where) -> Cluster:
    """Open the cluster that the command line names, or one of our own.

    Parameters
    ----------
    job
        Says device and threads.
    tasks
        More workers of our own have nothing to do.
    where
        In which processes.

    Returns
    -------
    Cluster
        To be closed. A `StalledError` tells if no scheduler answers.
    """
    if where.existing:
        return _Existing(where)
    return _Local(job, min(where.workers, tasks), where)


class _Existing:
    """A scheduler that somebody else has started, and its workers."""

    ours = False
    silent = 0

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
                "distributed.admin.tick.interval": "1s",
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
                **{name: getattr(self._cluster.security, name) for name in CREDENTIALS},
            }
            self._processes = WorkerProcesses(
                "from replay.cluster.worker import serve; serve()",
                facts,
                environments(job, count, where),
                patience=where.stall_seconds / 2,
            )
            self._stack.callback(self._processes.stop)
        except BaseException:
            self._stack.close()
            raise

    def workers(self) -> int:
        return self._processes.keep_up({str(worker.name) for worker in list(self._cluster.scheduler.workers.values())})

    @property
    def silent(self) -> int:
        return self._processes.silent

    def replace(self, name: str) -> None:
        self._processes.kill(name)

    def close(self) -> None:
        self._stack.close()


def _close(what: Client | LocalCluster) -> None:
    with contextlib.suppress(Exception):  # at the end of a command that must end
        what.close(timeout=5)


def environments(job: Job, count: int, where: Where) -> list[dict[str, str]]:
    """Say what the environment of each worker of our own has besides this process's.

    Parameters
    ----------
    job
        Says device and threads.
    count
        Number of workers.
    where
        Says which GPUs there are.

    Returns
    -------
    list of dict
        Of each worker.
    """
    threads = {name: str(job.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    # dask reads its log level when it is imported, in a worker from the environment. What it logs of workers stopped at
    # their work, after an error or an interrupt, would bury the one line for the user.
    quiet = {"DASK_DISTRIBUTED__LOGGING__DISTRIBUTED": "critical"}
    # Samples of the stack every 10 ms and looks at the loop every 20 ms cost a worker a twentieth of its core.
    idle = {
        "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False",
        "DASK_DISTRIBUTED__ADMIN__TICK__INTERVAL": "1s",
        "DASK_DISTRIBUTED__ADMIN__SYSTEM_MONITOR__INTERVAL": "10s",
    }
    gpus = where.gpus if job.device == "cuda" and len(where.gpus) > 1 else ()
    return [
        {
            **heap.ENVIRONMENT,
            **threads,
            **quiet,
            **idle,
            **({"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {}),
        }
        for number in range(count)
    ]
