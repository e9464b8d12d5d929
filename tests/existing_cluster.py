"""A dask scheduler and workers started as a user starts them: by separate commands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[1]


class ExistingCluster:
    """A scheduler that tells its address in a file, and two workers without nannies."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.file = folder / "scheduler.json"
        self.log = folder / "cluster.log"
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        with self.log.open("wb") as log:
            self.scheduler = self._start(log, "scheduler", "--host", "127.0.0.1", "--port", "0")
            self.workers = [
                self._start(log, "worker", "--nthreads", "1", "--no-nanny", "--local-directory", str(folder))
                for _ in range(2)
            ]

    def _start(self, log: IO[bytes], command: str, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "dask", command, "--scheduler-file", str(self.file), "--no-dashboard", *arguments],
            stdout=log,
            stderr=log,
            cwd=ROOT,
            env=self._environment,
        )

    def stop(self) -> None:
        """End it, whatever state it is in."""
        for process in (*self.workers, self.scheduler):
            process.send_signal(signal.SIGKILL)
            process.wait()


@contextmanager
def existing_cluster(folder: Path, **environment: str) -> Iterator[ExistingCluster]:
    """Start one, and end it."""
    cluster = ExistingCluster(folder, environment)
    try:
        yield cluster
    finally:
        cluster.stop()
