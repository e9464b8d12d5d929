"""Worker processes on this machine: started, replaced when they die or fall silent, killed at the end.

Killing a worker is always safe, for shards are written whole or not at all. So nothing here waits for a worker's
consent: one that was stopped or hangs could not give it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from replay.outcomes import StalledError

STILLBORN = 8
"""So many deaths in a row of a worker before it has registered are taken for its fate."""


@dataclasses.dataclass(slots=True)
class _Place:
    """A worker's place: one process after the other may take it."""

    environment: Mapping[str, str]
    process: subprocess.Popen[bytes] | None = None
    name: str = ""
    generation: int = 0
    born: float = 0.0
    registered: bool = False
    stillborn: int = 0
    silent: int = 0


class WorkerProcesses:
    """A fixed number of worker processes.

    Parameters
    ----------
    code
        Python that a worker runs; it finds one line of JSON on its standard input, which ends when this process does.
    facts
        What the JSON says besides the worker's ``name``.
    environments
        For each worker, what its environment has besides this process's.
    patience
        Seconds that a worker may take to register; the next in its place may take twice as long, for the machine may
        be busy.
    """

    def __init__(
        self, code: str, facts: Mapping[str, Any], environments: Sequence[Mapping[str, str]], patience: float
    ) -> None:
        self._code = code
        self._facts = facts
        self._places = [_Place(environment) for environment in environments]
        self._patience = patience

    @property
    def silent(self) -> int:
        """How many have been replaced because they lived and did not register."""
        return sum(place.silent for place in self._places)

    def keep_up(self, registered: Collection[str]) -> int:
        """Start what is not running, and replace whom the scheduler does not see any more.

        Parameters
        ----------
        registered
            Names of the workers that the scheduler sees now.

        Returns
        -------
        int
            How many of them are ours.

        Raises
        ------
        StalledError
            If a worker dies again and again before it is ready.
        """
        for number, place in enumerate(self._places):
            if place.name in registered:
                place.registered, place.stillborn = True, 0
            ended = None if place.process is None else place.process.poll()
            silent = place.registered or time.monotonic() - place.born > self._patience * 2**place.silent
            if place.process is not None and ended is None and (place.name in registered or not silent):
                continue
            if place.process is not None:
                _kill(place.process)
                place.silent += ended is None and not place.registered
                place.stillborn += not place.registered
                if place.stillborn >= STILLBORN:
                    message = (
                        f"worker {number} ended {place.stillborn} times before it was ready, the last time with "
                        f"{ended if ended is not None else 'no answer'}: what it said stands above; is there memory "
                        "enough for so many workers? --workers 1 does without them"
                    )
                    raise StalledError(message)
            place.generation += 1
            place.name = f"{number}-{place.generation}"
            place.born, place.registered = time.monotonic(), False
            place.process = self._start(place)
        return sum(place.name in registered for place in self._places)

    def _start(self, place: _Place) -> subprocess.Popen[bytes]:
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)  # noqa: PTH109 (as sys.path has it)
        process = subprocess.Popen(  # noqa: S603 (our own interpreter and code)
            [sys.executable, "-c", self._code],
            stdin=subprocess.PIPE,
            # Standard output is for results; what a user's code prints in a worker is none.
            stdout=sys.__stderr__,
            env={**os.environ, **place.environment, "PYTHONPATH": path},
            # Ctrl-C at a terminal reaches every process of its group. This process alone answers it.
            process_group=0,
        )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once: `keep_up` will see
            process.stdin.write(json.dumps({**self._facts, "name": place.name}).encode() + b"\n")
            process.stdin.flush()
        return process

    def kill(self, name: str) -> None:
        """Kill one, if it is still there; `keep_up` puts another in its place.

        Parameters
        ----------
        name
            As the scheduler knows it.
        """
        for place in self._places:
            if place.name == name and place.process is not None:
                _kill(place.process)

    def stop(self) -> None:
        """Kill them all."""
        for place in self._places:
            if place.process is not None:
                _kill(place.process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):  # waiting for a file system that is gone, it cannot die yet
        process.wait(timeout=5)
    with contextlib.suppress(OSError):
        if process.stdin is not None:
            process.stdin.close()


def end_with_the_driver() -> None:
    """Wait until the process that started this one is gone, however it went, and end at once."""
    while sys.stdin.buffer.read(1024):
        pass
    os._exit(1)
