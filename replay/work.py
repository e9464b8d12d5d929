"""One worker's work: replay a chunk of steps and write its shards.

Tasks carry a path and a range of steps, never models. A worker builds model and data once; it writes its shards to
disk and returns receipts, so that a task may run twice and results survive the worker.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from recorder.chordrun import open_run
from recorder.loading import load_workload
from recorder.runformat import Run
from replay import kernels, lossdata
from replay.entries import EntryFolder
from replay.evaluation import Evaluation
from replay.gradients import LossSurface
from replay.heap import share_one_heap
from replay.job import Job, Receipt, Task
from replay.jobsettings import provenance_of, settings_of
from replay.ledger import ledger, sharers
from replay.measuring import Measuring
from replay.precision import fitting, precision_named
from replay.quadrature import rule_for
from replay.reading import ReadAhead
from replay.recordedbatch import RecordedBatch
from replay.rows import Rows
from replay.shardfolder import ShardFolder
from replay.tolerance import Tolerance

if TYPE_CHECKING:
    from replay.lossdata import LossData


class Replayer:
    """A run opened for replay: model, loss data and shard folders, built once in each process.

    Parameters
    ----------
    job
        What to do.

    Attributes
    ----------
    parameters : tuple of Parameter
        The rows of the ledger.
    trained : tuple of Parameter
        Those of them that LCA is computed of.
    measuring : Measuring
        What allocates a step on the loss data.
    """

    def __init__(self, job: Job) -> None:
        began = time.monotonic()
        share_one_heap()
        torch.set_num_threads(job.threads)
        kernels.rule_out_inexact()
        self.job = job
        self.run = open_run(Path(job.run))
        self.rule = rule_for(job.rule, self.run.manifest.path)
        self.parameters = ledger(self.run.manifest.parameters, job.whole)
        self.trained = tuple(row for row in self.parameters if row.trained)
        self._sharers = sharers(self.trained)
        self.precision = (
            fitting([row.dtype for row in self.trained]) if job.dtype is None else precision_named(job.dtype)
        )
        self.tolerance = Tolerance(rtol=job.rtol, atol=job.atol, rounding=self.precision.rounding)
        self.workload = load_workload(self.run.path, self.run.manifest, job.workload, job.data)
        self.device = torch.device(job.device)
        self._buffers = bool(self.run.manifest.buffers)
        self.reader = ReadAhead(self.run, self.device, self.precision, self._sharers)
        self.surface = LossSurface(
            self.workload,
            [row.name for row in self.trained if row.tied_to is None],
            self.run.untrained(),
            self.device,
            self.precision,
            [row for row in self.trained if row.tied_to is not None],
        )
        first = self.run.step(self.run.steps[0])
        requests = [lossdata.parse(text) for text in job.loss_data]
        built = [data for request in requests for data in lossdata.build(request, self.workload, first, self.device)]
        self.loss_data = {data.name: data for data in built}
        self.measuring = Measuring(
            job, self.loss_data, self.surface, self.trained, self.rule, self.tolerance, buffers=self._buffers
        )
        self.folders = {name: self._folder(data) for name, data in self.loss_data.items()}
        self.entries = self._entry_folders()
        self.on_step: Callable[[int], None] = lambda step: None
        """Called after each step of a chunk: whoever watches over this process hears that it lives."""
        self.seconds_to_open = time.monotonic() - began
        """What every worker takes before its first chunk, beside the start of Python and its libraries."""

    def _folder(self, data: LossData) -> ShardFolder:
        manifest = self.run.manifest
        settings = settings_of(
            self.job,
            manifest,
            self.parameters,
            data,
            dropout=self.measuring.dropout_of(data.name),
            precision=self.precision,
            device=self.device,
        )
        return ShardFolder.of(self.run.path, settings, self.parameters, provenance_of(manifest))

    def _entry_folders(self) -> dict[str, EntryFolder]:
        run, windows = self.run, self.job.windows
        recording = windows and run.manifest.state == "recording"
        recorded = run.to_be_recorded(max(stop for _, stop in windows)) if recording else run.ever_recorded
        return {
            name: EntryFolder(folder, windows, recorded, run.attempts_within) for name, folder in self.folders.items()
        }

    def take_up(self, run: Run) -> None:
        """Go on with the run as it is now: other steps, the same parameter table.

        Parameters
        ----------
        run
            The same run, opened anew.
        """
        self.run = run
        self.reader = ReadAhead(run, self.device, self.precision, self._sharers)
        self.entries = self._entry_folders()

    @property
    def collates(self) -> bool:
        """Whether any loss data is made of examples that the workload collates now."""
        return any(not isinstance(data, RecordedBatch) for data in self.loss_data.values())

    def evaluate(self, t: int, name: str, *, most: int | None = None) -> Evaluation:
        """Measure loss and gradient at the start of a step.

        Parameters
        ----------
        t
            The step.
        name
            The loss data.
        most
            So many of its micro-batches at most; all of them by default.

        Returns
        -------
        Evaluation
            At θ_t.
        """
        step = self.run.step(t)
        if self._buffers:
            self.surface.hold(self.run.buffers(t))
        states = self.measuring.random_states(name, step)
        return self.surface.evaluate(
            self._theta(t),
            self.loss_data[name].micro_batches(step)[:most],
            states=states if states is None else states[:most],
        )

    def make_folders(self, names: Iterable[str] | None = None) -> None:
        """Make the folders of shards, or sweep those that are there: before anything is written into them.

        Parameters
        ----------
        names
            The loss data; all of them by default.
        """
        for name in self.loss_data if names is None else names:
            self.folders[name].make()

    def replay(self, task: Task) -> Receipt:
        """Allocate every step of a chunk and write one shard for each loss data.

        Parameters
        ----------
        task
            The chunk.

        Returns
        -------
        Receipt
            The shards' files, which are on disk.
        """
        self._reach(task)
        self.make_folders(task.loss_data)
        steps = range(task.start, task.stop)
        rows = {name: Rows(len(steps), self.trained, self.tolerance) for name in task.loss_data}
        kept = {name: self.entries[name].collect(task.start, task.stop) for name in task.loss_data}
        known: dict[str, Evaluation | None] = {}
        for step in self.reader.steps(task.start, task.stop):
            for name, allocation in self.measuring.allocations(step, task.loss_data, known):
                rows[name].add(step.record, allocation)
                kept[name].add(step.record.step, allocation)
                # It holds θ at both ends and every gradient, and would do so while the next one's are computed.
                del allocation
            self.on_step(step.record.step)
            del step
        attempts = self.run.attempts_within(task.start, task.stop)
        files = tuple(
            str(self.folders[name].write(task.start, task.stop, rows[name].shard(), attempts))
            for name in task.loss_data
        )
        return Receipt(task=task, files=files)

    def _reach(self, task: Task) -> None:
        if any(start <= task.start and task.stop <= stop for start, stop in self.run.consecutive):
            return
        # Whoever gave the task has seen more of the run; with the table of this job, whatever came later.
        run = open_run(self.run.path)
        run.manifest = dataclasses.replace(run.manifest, parameters=self.run.manifest.parameters)
        self.take_up(run)

    def _theta(self, t: int) -> dict[str, torch.Tensor]:
        return {
            name: self.precision.converted(tensor.to(self.device)) for name, tensor in self.run.parameters(t).items()
        }


@functools.lru_cache(maxsize=1)
def replayer(job: Job) -> Replayer:
    """Build the replayer of a job, once in each process.

    Parameters
    ----------
    job
        What to do.

    Returns
    -------
    Replayer
        Ready to work.
    """
    return Replayer(job)


def do(job: Job, task: Task) -> Receipt:
    """Do one task of a job: what runners call, in whatever process.

    Parameters
    ----------
    job
        What to do.
    task
        Which part of it.

    Returns
    -------
    Receipt
        What is on disk now.
    """
    return replayer(job).replay(task)
