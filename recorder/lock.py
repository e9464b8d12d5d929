"""One recorder to a run: a lock that the operating system takes back when its holder dies.

Each process of a data-parallel training holds one of its own; that of process 0 is the run's.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from filelock import FileLock, Timeout

from recorder.errors import UsageError

LOCK_FILE = ".lock"


class RunLock:
    """The right to write into a run's folder.

    Parameters
    ----------
    run
        The run's folder, which exists.
    rank
        The process.

    Raises
    ------
    UsageError
        If another process holds it, or another recording of this one.
    """

    def __init__(self, run: Path, rank: int = 0) -> None:
        name = f"{LOCK_FILE}-rank{rank}" if rank else LOCK_FILE
        self._lock = FileLock(run / name, is_singleton=False)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            message = f"{run} is being recorded into by another process; give another folder, or wait until it ends"
            raise UsageError(message) from error
        except OSError as error:
            message = f"the run folder {run} cannot be written to: {error.strerror}"
            if rank:
                message += "; all processes of the training write into it: it must be on a disk that they share"
            raise UsageError(message) from error

    def release(self) -> None:
        """Give the right back; a second call does nothing."""
        self._lock.release(force=True)


def locks_of_others(run: Path) -> ExitStack:
    """Take the locks of all processes but 0, when that of process 0 is held: none of them writes any more.

    Parameters
    ----------
    run
        The run's folder.

    Returns
    -------
    contextlib.ExitStack
        A context that gives them back. A `UsageError` tells if a process still holds its own.
    """
    with ExitStack() as held:
        for file in run.glob(f"{LOCK_FILE}-rank*"):
            held.callback(RunLock(run, int(file.name.removeprefix(f"{LOCK_FILE}-rank"))).release)
        return held.pop_all()
