"""A run in the making: what the optimizer's hooks and the training loop tell, handed to the background writer.

The recorder draws from no random generator, changes no gradient and no parameter; an error of its own becomes a
warning and an incomplete run.
"""

from __future__ import annotations

import atexit
import os
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial, wraps
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec

import torch

from recorder.capture import Capture
from recorder.errors import JoinError, UsageError
from recorder.estimate import describe_cost
from recorder.layout import Layout
from recorder.lock import RunLock
from recorder.modelbuffers import ModelBuffers
from recorder.parameters import warn_of_unmapped
from recorder.pending import Pending, finisher
from recorder.processes import from_all, in_first, this_process
from recorder.runfolder import RunFolder
from recorder.segmentwriter import QuotaReached
from recorder.selection import StepSelection
from recorder.telling import LOG
from recorder.updates import Updates
from recorder.watched import Watched

if TYPE_CHECKING:
    from torch.optim import Optimizer

Batches = Literal["store", "indices"]
P = ParamSpec("P")

GRADIENT_NORMS = 3
"""First steps whose gradient norm is recorded: those that replay's self-check does again."""

UNRECORDED_EVERY = 64
"""Steps between two looks at what must not change."""


class RecorderWarning(UserWarning):
    """The recorder could not do its work; the training goes on."""


def _harmless(method: Callable[Concatenate[Recording, P], None]) -> Callable[Concatenate[Recording, P], None]:
    @wraps(method)
    def guarded(self: Recording, /, *args: P.args, **kwargs: P.kwargs) -> None:
        if self._state != "recording":
            return
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            if self._strict or isinstance(error, JoinError):
                self._end(error)
                raise
            self._give_up(error)

    return guarded


