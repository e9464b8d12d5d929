"""Where the work is done, as the command line says: in which processes, and which share of the plan."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from recorder.errors import UsageError
from replay.job import Job, Task

ADDRESS = "DASK_SCHEDULER_ADDRESS"
"""The environment variable by which dask's own programs find a scheduler."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Where:
    """In which processes the work is done.

    Parameters
    ----------
    workers
        Processes of a local cluster; 1 is this process alone.
    address, file
        Of an existing dask scheduler, or the file that it writes its address to; at most one of them.
    dashboard
        Serve dask's dashboard of the local cluster on loopback.
    stall_seconds
        How long no step may be finished before the command ends.
    gpus
        The GPUs of this machine, as CUDA_VISIBLE_DEVICES names them.
    share
        (i, n): of several commands that divide the chunks among them, this is the i-th of n.
    """

    workers: int
    address: str | None = None
    file: Path | None = None
    dashboard: bool = False
    stall_seconds: float = 600.0
    gpus: tuple[str, ...] = ()
    share: tuple[int, int] = (1, 1)

    @property
    def existing(self) -> bool:
        """Whether the workers are those of a cluster that is there already."""
        return self.address is not None or self.file is not None

    def ours(self, plan: Sequence[Task]) -> set[tuple[int, int]]:
        """Choose the chunks of our share.

        Parameters
        ----------
        plan
            All chunks, also those that are finished: the choice must not depend on how far the other commands are.

        Returns
        -------
        set of (int, int)
            Start and stop of the chunks.
        """
        i, n = self.share
        return {(task.start, task.stop) for task in plan[i - 1 :: n]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command line says of workers and clusters.

    Parameters
    ----------
    parser
        Of the command.
    """
    group = parser.add_argument_group("workers and clusters (docs/clusters.md)")
    group.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="worker processes here; 1 works in this process (default: one a GPU, else one for --threads processors)",
    )
    group.add_argument("--threads", type=int, default=1, metavar="N", help="torch's threads in each worker")
    group.add_argument("--scheduler-address", metavar="URL", help=f"of a dask scheduler (default: ${ADDRESS})")
    group.add_argument("--scheduler-file", type=Path, metavar="FILE", help="where a dask scheduler writes its address")
    group.add_argument("--shard", metavar="I/N", help="every N-th chunk from the I-th on, for N commands side by side")
    group.add_argument(
        "--stall-seconds",
        type=float,
        default=Where.__dataclass_fields__["stall_seconds"].default,
        metavar="S",
        help="end if the workers finish no step for so long (default %(default)g)",
    )
    group.add_argument("--dashboard", action="store_true", help="dask's dashboard of the local workers, on loopback")


def chosen(options: argparse.Namespace, job: Job) -> Where:
    """Check and put together what the command line says of workers and clusters.

    Parameters
    ----------
    options
        As parsed.
    job
        Says device and threads.

    Returns
    -------
    Where
        In which processes to work.

    Raises
    ------
    UsageError
        If options exclude each other or are out of range.
    """
    if not (math.isfinite(options.stall_seconds) and options.stall_seconds > 0):
        message = f"--stall-seconds is a number above 0, not {options.stall_seconds}"
        raise UsageError(message)
    address, file = options.scheduler_address, options.scheduler_file
    if address is not None and file is not None:
        message = "--scheduler-address and --scheduler-file both name a scheduler; pass one of them"
        raise UsageError(message)
    if address is None and file is None and options.workers is None:
        address = os.environ.get(ADDRESS) or None
    existing = address is not None or file is not None
    for flag, given in (("--workers", options.workers is not None), ("--dashboard", options.dashboard)):
        if existing and given:
            message = f"{flag} is of workers that this command starts; the scheduler you name has its own"
            raise UsageError(message)
    if options.dashboard and importlib.util.find_spec("bokeh") is None:
        message = "--dashboard needs the package bokeh, which is not installed: pip install bokeh"
        raise UsageError(message)
    gpus = _gpus() if job.device == "cuda" else ()
    return Where(
        workers=options.workers or len(gpus) or max(1, _processors() // job.threads),
        address=address,
        file=file,
        dashboard=options.dashboard,
        stall_seconds=options.stall_seconds,
        gpus=gpus,
        share=_share(options.shard),
    )


def _processors() -> int:
    # A batch system may have lent us a part of the machine's.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> tuple[str, ...]:
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    count = torch.cuda.device_count()
    return tuple(named[:count]) if named else tuple(map(str, range(count)))


def _share(text: str | None) -> tuple[int, int]:
    if text is None:
        return 1, 1
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        message = f"--shard expects I/N with I from 1 to N, such as 3/8; got {text!r}"
        raise UsageError(message)
    return int(match[1]), int(match[2])
