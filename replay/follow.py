"""A run that is still being recorded: its chunks, as they become whole."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from recorder import commandline
from recorder.manifest import MANIFEST_FILE, Manifest
from recorder.recovery import recover
from recorder.runformat import Run
from replay.job import plan
from replay.opening import refuse_unrecorded_changes
from replay.settings import digest_of_table
from replay.stale import remove_stale

if TYPE_CHECKING:
    from pathlib import Path

    from replay.job import Task
    from replay.where import Where
    from replay.work import Replayer

LOOK_SECONDS = 2.0
"""Between two looks at the run."""

QUIET_SECONDS = 30.0
"""So long nothing new was recorded until it is asked whether the training is alive."""


class Following:
    """The tasks that come while a training is recorded.

    Parameters
    ----------
    opened
        The run, opened for replay: it takes up what is recorded.
    where
        Says which share of the chunks is ours.
    tasks
        All tasks known so far; those that come are added.

    Attributes
    ----------
    ended : bool
        Whether no more tasks will come: the recording has ended, or the table has changed.
    why_anew : str
        Why the run must be opened anew to be done with; empty if it need not.
    """

    def __init__(self, opened: Replayer, where: Where, tasks: list[Task]) -> None:
        self._opened, self._where, self._tasks = opened, where, tasks
        self._given = set(tasks)
        self.ended = opened.run.manifest.state != "recording"
        self.why_anew = ""
        self._looked = self._grown = time.monotonic()

    def due(self) -> list[Task]:
        """Look, now and then, for what has come; never waits.

        Returns
        -------
        list of Task
            New ones.
        """
        now = time.monotonic()
        if self.ended or now - self._looked < LOOK_SECONDS:
            return []
        self._looked = now
        before = self._opened.run
        if now - self._grown > QUIET_SECONDS:
            # A killed training cannot say that it has ended.
            recover(before.path)
            self._grown = now
        run = Run(before.path)
        refuse_unrecorded_changes(run)
        if digest_of_table(run.manifest.parameters) != self._opened.job.table:
            self.ended, self.why_anew = (
                True,
                "the training has gone on to train further parameters, or its parameter table was corrected",
            )
            return []
        self.ended = run.manifest.state != "recording"
        if run.segments == before.segments and not self.ended:
            return []
        self._grown = now
        self._opened.take_up(run)
        if _attempts(run) != _attempts(before):
            # Every shard is looked at: only when there may be stale ones. What is in the making now may become one.
            remove_stale(self._opened)
            self.why_anew = "the training was restarted"
        job, folders, entries = self._opened.job, self._opened.folders, self._opened.entries
        ours = self._where.ours(plan(job, folders, run, again=True))
        to_do = plan(job, folders, run, entries=entries, whole=not self.ended)
        new = [task for task in to_do if (task.start, task.stop) in ours and task not in self._given]
        self._given.update(new)
        self._tasks += new
        return new

    def settle(self, task: Task) -> None:
        """Take up that a task is finished; if the training records its steps anew, it comes again.

        Parameters
        ----------
        task
            One of the tasks.
        """
        self._given.discard(task)


def _attempts(run: Run) -> set[int]:
    return {number for number, _, _ in run.attempts}


def wait_for_first_step(path: Path) -> None:
    """Wait until a run holds a step, or its recording has ended without one.

    Parameters
    ----------
    path
        The run's folder, which need not be there yet.
    """
    said, quiet = False, time.monotonic()
    while not _begun(path):
        if not said:
            commandline.say(f"{path}: waiting for its first steps (Ctrl-C ends)")
            said = True
        if time.monotonic() - quiet > QUIET_SECONDS:
            recover(path)
            quiet = time.monotonic()
        time.sleep(LOOK_SECONDS)


def _begun(path: Path) -> bool:
    if not (path / MANIFEST_FILE).is_file():
        return False
    return Manifest.read(path).state != "recording" or bool(Run(path).steps)
