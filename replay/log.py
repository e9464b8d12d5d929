"""``RUN/shards/replay.log``: what was asked of replay, each finished chunk, every error with its traceback."""

from __future__ import annotations

import os
import socket
from datetime import UTC, datetime
from pathlib import Path

FILE = "replay.log"


class Log:
    """A text file that any number of replays of a run append to, from any number of machines.

    Parameters
    ----------
    folder
        ``RUN/shards``.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE

    def write(self, text: str) -> None:
        """Append a text with the time, the machine and the process; a log that cannot be written stops nothing.

        Parameters
        ----------
        text
            Without its last newline; further lines are indented.
        """
        who = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {socket.gethostname()} {os.getpid()}"
        line = f"{who} {text}".replace("\n", "\n    ") + "\n"
        try:
            # One write of a file opened for appending: entries of several processes do not mix.
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                os.write(descriptor, line.encode("utf-8", "replace"))
            finally:
                os.close(descriptor)
        except OSError:
            pass
