"""`watch`: record every optimizer step of a training loop, without changing the training.

The optimizer's own hooks say when a step happens, so nothing of the loop is replaced. The recorder draws from no
random generator, changes no gradient and no parameter; an error of its own becomes a warning and an incomplete run.
"""

from __future__ import annotations

import dataclasses
import math
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

from recorder import batches, durable, runformat, tensorfile
from recorder.errors import UsageError
from recorder.manifest import Manifest, OptimizerFacts, Trainer
from recorder.parameters import parameter_table, warn_of_unmapped
from recorder.recipe import current_recipe

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

Batches = Literal["tensors", "indices"]
P = ParamSpec("P")

SEGMENT_STEPS = 16
"""Steps to a segment: its start is stored twice, so 16 costs 6 % more than every step once."""


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
        self._model = model
        self._optimizer = optimizer
        self._strict = strict
        self._store_tensors = batches == "tensors"
        self._segment_steps = segment_steps
        self._state = "recording"
        self._device = next(iter(model.parameters())).device
        self._next_step = first_step
        self._tensors = dict(model.named_parameters())
        self._names = {id(tensor): name for name, tensor in self._tensors.items()}
        self._table = parameter_table(model)
        self._workload = workload
        self._trainer = trainer
        self._manifest: Manifest | None = None
        self._pending: list[runformat.MicroBatch] = []
        self._steps: list[runformat.Step] = []
        self._thetas: list[dict[str, torch.Tensor]] = []
        self._learning_rates: tuple[float, ...] = ()
        self._gradient_norm: float | None = None
        self._gradient_norms_left = GRADIENT_NORMS
        self._buffers: dict[str, torch.Tensor] = {}
        self._changing_buffers: set[str] = set()
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
            runformat.MicroBatch(
                indices=entry.detach().to("cpu", copy=True).reshape(-1),
                nest=nest,
                tensors=tensors if self._store_tensors else {},
                checksums={path: tensorfile.checksum(tensor) for path, tensor in tensors.items()},
                random_state=self._random_state(),
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
        self._watch_buffers()
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

    def _random_state(self) -> dict[str, torch.Tensor]:
        # Reading a generator's state does not advance it.
        state = {"rng_cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            state["rng_cuda"] = torch.cuda.get_rng_state(self._device)
        return state

    @_harmless
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._learning_rates = tuple(float(group["lr"]) for group in optimizer.param_groups)
        if self._manifest is None:
            self._begin()
        self._find_first_gradients()
        self._gradient_norm = None
        if self._gradient_norms_left:
            self._gradient_norms_left -= 1
            gradients = [_entries(tensor.grad) for tensor in self._tensors.values() if tensor.grad is not None]
            self._gradient_norm = float(torch.nn.utils.get_total_norm(gradients))

    def _begin(self) -> None:
        updated = {id(tensor) for group in self._optimizer.param_groups for tensor in group["params"]}
        unknown = len(updated - set(self._names))
        if unknown:
            message = (
                f"the optimizer updates {unknown} tensors that are no parameters of the model given to watch "
                "(a float32 copy kept for 16-bit training, or another model's); such training is not recorded yet"
            )
            raise UsageError(message)
        self._table = tuple(
            parameter
            if self._tensors[parameter.name].grad is not None and id(self._tensors[parameter.name]) in updated
            else dataclasses.replace(parameter, status="untrained")
            for parameter in self._table
        )
        state = self._optimizer.state_dict()["state"]
        (self.run / runformat.SEGMENTS_FOLDER).mkdir(parents=True, exist_ok=True)
        if state:
            runformat.write_optimizer_state(self.run, state)
        untrained = {parameter.name: self._copy(parameter.name) for parameter in self._table if not parameter.trained}
        tensorfile.write(
            self.run / runformat.UNTRAINED_FILE,
            untrained,
            {"format": runformat.FORMAT, "version": runformat.VERSION},
        )
        self._manifest = Manifest(
            run_id=uuid.uuid4().hex,
            state=self._state,
            path="recorded",
            workload=self._workload,
            trainer=self._trainer,
            optimizer=self._optimizer_facts(fresh=not state),
            recipe=current_recipe(self._device),
            batches="tensors" if self._store_tensors else "indices",
            parameters=self._table,
            provenance=_provenance(),
        )
        self._write_manifest()
        self._buffers = {name: buffer.detach().clone() for name, buffer in self._model.named_buffers()}
        self._thetas = [self._copy_trained()]

    def _optimizer_facts(self, *, fresh: bool) -> OptimizerFacts:
        groups = []
        for group in self._optimizer.param_groups:
            facts = {
                key: _hyperparameter(value)
                for key, value in group.items()
                if isinstance(value, bool | int | float | str | tuple | None)
            }
            groups.append(facts | {"parameters": [self._names[id(tensor)] for tensor in group["params"]]})
        kind = type(self._optimizer)
        return OptimizerFacts(name=f"{kind.__module__}.{kind.__qualname__}", groups=tuple(groups), fresh=fresh)

    def _find_first_gradients(self) -> None:
        late = {
            parameter.name
            for parameter in self._table
            if not parameter.trained
            and self._tensors[parameter.name].grad is not None
            and self._is_updated(parameter.name)
        }
        if late:
            self._table = tuple(
                dataclasses.replace(parameter, status="trained") if parameter.name in late else parameter
                for parameter in self._table
            )
            self._write_manifest()

    def _is_updated(self, name: str) -> bool:
        tensor = self._tensors[name]
        return any(tensor is entry for group in self._optimizer.param_groups for entry in group["params"])

    @_harmless
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._pending:
            message = f"step {self._next_step} had no micro-batch: call Recording.batch before each forward pass"
            raise UsageError(message)
        self._thetas.append(self._copy_trained())
        self._steps.append(
            runformat.Step(
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
        runformat.write_segment(self.run, self._thetas, self._steps)
        self._steps, self._thetas = [], self._thetas[-1:]
        self._watch_buffers()

    def _watch_buffers(self) -> None:
        changed = {
            name
            for name, buffer in self._model.named_buffers()
            if name not in self._buffers or not _same_bits(buffer, self._buffers[name])
        }
        if self._manifest is not None and changed - self._changing_buffers:
            self._changing_buffers |= changed
            self._write_manifest()

    def _copy(self, name: str) -> torch.Tensor:
        return self._tensors[name].detach().to("cpu", copy=True)

    def _copy_trained(self) -> dict[str, torch.Tensor]:
        return {parameter.name: self._copy(parameter.name) for parameter in self._table if parameter.trained}

    def _write_manifest(self) -> None:
        if self._manifest is not None:
            self._manifest = dataclasses.replace(
                self._manifest,
                state=self._state,
                parameters=self._table,
                changing_buffers=tuple(sorted(self._changing_buffers)),
            )
            self._manifest.write(self.run)


def watch(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    run: Path | str,
    workload: str | None = None,
    batches: Batches = "tensors",
    first_step: int = 0,
    segment_steps: int = SEGMENT_STEPS,
    strict: bool = False,
    trainer: Trainer | None = None,
) -> Recording:
    """Record every step of an optimizer into a run.

    Parameters
    ----------
    model
        The model in training; its named parameters become the parameter table.
    optimizer
        Any torch optimizer over parameters of `model`.
    run
        The folder to make. It must not exist, or be empty.
    workload
        ``module:function`` that returns the `recorder.workload.Workload` from which replay rebuilds model, batches
        and loss. Nothing is imported from it now.
    batches
        ``tensors`` stores the micro-batches given to `Recording.batch`; ``indices`` only their checksums.
    first_step
        Number of updates made before.
    segment_steps
        Steps to a segment. So many steps are held in memory, and lost by a kill.
    strict
        Raise the recorder's own errors instead of warning and going on unrecorded.
    trainer
        Set by integrations.

    Returns
    -------
    Recording
        A context manager; announce each micro-batch to its method ``batch``.

    Raises
    ------
    UsageError
        If the folder is not empty, or an argument makes no sense.

    Examples
    --------
    >>> import recorder  # doctest: +SKIP
    >>> with recorder.watch(model, optimizer, run="runs/x", workload="my_project:workload") as rec:  # doctest: +SKIP
    ...     for batch in loader:
    ...         rec.batch(batch["id"], batch)
    ...         loss(model(batch)).backward()
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    """
    if batches not in {"tensors", "indices"}:
        message = f"batches is 'tensors' or 'indices', not {batches!r}"
        raise UsageError(message)
    if segment_steps < 1:
        message = f"segment_steps is at least 1, not {segment_steps}"
        raise UsageError(message)
    folder = empty_folder(run)
    return Recording(
        model,
        optimizer,
        run=folder,
        workload=workload,
        trainer=trainer or Trainer(name="torch", version=str(torch.__version__)),
        batches=batches,
        first_step=first_step,
        segment_steps=segment_steps,
        strict=strict,
    )


def empty_folder(run: Path | str) -> Path:
    """Make the folder of a new run, refusing one that holds anything.

    Parameters
    ----------
    run
        The folder.

    Returns
    -------
    Path
        The folder, which exists now.

    Raises
    ------
    UsageError
        If it is not empty or cannot be made.
    """
    folder = Path(run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"the run folder {folder} cannot be made: {error.strerror}"
        raise UsageError(message) from error
    durable.sweep(folder)
    if any(folder.iterdir()):
        message = f"{folder} is not empty; a run is never overwritten. Give another folder, or remove this one"
        raise UsageError(message)
    return folder


def _number(value: torch.Tensor | float) -> float:
    return float(value.detach()) if isinstance(value, torch.Tensor) else float(value)


def _hyperparameter(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_hyperparameter(entry) for entry in value]
    if isinstance(value, torch.Tensor) or (isinstance(value, float) and not math.isfinite(value)):
        value = float(value)
        return value if math.isfinite(value) else repr(value)  # JSON has no NaN and no infinity
    return value


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    # NaN is no change: fairseq keeps a buffer of memory that it never fills.
    bits = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)


def _entries(gradient: torch.Tensor) -> torch.Tensor:
    # torch takes no norm of a sparse gradient (nn.Embedding(sparse=True)).
    return gradient.coalesce().values() if gradient.is_sparse else gradient


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
