"""A callback for ``transformers.Trainer`` that records its training.

The Trainer's callbacks are told neither of the batches nor of the losses, and not at all of a training that fails. So
while a training with a `RecorderCallback` lasts, four methods of its Trainer are listened to: ``train``,
``get_batch_samples``, ``training_step`` and ``save_model``. They do what they did before, overridden ones too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

import recorder
from recorder.errors import UsageError
from recorder.integrations.hf_batches import Taken, carries, carrying
from recorder.integrations.hf_loss import LossReader
from recorder.manifest import Trainer as TrainerFacts
from recorder.recording import Batches, RecorderWarning

import transformers  # isort: skip

if TYPE_CHECKING:
    from recorder.recording import Recording
    from recorder.usermap import Map, UserMap

SKIPPED = "recorder.skipped_updates"
"""Under this name a checkpoint's ``trainer_state.json`` has the number of updates that a gradient scaler skipped."""

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

_training: ContextVar[Any] = ContextVar("_training", default=None)


class RecorderCallback(transformers.TrainerCallback):  # type: ignore[misc]
    """Record every update of a Trainer's training into a run: ``Trainer(..., callbacks=[RecorderCallback(run=...)])``.

    Recorded are, beside the parameters, the batches with the data set indices of their examples, and the losses where
    it is known how the Trainer's numbers add up. A training that is resumed from a checkpoint goes on with its run.
    The run is finished when the training ends, also by an exception.

    Parameters
    ----------
    run, workload, batches, steps, parameters, map, quota, segment_steps, strict
        As for `recorder.watch`. For language models `recorder.integrations.hf_workload.TrainerWorkload` is a workload.

    Attributes
    ----------
    recording : Recording or None
        The run in the making, while a training lasts.
    """

    def __init__(
        self,
        run: Path | str,
        *,
        workload: str | None = None,
        batches: Batches = "store",
        steps: str = "all",
        parameters: Sequence[str] = (),
        map: Map | UserMap | None = None,  # noqa: A002 (the word of `recorder.watch`)
        quota: int | None = None,
        segment_steps: int | None = None,
        strict: bool = False,
    ) -> None:
        self.recording: Recording | None = None
        self._arguments: dict[str, Any] = {
            "run": run,
            "workload": workload,
            "batches": batches,
            "steps": steps,
            "parameters": parameters,
            "map": map,
            "quota": quota,
            "segment_steps": segment_steps,
            "strict": strict,
        }
        self._until_the_end = ExitStack()
        self._epochs = 0
        self._taken = Taken()
        _tell_callbacks_of_failures()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the recording, or go on with it.

        Parameters
        ----------
        args, state, control, **kwargs
            As the Trainer tells them.

        Raises
        ------
        UsageError
            If the training cannot be recorded, or `recorder.watch` refuses an argument.
        """
        trainer = _training.get()
        if trainer is None:
            message = (
                f"RecorderCallback works within {transformers.Trainer.__module__}.Trainer.train; found a training that "
                "was begun otherwise: call recorder.watch in a loop of your own"
            )
            raise UsageError(message)
        if state.is_hyper_param_search:
            message = "hyperparameter_search trains many models, and a run holds one training: record the best again"
            raise UsageError(message)
        if self.recording is not None:
            self._end("it was begun again, with smaller batches")
        skipped = state.stateful_callbacks.get(SKIPPED, {}).get("updates", 0)
        with ExitStack() as stack:
            self.recording = recorder.watch(
                kwargs["model"],
                kwargs["optimizer"],
                **self._arguments,
                updates=state.max_steps,
                first_step=state.global_step - skipped,
                trainer=TrainerFacts(name="transformers", version=transformers.__version__),
            )
            stack.push(self.recording)
            # Where the training was left in the middle of an epoch, it begins in there again.
            self._epochs = int(state.epoch or 0)
            self._taken = Taken()
            loader = kwargs["train_dataloader"]
            if carries(loader):
                stack.enter_context(carrying(loader))
            else:
                message = (
                    f"the batches of a {type(loader).__name__} over a {type(loader.dataset).__name__} come without the "
                    "indices of their examples: they are recorded without"
                )
                warnings.warn(message, RecorderWarning, stacklevel=2)
            for name, listen in (
                ("get_batch_samples", self._batches_taken),
                ("training_step", self._step_done(trainer)),
                ("save_model", self._saved),
            ):
                stack.enter_context(_listening(trainer, name, listen))
            self._until_the_end = stack.pop_all()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the epochs.

        Parameters
        ----------
        args, state, control, **kwargs
            As the Trainer tells them.
        """
        self._epochs += 1
        self._taken.forget()
        if self.recording is not None:
            self.recording.epoch = self._epochs

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the updates that a gradient scaler skipped: the Trainer counts them as steps, a run does not.

        Parameters
        ----------
        args, state, control, **kwargs
            As the Trainer tells them.
        """
        if self.recording is not None and getattr(kwargs["optimizer"], "step_was_skipped", False):
            self.recording.forget_pending()
            skipped = state.stateful_callbacks.setdefault(SKIPPED, {"updates": 0})
            skipped["updates"] += 1

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finish the recording.

        Parameters
        ----------
        args, state, control, **kwargs
            As the Trainer tells them.
        """
        self._end()

    def _end(self, why: str | None = None) -> None:
        if self.recording is not None and why is not None:
            self.recording.close(f"training ended: {why}")
        self.recording = None
        self._until_the_end.close()

    def _fail(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.recording = None
        self._until_the_end.__exit__(kind, error, traceback)

    def _batches_taken(self, take: Callable[..., Any]) -> Callable[..., Any]:
        def get_batch_samples(epoch_iterator: Iterator[Any], *arguments: Any, **named: Any) -> Any:
            return take(self._taken.off(epoch_iterator), *arguments, **named)

        return get_batch_samples

    def _step_done(self, trainer: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        # The losses of several processes, or of several devices in one, are normalised together.
        alone = trainer.args.world_size == 1 and trainer.args.n_gpu <= 1
        losses = LossReader(trainer.model, trainer.args.gradient_accumulation_steps) if alone else None

        def listen(train: Callable[..., Any]) -> Callable[..., Any]:
            def training_step(model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
                inputs = self._taken.off_one(inputs)
                self._announce(trainer, inputs)
                if losses is None or self.recording is None:
                    return train(model, inputs, *arguments, **named)
                with losses.listening(inputs):
                    loss = train(model, inputs, *arguments, **named)
                items = arguments[0] if arguments else named.get("num_items_in_batch")
                known = losses.read(loss, items, getattr(trainer, "current_gradient_accumulation_steps", 1))
                if known is not None:
                    self.recording.loss(*known)
                return loss

            return training_step

        return listen

    def _announce(self, trainer: Any, inputs: Any) -> None:
        if self.recording is None:
            return
        # accelerate computes in 16 bit within the model alone; said here, the recorder knows.
        dtype = _AUTOCAST.get(trainer.accelerator.mixed_precision)
        with nullcontext() if dtype is None else torch.autocast(trainer.args.device.type, dtype):
            self.recording.batch(self._taken.indices_of(inputs), inputs)

    def _saved(self, save: Callable[..., Any]) -> Callable[..., Any]:
        def save_model(*arguments: Any, **named: Any) -> Any:
            if self.recording is not None:
                self.recording.flush()
            return save(*arguments, **named)

        return save_model


@contextmanager
def _listening(trainer: Any, name: str, listen: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    own = vars(trainer).get(name)
    method = getattr(trainer, name)
    setattr(trainer, name, wraps(method)(listen(method)))
    try:
        yield
    finally:
        if own is None:
            delattr(trainer, name)
        else:
            setattr(trainer, name, own)


def _tell_callbacks_of_failures() -> None:
    train = transformers.Trainer.train
    if getattr(train, "tells_recorder", False):
        return

    @wraps(train)
    def told(trainer: Any, *arguments: Any, **named: Any) -> Any:
        before = _training.set(trainer)
        with ExitStack() as stack:
            stack.callback(_training.reset, before)
            stack.push(lambda *failure: _fail_all(trainer, *failure))
            return train(trainer, *arguments, **named)

    told.tells_recorder = True  # type: ignore[attr-defined]
    transformers.Trainer.train = told


def _fail_all(trainer: Any, *failure: Any) -> None:
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, RecorderCallback):
            callback._fail(*failure)
