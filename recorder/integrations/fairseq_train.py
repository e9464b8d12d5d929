"""Run stock fairseq-train with the recorder on: only hooks that call the session.

fairseq's trainer is subclassed, not changed: the subclass opens the recording at the first update, announces every
micro-batch that the criterion receives, and leaves the rest to the optimizer's hooks.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from recorder.errors import UsageError
from recorder.integrations.fairseq_config import DICTIONARIES_FOLDER, fairseq, fairseq_config, quietly
from recorder.manifest import Trainer
from recorder.recording import Batches, RecorderWarning, Recording
from recorder.session import empty_folder, watch

import fairseq_cli.train  # isort: skip (importable once the shim has run)
from fairseq.data import data_utils  # isort: skip
from fairseq.trainer import Trainer as FairseqTrainer  # isort: skip


class _Session:
    """The recording of the one training of this process, and how it is to be made."""

    def __init__(self, run: Path, arguments: Sequence[str], batches: Batches, segment_steps: int, data: str) -> None:
        self._run = run
        self._arguments = tuple(arguments)
        self._batches = batches
        self._segment_steps = segment_steps
        self._data = data
        self.recording: Recording | None = None

    def begin(self, trainer: FairseqTrainer) -> Recording:
        """Open the recording once the trainer has its model, its optimizer and its checkpoint.

        Parameters
        ----------
        trainer
            Just before its first update.

        Returns
        -------
        Recording
            The recording.
        """
        self.recording = watch(
            trainer.get_model(),
            trainer.optimizer.optimizer,
            run=self._run,
            batches=self._batches,
            first_step=trainer.get_num_updates(),
            segment_steps=self._segment_steps,
            trainer=Trainer(
                name="fairseq", version=fairseq.__version__, arguments=self._arguments, directory=str(Path.cwd())
            ),
        )
        try:
            _copy_dictionaries(self._data, self._run / DICTIONARIES_FOLDER)
        except OSError as error:
            # A full disk is the recorder's trouble, not the training's.
            self.recording.close(f"the dictionaries could not be copied ({error})")
            warnings.warn(f"{self._run} is not recorded: {error}", RecorderWarning, stacklevel=2)
        trainer.criterion.register_forward_pre_hook(self._before_forward)
        trainer.criterion.register_forward_hook(self._after_forward)
        return self.recording

    def _before_forward(self, criterion: Any, args: tuple[Any, ...]) -> None:
        if criterion.training and self.recording is not None:
            _, sample = args
            self.recording.batch(sample.get("id", ()), sample)

    def _after_forward(self, criterion: Any, args: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        if criterion.training and self.recording is not None:
            loss_sum, sample_size, _ = output
            self.recording.loss(loss_sum.detach(), sample_size)


def _recorded_trainer(session: _Session) -> type[FairseqTrainer]:
    class RecordedTrainer(FairseqTrainer):  # type: ignore[misc]  # fairseq is untyped
        recorded_epoch = 1

        def begin_epoch(self, epoch: int) -> None:
            self.recorded_epoch = epoch
            super().begin_epoch(epoch)

        def train_step(self, samples: Any, raise_oom: bool = False) -> Any:
            recording = session.recording or session.begin(self)
            recording.epoch = self.recorded_epoch
            recording.forget_pending()
            return super().train_step(samples, raise_oom)

    return RecordedTrainer


def _copy_dictionaries(data: str, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for dictionary in sorted(Path(data.split(":", maxsplit=1)[0]).glob("dict*.txt")):
        shutil.copyfile(dictionary, target / dictionary.name)


def _refuse_unsupported(config: Any) -> None:
    common = config.common
    for flag in ("fp16", "bf16", "amp", "memory_efficient_fp16", "memory_efficient_bf16", "tpu"):
        if getattr(common, flag, False):
            message = (
                f"--{flag.replace('_', '-')}: only float32 training is recorded by this version; "
                "train without it, or record a float32 run"
            )
            raise UsageError(message)
    workers = config.distributed_training.distributed_world_size
    if workers > 1:
        message = (
            f"this training would use {workers} processes; only one is recorded by this version. "
            "Pass --distributed-world-size 1, or set CUDA_VISIBLE_DEVICES to one device"
        )
        raise UsageError(message)


def _inferred_languages(config: Any) -> list[str]:
    # fairseq infers them from the names of the data's files; the run keeps none of those.
    task = config.task
    if "source_lang" not in task or "target_lang" not in task or (task.source_lang and task.target_lang):
        return []
    source, target = data_utils.infer_language_pair(config.task.data.split(":", maxsplit=1)[0])
    return ["--source-lang", source, "--target-lang", target] if source and target else []


def train(run: Path, arguments: Sequence[str], *, batches: Batches, segment_steps: int) -> None:
    """Train as ``fairseq-train ARGUMENTS`` would, and record every update.

    Parameters
    ----------
    run
        The folder of the run to make.
    arguments
        The arguments of fairseq-train.
    batches, segment_steps
        As for `recorder.session.watch`.

    Raises
    ------
    UsageError
        If the folder is not empty, fairseq refuses the arguments, or the training is of a kind that is not recorded.
    """
    config = fairseq_config(arguments, Path.cwd(), run_user_code=True)
    if config.task is None or not getattr(config.task, "data", None):
        message = "the arguments name no task with binarised data; see fairseq-train --help"
        raise UsageError(message)
    _refuse_unsupported(config)
    recorded = [*arguments, *_inferred_languages(config)]
    session = _Session(empty_folder(run), recorded, batches, segment_steps, config.task.data)
    interrupted: str | None = "training ended with an error"
    argv, sys.argv = sys.argv, ["fairseq-train", *arguments]
    stock, fairseq_cli.train.Trainer = fairseq_cli.train.Trainer, _recorded_trainer(session)
    try:
        # A checkpoint to resume from holds its arguments as a Namespace, which torch.load refuses by default.
        with quietly(), torch.serialization.safe_globals([argparse.Namespace]):
            fairseq_cli.train.cli_main()
        interrupted = None
    finally:
        fairseq_cli.train.Trainer = stock
        sys.argv = argv
        if session.recording is not None:
            session.recording.close(interrupted)
