"""Run tasks one after the other in this process: the plain loop that the cluster must agree with."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from replay.job import Job, Task
from replay.outcomes import Failure, Outcome, reason_and_trace
from replay.work import do

if TYPE_CHECKING:
    from replay.follow import Following

TICK = 0.2
"""Seconds of rest where there is nothing to do yet."""


def run_serially(job: Job, tasks: Sequence[Task], following: Following | None = None) -> Generator[Outcome]:
    """Do every task in this process.

    Parameters
    ----------
    job
        What to do.
    tasks
        Its parts.
    following
        Where more of them come from.

    Yields
    ------
    Receipt or Failure
        Of each task.
    """
    waiting = deque(tasks)
    while waiting or (following is not None and not following.ended):
        if following is not None:
            waiting.extend(following.due())
        if not waiting:
            time.sleep(TICK)
            continue
        task = waiting.popleft()
        try:
            yield do(job, task)
        except Exception as error:
            reason, trace = reason_and_trace(error)
            yield Failure(task=task, reason=reason, trace=trace)