class Recording:
    """A run in the making; made by `watch` and used as a context manager.

    Attributes
    ----------
    run : Path
        The run's folder.
    epoch : int
        The epoch that the next steps belong to, from 1. Set it where the loop begins an epoch.
    """

    def __init__(
        self,
        watched: Watched,
        buffers: ModelBuffers,
        optimizer: Optimizer,
        folder: RunFolder | None,
        *,
        lock: RunLock | None,
        run: Path,
        steps: StepSelection,
        batches: Batches,
        quota: int | None,
        updates: int | None,
        first_step: int,
        segment_steps: int | None,
        strict: bool,
    ) -> None:
        self.run = run
        self.epoch = 1
        self._watched = watched
        self._buffers = buffers
        self._folder = folder
        self._lock = lock
        self._steps = steps
        self._store_tensors = batches == "store"
        self._quota = quota
        self._updates = updates
        self._next_step = first_step
        self._step_began = time.perf_counter()
        self._segment_steps = segment_steps
        self._strict = strict
        self._state = "recording"
        self._rank, self._processes = this_process()
        self._meets = self._processes > 1
        self._pending = Pending(watched)
        self._capture = Capture(watched, buffers, parameters_too=folder is not None)
        self._recorded_steps = 0
        self._learning_rates: tuple[float, ...] = ()
        self._gradient_norm: float | None = None
        self._last_words: list[Callable[[], None]] = []
        self._last_line = ""
        self._process = os.getpid()
        self._optimizer_updates = Updates(
            optimizer,
            entered=self._enter_step,
            before_closure=self._before_closure,
            before_update=self._before_update,
            after_update=self._leave_step,
            after_outer_step=self._after_outer_step,
        )
        atexit.register(self._close_at_exit)

    @property
    def waited(self) -> float:
        """Seconds that the training has waited for the writer to give a copy's memory back."""
        return self._capture.waited

    @property
    def next_step(self) -> int:
        """The number of the next update; that of the first one that was not recorded, where the recording has ended."""
        return self._next_step

    @property
    def active(self) -> bool:
        """Whether the next update will be recorded if it is selected: not after its end, by an error or otherwise."""
        return self._state == "recording"

    def __enter__(self) -> Recording:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(None if kind is None else f"training ended with {kind.__name__}")

    @_harmless
    def batch(self, indices: Iterable[int] | torch.Tensor | None, batch: Any = None) -> None:
        """Announce the next micro-batch, just before its forward pass.

        In a closure given to the optimizer's step, too: of several calls within a step the first one counts.

        Parameters
        ----------
        indices
            The data set indices of its examples; None where the data has none. Without indices and without a batch it
            says that this process of several has no examples in this pass.
        batch
            The micro-batch itself: tensors in any nest of dicts, lists and tuples. Recorded with the step, so that
            replay need not collate it again; without it, the workload collates the indices.
        """
        if self._optimizer_updates.measuring_again:
            return
        if not self._steps.keeps(self._next_step):
            self._pending.pass_over()
            return
        if self._pending.announce(indices, batch):
            self._buffers.keep()
            self._step_began = time.perf_counter()

    @_harmless
    def loss(self, loss_sum: torch.Tensor | float, predictions: torch.Tensor | float) -> None:
        """Tell the loss of the micro-batch announced last; replay then verifies that it measures the same.

        Parameters
        ----------
        loss_sum
            The loss summed over predictions, in nats.
        predictions
            Number of predictions it is summed over. It is a mistake to call this before `batch`.
        """
        if not self._optimizer_updates.measuring_again:
            self._pending.tell_loss(loss_sum, predictions)

    def forget_pending(self) -> None:
        """Drop the micro-batches announced since the last step: the update they were for did not happen."""
        self._pending.clear()

    @_harmless
    def flush(self) -> None:
        """Wait until every step so far is on the disk: called before a checkpoint, none that it follows can be lost.

        Of several processes each calls it for its own part.
        """
        self._capture.flush()

    def close(self, interrupted: str | None = None) -> None:
        """Write what is left and end the recording; a second call does nothing.

        Parameters
        ----------
        interrupted
            Why the training ended before its time, if it did. Every step until then is kept.
        """
        if os.getpid() != self._process:
            return  # a forked child that ends; the recording is its parent's
        self._optimizer_updates.release()
        self._watched.release()
        atexit.unregister(self._close_at_exit)
        self._finish("complete" if interrupted is None else f"incomplete: {interrupted}")
        self._release()
        # Only now: where warnings are errors, nothing is left that they could keep from being done.
        last_words, self._last_words = self._last_words, []
        last_line, self._last_line = self._last_line, ""
        try:
            for warn in last_words:
                warn()
        finally:
            if last_line:
                LOG.info("%s", last_line)

    def _close_at_exit(self) -> None:
        self.close("the program ended without closing the recording")

    @_harmless
    def _finish(self, state: str) -> None:
        unrecorded = self._note_unrecorded()
        if unrecorded:
            self._last_words.append(partial(warnings.warn, unrecorded, RecorderWarning, stacklevel=3))
        self._capture.close()
        self._capture.raise_failure()
        self._state = state
        if self._folder is not None:
            self._folder.write(state=state, stop=self._capture.stop)
            self._last_words.append(partial(warn_of_unmapped, self._watched.table))
        if self._capture.begun:
            cost = self._capture.cost(self._recorded_steps)
            self._last_line = f"recorded {self._recorded_steps} steps into {self.run}: {cost}"

    def _end(self, error: Exception) -> None:
        reason = (str(error).splitlines() or [""])[0]  # torch's messages can run to pages
        failed_at = self._next_step if self._capture.failed_at is None else self._capture.failed_at
        kind = "the quota is reached" if isinstance(error, QuotaReached) else type(error).__name__
        self._state = f"incomplete: {kind} at step {failed_at}: {reason}"
        self._pending.clear()
        # Whatever failed may fail again, a full disk for one; the caller tells the user, and the training goes on.
        with suppress(Exception):
            self._capture.close()
        if self._folder is not None:
            self._folder.drop_ballast()
            with suppress(Exception):
                self._folder.write(state=self._state, stop=self._capture.stop)
        self._release()

    def _give_up(self, error: Exception) -> None:
        self._end(error)
        message = f"recording of {self.run} ended ({self._state}); the training goes on unrecorded"
        warnings.warn(message, RecorderWarning, stacklevel=3)

    def _release(self) -> None:
        if self._folder is not None:
            self._folder.drop_ballast()
            self._folder.release()
        if self._lock is not None:
            self._lock.release()

    def _enter_step(self) -> None:
        if self._watched.sharded or self._steps.keeps(self._next_step):
            self._notice_failure()
            self._meet()

    def _leave_step(self) -> None:
        if self._watched.sharded:
            self._notice_failure()
            self._meet()
        self._watched.note_versions()
        self._after_step()

    @_harmless
    def _after_outer_step(self) -> None:
        if self._watched.moved_since_noted():
            message = (
                f"the optimizer's step calls the step of its base class and moves parameters after it: step "
                f"{self._next_step - 1} was recorded without that. Let it move them before, or in the loop"
            )
            raise UsageError(message)

    @_harmless
    def _before_closure(self) -> None:
        # θ_t is what the parameters are now, though its gradients come later: some optimizers move before they call.
        if self._steps.keeps(self._next_step) and (
            not self._capture.holds_start_of(self._next_step) or self._watched.more_may_join()
        ):
            self._watched.hold()
        self._capture.before_update()

    def _before_update(self, optimizer: Optimizer) -> None:
        try:
            self._before_step(optimizer)
        finally:
            self._watched.let_go()

    def _meet(self) -> None:
        # Outside the guard: a process whose recording has failed takes part, or the others would wait for it for ever.
        # In each hook where parameters are sharded, otherwise until the recording begins. After it, what all do
        # together stands before anything that can fail in one process alone.
        if not self._meets:
            return
        states = from_all(self._state)
        ended = [f"process {rank} is {state}" for rank, state in enumerate(states) if state != "recording"]
        if ended:
            self._meets = False
            self._end_with(ended)

    @_harmless
    def _notice_failure(self) -> None:
        self._capture.raise_failure()

    @_harmless
    def _end_with(self, ended: list[str]) -> None:
        message = f"the other processes do not record any more: {'; '.join(ended)}"
        raise UsageError(message)

    @_harmless
    def _before_step(self, optimizer: Optimizer) -> None:
        if self._watched.skipped():
            return
        if not self._steps.keeps(self._next_step):
            # What moves between the steps that are kept has to be in the next of them.
            if self._capture.begun and self._watched.find_first_gradients():
                self._write_table()
            return
        self._pending.settle_doubt()
        self._learning_rates = tuple(float(group["lr"]) for group in optimizer.param_groups)
        if not self._capture.begun:
            self._begin()
        joined = self._watched.find_first_gradients()
        self._gradient_norm = None
        if self._recorded_steps < GRADIENT_NORMS:
            self._gradient_norm = self._watched.gradient_norm()
        if joined:
            self._write_table()
        self._capture.before_step(self._next_step, changed=joined)

    def _begin(self) -> None:
        self._meets = self._meets and self._watched.sharded
        with self._watched.gathered(keep=self._folder is not None):
            run_id, attempt = in_first(self._begin_attempt)
        if self._folder is None:
            self._settle()
            self._start_writer(run_id, attempt)

    def _begin_attempt(self) -> tuple[str, int]:
        assert self._folder is not None
        self._settle()
        autocast = self._pending.autocast or self._watched.autocast.seen
        manifest = self._folder.begin(self._watched, self._buffers, self._next_step, autocast)
        layout = self._start_writer(manifest.run_id, manifest.attempt.number)
        cost = describe_cost(
            layout,
            self._steps,
            self._next_step,
            self.run,
            updates=self._updates,
            step_seconds=time.perf_counter() - self._step_began,
        )
        LOG.info("%s", cost)
        return manifest.run_id, manifest.attempt.number

    def _settle(self) -> None:
        self._buffers.settle()
        self._watched.settle_table(recorded_buffers=self._buffers.changing)

    def _start_writer(self, run_id: str, attempt: int) -> Layout:
        return self._capture.begin(self.run, run_id, attempt, self._rank, self._segment_steps, self._quota_left())

    def _quota_left(self) -> int | None:
        if self._quota is None:
            return None
        return self._quota - sum(file.stat().st_size for file in self.run.rglob("*") if file.is_file())

    @_harmless
    def _after_step(self) -> None:
        if self._watched.skipped():
            self.forget_pending()
            return
        step = self._next_step
        if not self._steps.keeps(step):
            self._pending.clear()
            self._next_step += 1
            return
        record = self._capture.after_step(step)
        announced = self._pending.take()
        if not announced:
            message = f"step {step} had no micro-batch: call Recording.batch before each forward pass"
            raise UsageError(message)
        self._next_step += 1
        record(
            finisher(
                (entry for entry in announced if entry.has_examples or self._processes == 1),
                store=self._store_tensors,
                step=step,
                epoch=self.epoch,
                seed=torch.initial_seed(),
                learning_rates=self._learning_rates,
                gradient_norm=self._gradient_norm,
            ),
        )
        self._recorded_steps += 1
        if self._recorded_steps % UNRECORDED_EVERY == 0:
            unrecorded = self._note_unrecorded()
            if unrecorded:
                warnings.warn(unrecorded, RecorderWarning, stacklevel=3)
        if self._steps.last == step:
            self._finish("complete")

    def _note_unrecorded(self) -> str:
        if self._folder is None or not self._watched.find_unrecorded_changes():
            return ""
        changes = tuple(sorted(self._watched.unrecorded_changes))
        self._folder.write(unrecorded_changes=changes)
        return (
            f"{', '.join(changes)} change in training, but no step records them (parameters left out, of an "
            f"optimizer that is not watched, or buffers that changed late): {self.run} cannot be replayed"
        )

    def _write_table(self) -> None:
        if self._folder is not None:
            self._folder.write(parameters=self._watched.table)
