"""The work in a worker process, be it one of our own or of somebody else's cluster."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import sys
import threading
from collections.abc import Mapping
from typing import Any

from distributed import Security, Worker, get_worker

from recorder.errors import UsageError
from replay.job import Job, Task
from replay.outcomes import reason_and_trace
from replay.work import do, replayer
from replay.workers import end_with_the_driver

CREDENTIALS = ("tls_ca_file", "tls_worker_cert", "tls_worker_key")


class TaskError(Exception):
    """What went wrong at a task, as plain facts that travel from any worker.

    Parameters
    ----------
    worker
        Its name.
    reason, trace
        As `replay.outcomes.reason_and_trace` gives them.
    of_all
        Whether every task would fail for this.
    """

    def __init__(self, worker: str, reason: str, trace: str = "", *, of_all: bool = False) -> None:
        super().__init__(worker, reason, trace)
        self.worker, self.reason, self.trace, self.of_all = worker, reason, trace, of_all

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(TaskError, of_all=self.of_all), self.args


_one_at_a_time = threading.Lock()
_served = ""


def do_task(key: str, job: Job, expected: Mapping[str, str], task: Task) -> None:
    """Do a task in this worker, and say how far it is.

    Parameters
    ----------
    key
        Of the task on the scheduler.
    job
        What to do.
    expected
        Loss data to the hash of its settings, as the process that asks has found them.
    task
        Which part of it.

    Raises
    ------
    TaskError
        Whatever went wrong.
    """
    worker = get_worker()
    # A worker of somebody else's cluster may have several threads; a replayer has one model.
    with _one_at_a_time:
        try:
            _do_alone(key, job, expected, task)
        except Exception as error:
            try:
                reason, trace = reason_and_trace(error)
            except UsageError:
                raise TaskError(str(worker.name), str(error), of_all=True) from None
            raise TaskError(str(worker.name), reason, trace) from None


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


def serve() -> None:
    """Be a worker of a local cluster: what its standard input says, until that ends."""
    facts = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=end_with_the_driver, daemon=True).start()
    asyncio.run(_serve(facts))


async def _serve(facts: Mapping[str, str]) -> None:
    security = Security(require_encryption=True, **{name: facts[name] for name in CREDENTIALS})
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
