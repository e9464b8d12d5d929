"""Run tasks in worker processes through dask.distributed: the only place of replay that names dask.

A local cluster of spawned processes, one thread of torch each, on loopback with TLS and without a dashboard: a
default LocalCluster lets any local user run code as its owner.
"""

from __future__ import annotations

import logging
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence

import dask
from distributed import Client, LocalCluster, as_completed

from recorder.errors import LossledgerError
from replay.work import Job, Receipt, Task, do

_CONFIGURATION = {
    # Without it a cluster whose workers all died waits for ever.
    "distributed.scheduler.no-workers-timeout": "60s",
    "distributed.worker.multiprocessing-method": "spawn",
}


def run_in_processes(job: Job, tasks: Sequence[Task], workers: int) -> Iterator[Receipt]:
    """Do the tasks in a local cluster of worker processes.

    Parameters
    ----------
    job
        What to do.
    tasks
        Its parts.
    workers
        Number of processes.

    Yields
    ------
    Receipt
        Of each finished task, in the order in which they finish.

    Raises
    ------
    LossledgerError
        If a task fails; what the others have finished is on disk.
    """
    environment = {name: str(job.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    # dask reads its log level when it is imported, in a worker from the environment. What it logs of workers stopped at
    # their work, after an error or an interrupt, would bury the one line for the user.
    environment["DASK_DISTRIBUTED__LOGGING__DISTRIBUTED"] = "critical"
    with (
        dask.config.set(_CONFIGURATION | {"distributed.nanny.pre-spawn-environ": environment}),
        _local_cluster(min(workers, len(tasks))) as cluster,
        Client(cluster) as client,
    ):
        futures = [
            client.submit(_outcome, job, task, pure=False, key=f"steps-{task.start}-{task.stop}") for task in tasks
        ]
        for future in as_completed(futures):
            error = future.exception()
            if error is not None:
                message = f"{future.key} failed in its worker: {type(error).__name__}: {error}"
                raise LossledgerError(message) from error
            outcome: Receipt | LossledgerError = future.result()
            if isinstance(outcome, LossledgerError):
                raise outcome
            yield outcome


def _local_cluster(workers: int) -> LocalCluster:
    # Ctrl-C at a terminal reaches every process of the group. The workers inherit that it is ignored, and this process
    # alone answers it, by stopping them.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if _in_main_thread() else None
    try:
        return LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            security=True,
            dashboard_address=None,
            # The scheduler's health page is served all the same; at port 0 two replays at a time do not meet.
            scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},
            memory_limit=0,
            silence_logs=logging.CRITICAL,
        )
    finally:
        if _in_main_thread():
            signal.signal(signal.SIGINT, handler)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _outcome(job: Job, task: Task) -> Receipt | LossledgerError:
    try:
        return do(job, task)
    except LossledgerError as error:
        return error
    except Exception:
        # A bug of ours keeps its traceback: here it is still the worker's own.
        traceback.print_exc()
        raise
