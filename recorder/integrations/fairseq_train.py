"""Run stock fairseq-train with the recorder on: only hooks that call the session.

fairseq's trainer is subclassed, not changed: the subclass opens the recording at the first update, announces every
micro-batch that the criterion receives, and leaves the rest to the optimizer's hooks.

Of several processes each does so. Those that fairseq starts itself import this module first of all, for they are told
to call `distributed_main`, and with it comes what fairseq needs to be imported.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from recorder.errors import UsageError
from recorder.integrations.fairseq_config import fairseq, fairseq_config, quietly
from recorder.integrations.fairseq_masters import fairseq_masters
from recorder.manifest import Trainer
from recorder.recording import Recording
from recorder.runfolder import refuse_what_is_no_run
from recorder.session import watch

import fairseq_cli.train  # isort: skip (importable once the shim has run)
from fairseq.data import data_utils  # isort: skip
from fairseq.distributed import utils as distributed_utils  # isort: skip
from fairseq.trainer import Trainer as FairseqTrainer  # isort: skip


_stock_main, _stock_distributed_main = fairseq_cli.train.main, distributed_utils.distributed_main


@dataclasses.dataclass(eq=False)
class _Session:
    """The recording of the one training of this process, and how it is to be made; it travels to the process."""

    run: Path
    arguments: tuple[str, ...]
    settings: Mapping[str, Any]
    data: str
    recording: Recording | None = None
    dummy: bool = False

    def __call__(self, config: Any, **more: Any) -> None:
        """Train and record: what fairseq calls in each process in place of its own ``main``."""
        interrupted: str | None = "training ended with an error"
        stock, fairseq_cli.train.Trainer = fairseq_cli.train.Trainer, _recorded_trainer(self)
        try:
            # A checkpoint to resume from holds its arguments as a Namespace, which torch.load refuses by default.
            with quietly(), torch.serialization.safe_globals([argparse.Namespace]):
                _stock_main(config, **more)
            interrupted = None
        finally:
            fairseq_cli.train.Trainer = stock
            if self.recording is not None:
                self.recording.close(interrupted)

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
            run=self.run,
            first_step=trainer.get_num_updates(),
            updates=trainer.cfg.optimization.max_update or None,
            files=_dictionaries(self.data),
            trainer=Trainer(
                name="fairseq", version=fairseq.__version__, arguments=self.arguments, directory=str(Path.cwd())
            ),
            masters=fairseq_masters(trainer),
            **self.settings,
        )
        trainer.criterion.register_forward_pre_hook(self._before_forward)
        trainer.criterion.register_forward_hook(self._after_forward)
        return self.recording

    def _before_forward(self, criterion: Any, args: tuple[Any, ...]) -> None:
        if criterion.training and self.recording is not None:
            _, sample = args
            if self.dummy:
                self.recording.batch(())
            else:
                self.recording.batch(sample.get("id", ()), sample)

    def _after_forward(self, criterion: Any, args: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        if criterion.training and self.recording is not None:
            loss_sum, sample_size, _ = output
            if not self.dummy:
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

        def _prepare_sample(self, sample: Any, is_dummy: bool = False) -> Any:
            # A process that has no examples left runs those of its first batch again, and drops their gradient.
            prepared, session.dummy = super()._prepare_sample(sample, is_dummy)
            return prepared, session.dummy

        def consolidate_optimizer(self) -> None:
            # Every process comes here before one of them saves a checkpoint: a training restarted from it goes on where
            # the run surely is.
            if session.recording is not None:
                session.recording.flush()
            super().consolidate_optimizer()

    return RecordedTrainer


def _dictionaries(data: str) -> dict[str, Path]:
    folder = Path(data.split(":", maxsplit=1)[0])
    return {dictionary.name: dictionary for dictionary in sorted(folder.glob("dict*.txt"))}


def _refuse_unsupported(config: Any) -> None:
    if config.common.tpu:
        message = (
            "--tpu, which fairseq 0.12.2 takes --bf16 and --memory-efficient-bf16 to mean, needs torch_xla, and its "
            "updates are not recorded; train in float32, or with --fp16, --memory-efficient-fp16 or --amp"
        )
        raise UsageError(message)
    distributed = config.distributed_training
    apart = {
        "--ddp-backend fully_sharded": distributed.ddp_backend == "fully_sharded",
        "--zero-sharding os": distributed.zero_sharding == "os",
        "--pipeline-model-parallel": distributed.pipeline_model_parallel,
        "--model-parallel-size": config.common.model_parallel_size > 1,
        "--ddp-backend slowmo": distributed.ddp_backend == "slowmo",
        "--use-bmuf": config.optimization.use_bmuf,
    }
    found = [flag for flag, given in apart.items() if given]
    if found:
        message = (
            f"{', '.join(found)}: no process of this training has all parameters and the optimizer's whole state, the "
            "same as the others; it is not recorded. Train with --ddp-backend pytorch_ddp or legacy_ddp, without "
            f"{', '.join(found)}"
        )
        raise UsageError(message)


def _inferred_languages(config: Any) -> list[str]:
    # fairseq infers them from the names of the data's files; the run keeps none of those.
    task = config.task
    if "source_lang" not in task or "target_lang" not in task or (task.source_lang and task.target_lang):
        return []
    source, target = data_utils.infer_language_pair(config.task.data.split(":", maxsplit=1)[0])
    return ["--source-lang", source, "--target-lang", target] if source and target else []


def train(run: Path, arguments: Sequence[str], settings: Mapping[str, Any]) -> None:
    """Train as ``fairseq-train ARGUMENTS`` would, and record every update.

    Parameters
    ----------
    run
        The folder of the run to make.
    arguments
        The arguments of fairseq-train.
    settings
        Further arguments of `recorder.session.watch`.

    Raises
    ------
    UsageError
        If the folder holds something else than a run, fairseq refuses the arguments, or the training is of a kind that
        is not recorded.
    """
    config = fairseq_config(arguments, Path.cwd(), run_user_code=True)
    if config.task is None or not getattr(config.task, "data", None):
        message = "the arguments name no task with binarised data; see fairseq-train --help"
        raise UsageError(message)
    _refuse_unsupported(config)
    recorded = [*arguments, *_inferred_languages(config)]
    refuse_what_is_no_run(run)
    argv, sys.argv = sys.argv, ["fairseq-train", *arguments]
    fairseq_cli.train.main = _Session(run, tuple(recorded), settings, config.task.data)
    distributed_utils.distributed_main = distributed_main
    try:
        with quietly():
            fairseq_cli.train.cli_main()
    finally:
        fairseq_cli.train.main, distributed_utils.distributed_main = _stock_main, _stock_distributed_main
        sys.argv = argv


def distributed_main(rank: int, main: Any, config: Any, more: dict[str, Any]) -> None:
    """Do in one process of several what fairseq does: its own function, by a name that can be imported without it.

    Parameters
    ----------
    rank
        The process, among those of this machine.
    main
        What to call there.
    config
        fairseq's configuration.
    more
        Further arguments of `main`.
    """
    _stock_distributed_main(rank, main, config, more)
