"""A run in the making: what the optimizer's hooks and the training loop tell, handed to the background writer.

The recorder draws from no random generator, changes no gradient and no parameter; an error of its own becomes a
warning and an incomplete run.
"""

from __future__ import annotations

import atexit
import logging
import os
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec

import torch

from recorder import pending
from recorder.errors import JoinError, UsageError
from recorder.estimate import describe_cost
from recorder.layout import BUFFERS, PARAMETERS, Layout, Slot
from recorder.lock import RunLock
from recorder.modelbuffers import ModelBuffers
from recorder.parameters import warn_of_unmapped
from recorder.pending import Announced
from recorder.processes import from_all, in_first, this_process
from recorder.runfolder import RunFolder
from recorder.segmentwriter import QuotaReached, SegmentWriter, State
from recorder.selection import StepSelection
from recorder.sharded import whole
from recorder.staging import Staging
from recorder.watched import Watched
from recorder.writer import BackgroundWriter

if TYPE_CHECKING:
    from torch.optim import Optimizer

Batches = Literal["store", "indices"]
P = ParamSpec("P")

GRADIENT_NORMS = 3
"""First steps whose gradient norm is recorded: those that replay's self-check does again."""

SEGMENT_STEPS = 64
"""Steps to a segment: its first parameters are stored whole, 1.6 % of every step's."""

NARROW_SEGMENT_STEPS = 128
"""For 16-bit parameters, whose differences are far smaller than they are."""

UNRECORDED_EVERY = 64
"""Steps between two looks at what must not change."""

