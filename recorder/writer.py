"""The thread that codes and writes while the training goes on.

The training hands over copies (`recorder.staging`) and goes on; it waits only when all of them are in use. A failure
is kept for the training to find: what is whole by then is sealed, and whatever comes after is let go.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from recorder.segmentwriter import SegmentWriter, State
from recorder.steps import Step

LONGEST_QUEUE = 64
"""Steps of a process that records no parameters."""

_NICENESS = 10


class BackgroundWriter:
    """Writes states and steps in a thread of its own.

    Parameters
    ----------
    segments
        Where they go.

    Attributes
    ----------
    busy : float
        Seconds spent coding and writing.
    failure : Exception or None
        Why it stopped writing.
    failed_at : int or None
        The step that it could not write.
    stop : int or None
        One more than the last step written.
    """

    def __init__(self, segments: SegmentWriter) -> None:
        self._segments = segments
        self.busy = 0.0
        self.failure: Exception | None = None
        self.failed_at: int | None = None
        self.stop: int | None = None
        self._work: queue.Queue[Callable[[], None] | None] = queue.Queue(LONGEST_QUEUE)
        self._thread = threading.Thread(target=self._write_on, name="lossledger-recorder", daemon=True)
        self._thread.start()

    @property
    def bytes(self) -> int:
        """Bytes written so far."""
        return self._segments.bytes

    def put(self, state: State | None, step: Callable[[], Step] | None) -> None:
        """Hand over a state, and the step that it ends.

        Parameters
        ----------
        state, step
            As for `SegmentWriter.add`; the step is made in the thread.
        """
        self._work.put(lambda: self._add(state, step))

    def _add(self, state: State | None, make_step: Callable[[], Step] | None) -> None:
        if self.failure is not None:
            if state is not None:
                state.release()
            return
        step = None
        try:
            if state is not None:
                state.wait()
            step = make_step() if make_step else None
            self._segments.add(state, step)
            self.stop = step.step + 1 if step else self.stop
        except Exception as error:
            self.failure = error
            at_state = None if state is None else state.number - (make_step is not None)
            self.failed_at = step.step if step else at_state
            if state is not None:
                state.release()
            with suppress(Exception):
                self._segments.seal()

    def flush(self) -> None:
        """Wait until everything handed over is written and on the disk."""
        done = threading.Event()

        def reached() -> None:
            try:
                if self.failure is None:
                    self._segments.sync()
            except OSError as error:
                self.failure = error
            finally:
                done.set()

        self._work.put(reached)
        done.wait()

    def close(self) -> None:
        """Write what is left, seal the segment and end the thread."""
        if self._thread.is_alive():
            self._work.put(None)
            self._thread.join()

    def _write_on(self) -> None:
        _give_way()
        while (task := self._work.get()) is not None:
            began = time.perf_counter()
            task()
            self.busy += time.perf_counter() - began
        try:
            self._segments.seal()
        except Exception as error:
            self.failure = self.failure or error


def _give_way() -> None:
    # On the cores it shares with the training, it gets what the training leaves: a thread of the training that is made
    # to wait for a core makes all the others wait for it. Only Linux has a niceness for each thread.
    if sys.platform == "linux":
        with suppress(OSError):
            os.nice(_NICENESS)
