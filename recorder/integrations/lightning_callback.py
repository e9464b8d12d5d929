"""A callback for Lightning's Trainer: only hooks that call the session.

Lightning lets the optimizer call forward and backward pass as a closure, with gradients zeroed in between; what that
means for a recording is settled in `recorder.closures`.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from recorder.announcing import Indices, RecordedBatchSampler, found_in, matchable
from recorder.errors import UsageError
from recorder.manifest import Trainer as TrainerFacts
from recorder.recording import Batches, RecorderWarning, Recording
from recorder.session import watch

try:
    import lightning.pytorch as pl
except ModuleNotFoundError:
    try:
        import pytorch_lightning as pl
    except ModuleNotFoundError:
        _message = "this integration needs Lightning: pip install 'lossledger[lightning]'"
        raise ModuleNotFoundError(_message) from None

_WHOLE = {"SingleDeviceStrategy", "DDPStrategy"}
"""Strategies in which every process holds all parameters and a torch optimizer, with those derived from them."""

_NOT_WHOLE = {"DeepSpeedStrategy", "SingleDeviceXLAStrategy"}
"""Derived from them, and otherwise."""


class RecorderCallback(pl.Callback):  # type: ignore[misc]  # Lightning is not looked into
    """Record every update of a training: ``Trainer(callbacks=[RecorderCallback("runs/x", ...)])``.

    It also serves the Trainer of the package ``pytorch_lightning``. The training is not changed. A training taken up
    again with ``ckpt_path`` goes on in the same run, which verifies that it goes on where the run was.

    Parameters
    ----------
    run
        The folder to make, or the run to go on with.
    workload
        ``module:function``, see `recorder.watch`.
    indices
        Where a batch holds the data set indices of its examples: a key into a dict, a position in a tuple or list, or a
        function of the batch. None takes them from the loader's batch sampler if that is a `RecordedBatchSampler`.
    predictions
        How many predictions a batch has, as a function of it. Where ``training_step`` returns the mean loss over so
        many, the losses are recorded, and replay verifies that it measures the same.
    model
        Name of the submodule to record, such as ``"net"``; the LightningModule itself by default. It must hold all that
        the optimizer updates. The workload builds what is named here.
    batches, steps, parameters, quota, updates, segment_steps, strict
        As for `recorder.watch`.

    Attributes
    ----------
    recording : Recording or None
        The run in the making, while ``Trainer.fit`` trains.
    """

    def __init__(
        self,
        run: Path | str,
        *,
        workload: str | None = None,
        indices: Indices | None = None,
        predictions: Callable[[Any], float | torch.Tensor] | None = None,
        model: str = "",
        batches: Batches = "store",
        steps: str = "all",
        parameters: Sequence[str] = (),
        quota: int | None = None,
        updates: int | None = None,
        segment_steps: int | None = None,
        strict: bool = False,
    ) -> None:
        self.recording: Recording | None = None
        self._indices = indices
        self._predictions = predictions
        self._model = model
        self._updates = updates
        self._settings: dict[str, Any] = {
            "run": run,
            "workload": workload,
            "batches": batches,
            "steps": steps,
            "parameters": parameters,
            "quota": quota,
            "segment_steps": segment_steps,
            "strict": strict,
        }
        self._sampler: RecordedBatchSampler | None = None
        self._resumed = False
        self._next_batch: int | None = None
        self._count: float | torch.Tensor | None = None
        self._updates_before = 0
        self._skipped = 0

    def state_dict(self) -> dict[str, Any]:
        """Give what a checkpoint keeps.

        Returns
        -------
        dict
            The number of updates that a gradient scaler skipped: Lightning counts them, a run does not.
        """
        return {"skipped": self._skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what a checkpoint has kept.

        Parameters
        ----------
        state_dict
            What `state_dict` returned.
        """
        self._skipped = int(state_dict.get("skipped", 0))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the recording: model, optimizer and checkpoint are there, no batch yet.

        A `UsageError` tells if the training is of a kind that is not recorded, or `watch` refuses its arguments.

        Parameters
        ----------
        trainer, pl_module
            Lightning's.
        """
        _refuse_unsupported(trainer, pl_module)
        updates = trainer.estimated_stepping_batches
        self.recording = watch(
            _submodule(pl_module, self._model),
            trainer.optimizers[0],
            updates=self._updates or (int(updates) if 0 < updates < math.inf else None),
            first_step=trainer.global_step - self._skipped,
            trainer=TrainerFacts(name="lightning", version=pl.__version__),
            **self._settings,
        )
        self._resumed = bool(trainer.ckpt_path)
        if self._indices is None and _recorded_sampler(trainer.train_dataloader) is None:
            message = (
                "the batches are recorded without the data set indices of their examples: pass indices=KEY to "
                "RecorderCallback, or make the loader with batch_sampler=RecordedBatchSampler(...)"
            )
            warnings.warn(message, RecorderWarning, stacklevel=2)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Look which loader this epoch has.

        Parameters
        ----------
        trainer, pl_module
            Lightning's.
        """
        if self.recording is None:
            return
        self.recording.epoch = trainer.current_epoch + 1
        self.recording.forget_pending()  # of an epoch that a hook has ended within an update
        if self._indices is None:
            self._sampler = _recorded_sampler(trainer.train_dataloader)
        # The loader of an epoch that was left in the middle begins anew, while Lightning counts on.
        self._next_batch = None if self._resumed else 0
        self._resumed = False

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Announce a micro-batch, right before its forward pass.

        Parameters
        ----------
        trainer, pl_module, batch, batch_idx
            Lightning's.
        """
        if self.recording is None:
            return
        self._updates_before = trainer.global_step
        self._count = None if self._predictions is None else self._predictions(batch)
        # Within what the forward pass happens in: so the recorder sees its autocast.
        with trainer.precision_plugin.train_step_context():
            self.recording.batch(self._indices_of(batch, batch_idx), batch)

    def _indices_of(self, batch: Any, batch_idx: int) -> Iterable[int] | None:
        if self._indices is not None:
            return found_in(batch, self._indices)
        if self._sampler is None:
            return None
        # Batches that are None are fetched and counted, and no hook hears of them.
        unheard_of = 0 if self._next_batch is None else batch_idx - self._next_batch
        self._next_batch = batch_idx + 1
        return self._sampler.take(after=unheard_of)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: torch.Tensor) -> None:
        """Tell the loss of the micro-batch announced last, where its number of predictions is known.

        Parameters
        ----------
        trainer, pl_module, loss
            Lightning's; the loss is divided for accumulation and multiplied by a gradient scaler.
        """
        # In manual optimization a batch may have several backward passes, of parts of its loss.
        if self.recording is None or self._count is None or not pl_module.automatic_optimization:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        mean = loss.detach() * (trainer.accumulate_grad_batches / (1.0 if scaler is None else scaler.get_scale()))
        self.recording.loss(mean * self._count, self._count)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Find out whether an update was skipped.

        Parameters
        ----------
        trainer, pl_module, outputs, batch, batch_idx
            Lightning's.
        """
        if self.recording is None or trainer.global_step == self._updates_before:
            return
        self.recording.forget_pending()
        if self.recording.active:
            self._skipped = trainer.global_step - self.recording.next_step

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Bring to the disk what the checkpoint follows: a training restarted from it goes on where the run surely is.

        Parameters
        ----------
        trainer, pl_module, checkpoint
            Lightning's.
        """
        if self.recording is not None:
            self.recording.flush()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """End the recording.

        Parameters
        ----------
        trainer, pl_module
            Lightning's.
        """
        self._close(None)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Keep every step until then; interruption by the keyboard and SIGTERM come here, too.

        Parameters
        ----------
        trainer, pl_module, exception
            Lightning's.
        """
        self._close(f"training ended with {type(exception).__name__}")

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """End a recording that no other hook has ended.

        Parameters
        ----------
        trainer, pl_module, stage
            Lightning's.
        """
        self._close("the trainer was torn down before its training had ended")

    def _close(self, interrupted: str | None) -> None:
        recording, self.recording = self.recording, None
        if recording is not None:
            recording.close(interrupted)


