"""What becomes of each chunk: finished, or failed with its reason; and when to go on after a failure.

A chunk that fails is told and the others are finished, for most errors are of one place: a damaged segment, a batch
that does not fit into memory. What is wrong for every chunk alike ends the command at once: a `UsageError`, and one and
the same error of the first few chunks while none has been finished.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Iterable, Sequence

from recorder import commandline
from recorder.errors import LossledgerError, UsageError
from recorder.ranges import describe_ranges
from replay.job import Receipt, Task
from replay.log import Log

ALIKE = 3
"""So many first failures for the same reason are taken for the failure of all."""


class IncompleteError(LossledgerError):
    """Some chunks have no shard now; all that could be finished is on disk."""


class StalledError(LossledgerError):
    """The work does not go on: no step was finished for too long, or there is nobody left to do it."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Says that a task's shards could not be made.

    Parameters
    ----------
    task
        The task.
    reason
        For the user, in one line.
    trace
        The traceback, where the reason is a bug; empty where the reason says all.
    again
        Whether the task is tried once more.
    """

    task: Task
    reason: str
    trace: str = ""
    again: bool = False


Outcome = Receipt | Failure


def reason_and_trace(error: Exception) -> tuple[str, str]:
    """Put what was raised at a task into words; a `UsageError`, which every task would raise, is raised again.

    Parameters
    ----------
    error
        As caught.

    Returns
    -------
    reason : str
        One line.
    trace : str
        The traceback; empty for an error that is meant for users.
    """
    if isinstance(error, UsageError):
        raise error
    if isinstance(error, LossledgerError):
        return str(error), ""
    return f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error))


def gather(
    outcomes: Iterable[Outcome],
    tasks: Sequence[Task],
    log: Log,
    is_there: Callable[[Task], bool] = lambda task: False,
    describe: Callable[[Sequence[tuple[int, int]]], str] = describe_ranges,
) -> None:
    """Take up all outcomes, write them down, and tell at the end what is missing.

    Parameters
    ----------
    outcomes
        As the runner gives them.
    tasks
        All that is to do; more may be added while outcomes come.
    log
        Where each outcome is written down.
    is_there
        Whether the shards of a task are on the disk, although nobody has told so: its worker, or the way to it, may
        have been lost just after.
    describe
        Says in words which steps ranges cover.

    Raises
    ------
    IncompleteError
        If any task was not finished: why, and which steps have no shard.
    """

    def words(tasks: Iterable[Task]) -> str:
        return describe(sorted((task.start, task.stop) for task in tasks))

    finished: set[Task] = set()
    failed: dict[str, list[Task]] = {}
    stalled = ""
    try:
        for outcome in outcomes:
            if isinstance(outcome, Receipt):
                finished.add(outcome.task)
                log.write(f"finished {words([outcome.task])}: {', '.join(outcome.files)}")
                continue
            log.write(f"failed {words([outcome.task])}: {outcome.reason}\n{outcome.trace}".rstrip())
            if outcome.again:
                commandline.say(f"{words([outcome.task])}: {outcome.reason}; once more, in another process")
                continue
            if outcome.trace and outcome.reason not in failed:
                commandline.say(outcome.trace.rstrip())
            failed.setdefault(outcome.reason, []).append(outcome.task)
            finished.discard(outcome.task)
            if not finished and len(failed[outcome.reason]) == ALIKE < len(tasks):
                break
    except StalledError as error:
        stalled = str(error)
        log.write(stalled)
    missing = [task for task in dict.fromkeys(tasks) if task not in finished and not is_there(task)]
    if missing:
        reasons = [f"{reason} ({words(of)})" for reason, of in failed.items()] + [stalled] * bool(stalled)
        message = (
            f"{'; '.join(reasons)}; missing: {words(missing)}. What is finished is kept; "
            "the same command does what is missing"
        )
        raise IncompleteError(message)
