"""One recorder to a run: a lock that the operating system takes back when its holder dies."""

from __future__ import annotations

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

    Raises
    ------
    UsageError
        If another process holds it, or another recording of this one.
    """

    def __init__(self, run: Path) -> None:
        self._lock = FileLock(run / LOCK_FILE, is_singleton=False)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            message = f"{run} is being recorded into by another process; give another folder, or wait until it ends"
            raise UsageError(message) from error
        except OSError as error:
            message = f"the run folder {run} cannot be written to: {error.strerror}"
            raise UsageError(message) from error

    def release(self) -> None:
        """Give the right back; a second call does nothing."""
        self._lock.release(force=True)
