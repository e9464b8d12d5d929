"""A run in the making: what the optimizer's hooks and the training loop tell, written as segments.

The recorder draws from no random generator, changes no gradient and no parameter; an error of its own becomes a
warning and an incomplete run.
"""

from __future__ import annotations

import dataclasses
import platform
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec

import torch

from recorder import batches, runformat, tensorfile
from recorder.errors import UsageError
from recorder.manifest import FORMAT, VERSION, Manifest, Trainer
from recorder.parameters import warn_of_unmapped
from recorder.recipe import current_recipe
from recorder.segments import SEGMENTS_FOLDER, MicroBatch, Step, write_segment
from recorder.watched import Watched

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

Batches = Literal["tensors", "indices"]
P = ParamSpec("P")

GRADIENT_NORMS = 3
"""First steps whose gradient norm is recorded: those that replay's self-check does again."""


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
            if self._strict:
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
        model: nn.Module,
        optimizer: Optimizer,
        *,
        run: Path,
        workload: str | None,
        trainer: Trainer,
        batches: Batches,
        first_step: int,
        segment_steps: int,
        strict: bool,
    ) -> None:
        self.run = run
        self.epoch = 1
        self._watched = Watched(model, optimizer)
        self._strict = strict
        self._store_tensors = batches == "tensors"
        self._segment_steps = segment_steps
        self._state = "recording"
        self._next_step = first_step
        self._workload = workload
        self._trainer = trainer
        self._manifest: Manifest | None = None
        self._pending: list[MicroBatch] = []
        self._steps: list[Step] = []
        self._thetas: list[dict[str, torch.Tensor]] = []
        self._learning_rates: tuple[float, ...] = ()
        self._gradient_norm: float | None = None
        self._gradient_norms_left = GRADIENT_NORMS
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def __enter__(self) -> Recording:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(None if kind is None else f"training ended with {kind.__name__}")

    @_harmless
    def batch(self, indices: Iterable[int] | torch.Tensor, batch: Any = None) -> None:
        """Announce the next micro-batch, just before its forward pass.

        Parameters
        ----------
        indices
            The data set indices of its examples.
        batch
            The micro-batch itself: tensors in any nest of dicts, lists and tuples. Recorded with the step, so that
            replay need not collate it again; without it, the workload collates the indices.
        """
        entry = torch.as_tensor(indices if isinstance(indices, torch.Tensor) else list(indices), dtype=torch.int64)
        nest, tensors = (None, {}) if batch is None else batches.take_apart(batch)
        self._pending.append(
            MicroBatch(
                indices=entry.detach().to("cpu", copy=True).reshape(-1),
                nest=nest,
                tensors=tensors if self._store_tensors else {},
                checksums={path: tensorfile.checksum(tensor) for path, tensor in tensors.items()},
                random_state=self._watched.random_state(),
            )
        )

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
        if not self._pending:
            message = "Recording.loss was called before Recording.batch announced a micro-batch"
            raise UsageError(message)
        self._pending[-1] = dataclasses.replace(
            self._pending[-1], loss_sum=_number(loss_sum), predictions=_number(predictions)
        )

    def forget_pending(self) -> None:
        """Drop the micro-batches announced since the last step: the update they were for did not happen."""
        self._pending.clear()

    def close(self, interrupted: str | None = None) -> None:
        """Write what is left and end the recording; a second call does nothing.

        Parameters
        ----------
        interrupted
            Why the training ended before its time, if it did. Every step until then is kept.
        """
        for hook in self._hooks:
            hook.remove()
        self._finish()
        if self._state == "recording":
            self._state = "complete" if interrupted is None else f"incomplete: {interrupted}"
            if self._manifest is not None:
                warn_of_unmapped(self._manifest.parameters)
                self._write_manifest()

    @_harmless
    def _finish(self) -> None:
        self._watch_unrecorded()
        if self._steps:
            self._write_segment()

    def _give_up(self, error: Exception) -> None:
        reason = (str(error).splitlines() or [""])[0]  # torch's messages can run to pages
        self._state = f"incomplete: {type(error).__name__} at step {self._next_step}: {reason}"
        self._pending.clear()
        # Whatever failed may fail again, a full disk for one; the warning below says so and the training goes on.
        with suppress(Exception):
            if self._steps and len(self._thetas) == len(self._steps) + 1:
                self._write_segment()
        with suppress(Exception):
            self._write_manifest()
        self._steps, self._thetas = [], []
        message = f"recording of {self.run} ended ({self._state}); the training goes on unrecorded"
        warnings.warn(message, RecorderWarning, stacklevel=3)

    @_harmless
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._learning_rates = tuple(float(group["lr"]) for group in optimizer.param_groups)
        if self._manifest is None:
            self._begin()
        if self._watched.find_first_gradients():
            self._write_manifest()
        self._gradient_norm = None
        if self._gradient_norms_left:
            self._gradient_norms_left -= 1
            self._gradient_norm = self._watched.gradient_norm()

    def _begin(self) -> None:
        watched = self._watched
        watched.settle_table()
        (self.run / SEGMENTS_FOLDER).mkdir(parents=True, exist_ok=True)
        state = watched.optimizer_state()
        if state:
            runformat.write_optimizer_state(self.run, state)
        tensorfile.write(
            self.run / runformat.UNTRAINED_FILE,
            watched.copies(trained=False),
            {"format": FORMAT, "version": VERSION},
        )
        self._manifest = Manifest(
            run_id=uuid.uuid4().hex,
            state=self._state,
            path="recorded",
            workload=self._workload,
            trainer=self._trainer,
            optimizer=watched.optimizer_facts(),
            recipe=current_recipe(watched.device),
            batches="tensors" if self._store_tensors else "indices",
            parameters=watched.table,
            provenance=_provenance(),
        )
        self._write_manifest()
        self._thetas = [watched.copies(trained=True)]

    @_harmless
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._pending:
            message = f"step {self._next_step} had no micro-batch: call Recording.batch before each forward pass"
            raise UsageError(message)
        self._thetas.append(self._watched.copies(trained=True))
        self._steps.append(
            Step(
                step=self._next_step,
                epoch=self.epoch,
                seed=torch.initial_seed(),
                learning_rates=self._learning_rates,
                micro_batches=tuple(self._pending),
                gradient_norm=self._gradient_norm,
            )
        )
        self._pending = []
        self._next_step += 1
        if len(self._steps) == self._segment_steps:
            self._write_segment()

    def _write_segment(self) -> None:
        write_segment(self.run, self._thetas, self._steps)
        self._steps, self._thetas = [], self._thetas[-1:]
        self._watch_unrecorded()

    def _watch_unrecorded(self) -> None:
        if self._watched.find_unrecorded_changes():
            self._write_manifest()
            message = (
                f"{', '.join(sorted(self._watched.unrecorded_changes))} change in training, but no step records them "
                f"(buffers, or parameters of an optimizer that is not watched): {self.run} cannot be replayed"
            )
            warnings.warn(message, RecorderWarning, stacklevel=3)

    def _write_manifest(self) -> None:
        if self._manifest is not None:
            self._manifest = dataclasses.replace(
                self._manifest,
                state=self._state,
                parameters=self._watched.table,
                unrecorded_changes=tuple(sorted(self._watched.unrecorded_changes)),
            )
            self._manifest.write(self.run)


def _number(value: torch.Tensor | float) -> float:
    return float(value.detach()) if isinstance(value, torch.Tensor) else float(value)


def _provenance() -> Mapping[str, Any]:
    try:
        own = version("lossledger")
    except PackageNotFoundError:
        own = "unknown"
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "lossledger": own,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