def _refuse_unsupported(trainer: Any, pl_module: Any) -> None:
    found = trainer.optimizers
    if len(found) != 1 or not isinstance(found[0], torch.optim.Optimizer):
        classes = ", ".join(type(optimizer).__name__ for optimizer in found) or "none"
        message = (
            f"expected one torch optimizer from configure_optimizers; found {len(found)} ({classes}). The steps of a "
            "run are those of one optimizer over all parameters that train: give one optimizer several parameter "
            "groups, or train without RecorderCallback"
        )
        raise UsageError(message)
    kinds = {kind.__name__ for kind in type(trainer.strategy).__mro__}
    if not kinds & _WHOLE or kinds & _NOT_WHOLE:
        message = (
            f"{type(trainer.strategy).__name__}: no process of this training has all parameters and a torch optimizer "
            "over them; it is not recorded. Train on one device or with strategy='ddp'"
        )
        raise UsageError(message)
    if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
        message = (
            "a training_step(dataloader_iter) fetches its batches itself, and no hook sees them before their forward "
            "pass; write training_step(batch, batch_idx) to record it"
        )
        raise UsageError(message)


def _submodule(pl_module: Any, name: str) -> torch.nn.Module:
    try:
        found: torch.nn.Module = pl_module.get_submodule(name)
    except AttributeError as error:
        names = ", ".join(name for name, _ in pl_module.named_children()) or "none"
        message = f"model={name!r}: {type(pl_module).__name__} has no such submodule; its submodules are {names}"
        raise UsageError(message) from error
    return found


def _recorded_sampler(loader: Any) -> RecordedBatchSampler | None:
    sampler = loader.batch_sampler if isinstance(loader, DataLoader) else None
    if isinstance(sampler, RecordedBatchSampler):
        matchable(loader, sampler)
        return sampler
    return None
