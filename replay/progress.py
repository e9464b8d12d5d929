"""A progress bar on a terminal, and a line every so often elsewhere; both on standard error."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from recorder import commandline
from replay.job import Task
from replay.outcomes import Failure, Outcome

SECONDS_BETWEEN_LINES = 30.0


def with_progress(outcomes: Iterable[Outcome], tasks: Sequence[Task], noun: str = "step") -> Iterator[Outcome]:
    """Pass outcomes through while showing how many steps are done.

    Parameters
    ----------
    outcomes
        As the runner gives them.
    tasks
        All that is to do; more may be added while outcomes come.
    noun
        What a task consists of.

    Yields
    ------
    Receipt or Failure
        The same outcomes.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("replay"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{noun}s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("replay", total=_steps(tasks))
        done, said = 0, time.monotonic()
        for outcome in outcomes:
            if isinstance(outcome, Failure):
                yield outcome
                continue
            done += outcome.task.stop - outcome.task.start
            steps = _steps(tasks)
            progress.update(bar, completed=done, total=steps)
            if not console.is_terminal and (done == steps or time.monotonic() - said > SECONDS_BETWEEN_LINES):
                said = time.monotonic()
                commandline.say(f"replay: {done} of {steps} {noun}s")
            yield outcome


def _steps(tasks: Sequence[Task]) -> int:
    return sum(task.stop - task.start for task in tasks)
