"""Run tasks one after the other in this process: the plain loop that the cluster must agree with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from replay.work import Job, Receipt, Task, do


def run_serially(job: Job, tasks: Sequence[Task]) -> Iterator[Receipt]:
    """Do every task in this process.

    Parameters
    ----------
    job
        What to do.
    tasks
        Its parts.

    Yields
    ------
    Receipt
        Of each finished task.
    """
    for task in tasks:
        yield do(job, task)
