"""Run tasks one after the other in this process: the plain loop that the cluster must agree with."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from replay.job import Job, Task
from replay.outcomes import Failure, Outcome, reason_and_trace
from replay.work import do


def run_serially(job: Job, tasks: Sequence[Task]) -> Generator[Outcome]:
    """Do every task in this process.

    Parameters
    ----------
    job
        What to do.
    tasks
        Its parts.

    Yields
    ------
    Receipt or Failure
        Of each task.
    """
    for task in tasks:
        try:
            yield do(job, task)
        except Exception as error:
            reason, trace = reason_and_trace(error)
            yield Failure(task=task, reason=reason, trace=trace)