LOG = logging.getLogger("lossledger.recorder")


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
        self._next_step = first_step
        self._segment_steps = segment_steps
        self._strict = strict
        self._state = "recording"
        self._rank, self._processes = this_process()
        self._meets = self._processes > 1
        self._pending: list[Announced] = []
        self._doubted = 0
        self._autocast: str | None = None
        self._announced_unkept = False
        self._writer: BackgroundWriter | None = None
        self._staging: Staging | None = None
        self._staged: int | None = None
        self._recorded_steps = 0
        self._learning_rates: tuple[float, ...] = ()
        self._gradient_norm: float | None = None
        self._gradient_norms_left = GRADIENT_NORMS
        self._process = os.getpid()
        self._hooks = [
            optimizer.register_step_pre_hook(self._enter_step),
            optimizer.register_step_post_hook(self._leave_step),
        ]
        atexit.register(self._close_at_exit)

    @property
    def waited(self) -> float:
        """Seconds that the training has waited for the writer to give a copy's memory back."""
        return self._staging.waited if self._staging else 0.0

    def __enter__(self) -> Recording:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(None if kind is None else f"training ended with {kind.__name__}")

    @_harmless
    def batch(self, indices: Iterable[int] | torch.Tensor | None, batch: Any = None) -> None:
        """Announce the next micro-batch, just before its forward pass.

        Parameters
        ----------
        indices
            The data set indices of its examples; None where the data has none. Without indices and without a batch it
            says that this process of several has no examples in this pass.
        batch
            The micro-batch itself: tensors in any nest of dicts, lists and tuples. Recorded with the step, so that
            replay need not collate it again; without it, the workload collates the indices.
        """
        if not self._steps.keeps(self._next_step):
            self._announced_unkept = True
            return
        self._autocast = self._watched.autocast() or self._autocast
        if self._pending and self._watched.backward_seen:
            self._doubt_pending()
        if not self._pending:
            self._buffers.keep()
        self._watched.backward_seen = False
        self._pending.append(Announced.of(indices, batch, self._watched.random_state()))

    def _doubt_pending(self) -> None:
        # A gradient scaler may have skipped the update that they were for, and no hook tells. Then their gradients
        # are gone, or, where the loop zeroes them only now, they are not finite and will be at the next step.
        if self._watched.gradients_dropped():
            self._pending.clear()
            self._doubted = 0
        elif not self._watched.gradients_finite():
            self._doubted = len(self._pending)

    @_harmless
    def loss(self, loss_sum: torch.Tensor | float, predictions: torch.Tensor | float) -> None:
        """Tell the loss of the micro-batch announced last; replay then verifies that it measures the same.

        Parameters
        ----------
        loss_sum
            The loss summed over predictions, in nats.
        predictions
            Number of predictions it is summed over.

        Raises
        ------
        UsageError
            If no micro-batch was announced.
        """
        if self._announced_unkept and not self._pending:
            return
        if not self._pending:
            message = "Recording.loss was called before Recording.batch announced a micro-batch"
            raise UsageError(message)
        self._autocast = self._watched.autocast() or self._autocast
        self._pending[-1].loss_sum = pending.to_host(loss_sum)
        self._pending[-1].predictions = pending.to_host(predictions)

    def forget_pending(self) -> None:
        """Drop the micro-batches announced since the last step: the update they were for did not happen."""
        self._pending.clear()
        self._doubted = 0
        self._announced_unkept = False

    @_harmless
    def flush(self) -> None:
        """Wait until every step so far is on the disk: called before a checkpoint, none that it follows can be lost.

        Of several processes each calls it for its own part.
        """
        if self._writer is not None:
            self._writer.flush()
            self._raise_failure()

    def close(self, interrupted: str | None = None) -> None:
        """Write what is left and end the recording; a second call does nothing.

        Parameters
        ----------
        interrupted
            Why the training ended before its time, if it did. Every step until then is kept.
        """
        if os.getpid() != self._process:
            return  # a forked child that ends; the recording is its parent's
        for hook in self._hooks:
            hook.remove()
        self._watched.release()
        atexit.unregister(self._close_at_exit)
        self._finish("complete" if interrupted is None else f"incomplete: {interrupted}")
        self._release()

    def _close_at_exit(self) -> None:
        self.close("the program ended without closing the recording")

    @_harmless
    def _finish(self, state: str) -> None:
        self._warn_of_unrecorded()
        if self._writer is not None:
            self._writer.close()
            self._raise_failure()
        self._state = state
        if self._folder is not None:
            warn_of_unmapped(self._watched.table)
            self._folder.write(state=state, stop=self._stop())
        if self._writer is not None:
            LOG.info("%s", self._outcome(self._writer))

    def _outcome(self, writer: BackgroundWriter) -> str:
        steps = max(self._recorded_steps, 1)
        return (
            f"recorded {self._recorded_steps} steps into {self.run}: {writer.bytes / steps / 1e6:.3g} MB a step; "
            f"coding and writing took {writer.busy / steps * 1e3:.3g} ms a step beside the training, "
            f"which waited {self.waited:.3g} s for it"
        )

    def _stop(self) -> int | None:
        return self._writer.stop if self._writer else None

    def _raise_failure(self) -> None:
        if self._writer is not None and self._writer.failure is not None:
            raise self._writer.failure

    def _end(self, error: Exception) -> None:
        reason = (str(error).splitlines() or [""])[0]  # torch's messages can run to pages
        failed_at = self._writer.failed_at if self._writer and self._writer.failed_at is not None else self._next_step
        kind = "the quota is reached" if isinstance(error, QuotaReached) else type(error).__name__
        self._state = f"incomplete: {kind} at step {failed_at}: {reason}"
        self._pending.clear()
        # Whatever failed may fail again, a full disk for one; the caller tells the user, and the training goes on.
        with suppress(Exception):
            if self._writer is not None:
                self._writer.close()
        self._staging = None
        if self._folder is not None:
            self._folder.drop_ballast()
            with suppress(Exception):
                self._folder.write(state=self._state, stop=self._stop())
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

    def _enter_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._watched.sharded or self._steps.keeps(self._next_step):
            self._notice_failure()
            self._meet()
        self._before_step(optimizer)

    def _leave_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._watched.sharded:
            self._notice_failure()
            self._meet()
        self._after_step()

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
        self._raise_failure()

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
            if self._writer is not None and self._watched.find_first_gradients():
                self._write_table()
            return
        if self._doubted and self._watched.gradients_finite():
            del self._pending[: self._doubted]
        self._doubted = 0
        self._learning_rates = tuple(float(group["lr"]) for group in optimizer.param_groups)
        if self._writer is None:
            self._begin()
        late = self._watched.find_first_gradients()
        stale = late or self._staged != self._next_step
        self._gradient_norm = None
        if self._gradient_norms_left:
            self._gradient_norms_left -= 1
            self._gradient_norm = self._watched.gradient_norm()
        tensors = self._tensors(at_start=True) if stale else []
        if late:
            self._write_table()
        if self._staging is not None:
            self._staging.before_update()
        if stale:
            self._put(self._stage(self._next_step, tensors), None)

    def _begin(self) -> None:
        self._meets = self._meets and self._watched.sharded
        with self._watched.gathered(keep=self._folder is not None):
            run_id, attempt = in_first(self._begin_attempt)
        if self._folder is None:
            self._settle()
            self._start_writer(run_id, attempt, Layout(()))

    def _begin_attempt(self) -> tuple[str, int]:
        assert self._folder is not None
        self._settle()
        manifest = self._folder.begin(self._watched, self._buffers, self._next_step, self._autocast)
        layout = self._layout()
        self._start_writer(manifest.run_id, manifest.attempt.number, layout)
        LOG.info("%s", describe_cost(layout, self._steps, self._next_step, self.run))
        return manifest.run_id, manifest.attempt.number

    def _settle(self) -> None:
        self._buffers.settle()
        self._watched.settle_table(recorded_buffers=self._buffers.changing)

    def _start_writer(self, run_id: str, attempt: int, layout: Layout) -> None:
        segment_steps = self._segment_steps or _segment_steps(layout)
        segments = SegmentWriter(self.run, run_id, attempt, self._rank, segment_steps, self._quota_left())
        self._writer = BackgroundWriter(segments)

    def _quota_left(self) -> int | None:
        if self._quota is None:
            return None
        return self._quota - sum(file.stat().st_size for file in self.run.rglob("*") if file.is_file())

    def _tensors(self, *, at_start: bool = False) -> list[tuple[str, str, torch.Tensor]]:
        # Where parameters are sharded, all processes put them together now.
        buffers = self._buffers.at_start() if at_start else self._buffers.now()
        return [
            *((PARAMETERS, name, whole(tensor)) for name, tensor in self._watched.live().items()),
            *((BUFFERS, name, tensor) for name, tensor in buffers.items()),
        ]

    def _layout(self) -> Layout:
        parameters = [Slot.of(PARAMETERS, name, tensor) for name, tensor in self._watched.live().items()]
        buffers = [Slot.of(BUFFERS, name, tensor) for name, tensor in self._buffers.at_start().items()]
        return Layout((*parameters, *buffers))

    def _stage(self, number: int, tensors: list[tuple[str, str, torch.Tensor]]) -> State | None:
        if self._folder is None:
            return None
        layout = Layout(tuple(Slot.of(*entry) for entry in tensors))
        if self._staging is None or self._staging.layout != layout:
            self._staging = Staging(layout, self._watched.device)
        return self._staging.copy(number, [tensor for _, _, tensor in tensors])

    def _put(self, state: State | None, step: Callable[[], Any] | None) -> None:
        assert self._writer is not None
        if state is not None or step is not None:
            self._writer.put(state, step)
        self._staged = self._next_step

    @_harmless
    def _after_step(self) -> None:
        if self._watched.skipped():
            self.forget_pending()
            return
        step = self._next_step
        self._announced_unkept = False
        if not self._steps.keeps(step):
            self._next_step += 1
            return
        tensors = self._tensors()
        if not self._pending:
            message = f"step {step} had no micro-batch: call Recording.batch before each forward pass"
            raise UsageError(message)
        state = self._stage(step + 1, tensors)
        self._next_step += 1
        self._put(
            state,
            pending.finisher(
                (entry for entry in self._pending if entry.has_examples or self._processes == 1),
                store=self._store_tensors,
                step=step,
                epoch=self.epoch,
                seed=torch.initial_seed(),
                learning_rates=self._learning_rates,
                gradient_norm=self._gradient_norm,
            ),
        )
        self._pending = []
        self._recorded_steps += 1
        if self._recorded_steps % UNRECORDED_EVERY == 0:
            self._warn_of_unrecorded()
        if self._steps.last == step:
            self._finish("complete")

    def _warn_of_unrecorded(self) -> None:
        if self._folder is not None and self._watched.find_unrecorded_changes():
            changes = tuple(sorted(self._watched.unrecorded_changes))
            self._folder.write(unrecorded_changes=changes)
            message = (
                f"{', '.join(changes)} change in training, but no step records them (parameters left out, of an "
                f"optimizer that is not watched, or buffers that changed late): {self.run} cannot be replayed"
            )
            warnings.warn(message, RecorderWarning, stacklevel=3)

    def _write_table(self) -> None:
        if self._folder is not None:
            self._folder.write(parameters=self._watched.table)


def _segment_steps(layout: Layout) -> int:
    narrow = all(dtype in {"float16", "bfloat16"} for dtype in layout.sizes)
    return NARROW_SEGMENT_STEPS if narrow and layout.sizes else SEGMENT_STEPS
