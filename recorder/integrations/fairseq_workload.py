"""Rebuild a fairseq training from its run: model, batches, loss, and its updates bit for bit.

Everything comes from the recorded argument list and the dictionaries kept in the run; only the probe, or batches
whose tensors were not recorded, need the binarised data.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recorder.errors import FormatError, UsageError
from recorder.integrations.fairseq_config import DICTIONARIES_FOLDER, fairseq_config, quietly
from recorder.integrations.fairseq_halving import halve_sample
from recorder.integrations.fairseq_masters import fairseq_masters
from recorder.manifest import Trainer
from recorder.steps import MicroBatch, Step
from recorder.workload import RepeatedUpdate

import fairseq  # isort: skip (importable once the shim has run)
from fairseq import tasks, utils  # isort: skip (importable once the shim has run)
from fairseq.data import data_utils  # isort: skip
from fairseq.trainer import Trainer as FairseqTrainer  # isort: skip

MOST_TRIES = 64
"""An update in 16 bit is tried again after an overflow, with half the loss scale: as in training, it starts high."""


class FairseqWorkload:
    """The `recorder.workload.Workload` of a run made by ``python -m recorder fairseq-train``.

    Parameters
    ----------
    run
        The run's folder, whose copies of the dictionaries are used; None to take those that lie with the data.
    trainer
        The manifest's entry.
    data
        Where the binarised data is now; None for the recorded place.
    run_user_code
        Whether the recorded ``--user-dir`` may be imported.
    """

    def __init__(self, run: Path | None, trainer: Trainer, *, data: str | None, run_user_code: bool) -> None:
        self._arguments = trainer.arguments
        self._config = fairseq_config(trainer.arguments, Path(trainer.directory), run_user_code=run_user_code)
        self._data = data or self._config.task.data
        self._data_task: Any = None
        self._config.task.data = self._data if run is None else str(run / DICTIONARIES_FOLDER)
        # The updates of several processes are done again in this one.
        self._config.distributed_training.distributed_world_size = 1
        with quietly():
            self._task = tasks.setup_task(self._config.task)
            self._criterion = self._task.build_criterion(self._config.criterion)

    def model(self) -> nn.Module:
        """Build the model as fairseq-train does.

        Returns
        -------
        torch.nn.Module
            Freshly initialised. The encoder's fused inference path is switched off: it reads tensors that training
            never updates, and its loss is silently wrong.

        Raises
        ------
        FormatError
            If fairseq built something that is no module.
        """
        with quietly():
            model = self._task.build_model(self._config.model)
        if not isinstance(model, nn.Module):
            message = f"fairseq built a {type(model).__name__} where a torch module was expected"
            raise FormatError(message)
        for module in model.modules():
            if hasattr(module, "can_use_fastpath"):
                setattr(module, "can_use_fastpath", False)  # noqa: B010 (typed as a submodule)
        return model

    def _dataset(self, split: str) -> Any:
        places = self._data.split(":")
        missing = [place for place in places if not Path(place).is_dir()]
        if missing:
            message = (
                f"the binarised data of this training is not at {missing[0]}; pass --data FOLDER with where it is now "
                "(only loss data 'batch' needs no data)"
            )
            raise UsageError(message)
        try:
            with quietly():
                if self._data_task is None:
                    self._config.task.data = self._data
                    self._data_task = tasks.setup_task(self._config.task)
                if split not in self._data_task.datasets:
                    self._data_task.load_dataset(split, combine=False, epoch=1)
        except FileNotFoundError as error:
            message = (
                f"{self._data} does not hold the split {split!r} of this training's binarised data ({error}); "
                "pass --data FOLDER with where it is now"
            )
            raise UsageError(message) from error
        return self._data_task.datasets[split]

    def indices(self, split: str) -> Sequence[int]:
        """List the examples of a split that training would use, in fairseq's order of similar lengths.

        Parameters
        ----------
        split
            ``train`` or ``valid``.

        Returns
        -------
        sequence of int
            Data set indices; examples too long for the model are left out, as in training.
        """
        dataset = self._dataset(split)
        with data_utils.numpy_seed(self._config.common.seed):
            ordered = dataset.ordered_indices()
        positions = utils.resolve_max_positions(
            self._task.max_positions(), self._max_positions_of_model(), self._config.dataset.max_tokens
        )
        kept = self._task.filter_indices_by_size(ordered, dataset, positions, ignore_invalid_inputs=True)
        return [int(index) for index in kept]

    def _max_positions_of_model(self) -> Any:
        model: Any = self.model()
        return model.max_positions()

    def batch(self, indices: Sequence[int], *, split: str, epoch: int) -> Any:
        """Collate examples, and put the rows in the order of `indices`.

        fairseq's collater sorts by length with a sort that is not stable, so its own order cannot be relied on.

        Parameters
        ----------
        indices
            Data set indices.
        split
            ``train`` or ``valid``.
        epoch
            Decides a masked language model's masks.

        Returns
        -------
        dict
            fairseq's sample, in host memory.
        """
        dataset = self._dataset(split)
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(epoch)
        with quietly():
            sample = dataset.collater([dataset[index] for index in indices])
        position = {int(index): row for row, index in enumerate(sample["id"])}
        order = torch.tensor([position[int(index)] for index in indices])
        return _permute_rows(sample, order)

    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Apply the training's criterion.

        Parameters
        ----------
        model
            The model.
        batch
            fairseq's sample, on the model's device.

        Returns
        -------
        loss_sum : torch.Tensor
            0-d, in nats.
        sample_size : torch.Tensor or float
            What training divides the gradient by.
        """
        # As fairseq does for its own passes, the criterion is in the model's mode.
        self._criterion.train(model.training)
        with quietly():
            loss_sum, sample_size, _ = self._criterion(model, batch)
        return loss_sum, sample_size

    def halve(self, batch: Any) -> tuple[Any, Any]:
        """Cut a sample in two, for one that does not fit into memory.

        Parameters
        ----------
        batch
            fairseq's sample.

        Returns
        -------
        tuple of dict
            Two samples that add up to it.
        """
        return halve_sample(batch, self._task.source_dictionary.pad())

    def repeat_updates(
        self,
        theta: Mapping[str, torch.Tensor],
        optimizer_state: Mapping[str, Any] | None,
        steps: Sequence[Step],
    ) -> Iterator[RepeatedUpdate]:
        """Redo consecutive updates with fairseq's own trainer.

        Parameters
        ----------
        theta
            Parameters before the first of them.
        optimizer_state
            The optimizer's state then; None if it had none.
        steps
            The recorded steps.

        Yields
        ------
        RepeatedUpdate
            Losses and parameters of each update.
        """
        with tempfile.TemporaryDirectory() as scratch, quietly():
            # On a non-finite gradient fairseq writes crash.pt into its save folder, which is the user's.
            self._config.checkpoint.save_dir = scratch
            trainer = FairseqTrainer(
                self._config, self._task, self.model(), self._task.build_criterion(self._config.criterion)
            )
            recorded = self._set(trainer, theta)
            if optimizer_state is not None:
                # Through fairseq: it keeps the float32 state of 16-bit parameters, which torch would round.
                inner = trainer.optimizer.optimizer
                trainer.optimizer.load_state_dict({**inner.state_dict(), "state": optimizer_state})
            losses: list[tuple[float, float]] = []
            passes: list[MicroBatch] = []
            # Every process draws from a generator of its own; --amp may go through all passes again.
            trainer.criterion.register_forward_pre_hook(
                lambda module, args: passes[len(losses) % len(passes)].set_random_state(trainer.device)
            )
            trainer.criterion.register_forward_hook(
                lambda module, args, output: losses.append((float(output[0].detach()), float(output[1])))
            )
            for step in steps:
                trainer.set_num_updates(step.step)
                trainer.optimizer.set_lr(step.learning_rates[0])
                passes[:] = step.micro_batches
                samples = [self._sample(step, position) for position in range(len(step.micro_batches))]
                for _ in range(MOST_TRIES):
                    losses.clear()
                    trainer.train_step(samples)
                    if trainer.get_num_updates() > step.step:
                        break
                parameters = {name: tensor.detach().to("cpu", copy=True) for name, tensor in recorded.items()}
                yield RepeatedUpdate(losses=tuple(losses), parameters=parameters)

    @staticmethod
    def _set(trainer: Any, theta: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # The recorded tensors by name: the masters where there are some, which the model's own parameters round.
        named = dict(trainer.get_model().named_parameters())
        recorded = {**named, **fairseq_masters(trainer)}
        with torch.no_grad():
            for name, value in theta.items():
                named[name].copy_(value)
                recorded[name].copy_(value)
        return recorded

    def _sample(self, step: Step, position: int) -> Any:
        micro_batch = step.micro_batches[position]
        if micro_batch.stored:
            return micro_batch.batch()
        return self.batch(micro_batch.indices.tolist(), split="train", epoch=step.epoch)


def fairseq_workload(arguments: Sequence[str], directory: Path | str = ".") -> FairseqWorkload:
    """Rebuild a fairseq training that was not recorded, from the arguments it was started with.

    For a workload of one's own, to import its checkpoints with.

    Parameters
    ----------
    arguments
        The command line, without ``fairseq-train``; a ``--user-dir`` among them is imported.
    directory
        Where relative paths in the arguments start.

    Returns
    -------
    FairseqWorkload
        The workload.
    """
    place = str(Path(directory).absolute())
    trainer = Trainer(name="fairseq", version=fairseq.__version__, arguments=tuple(arguments), directory=place)
    return FairseqWorkload(None, trainer, data=None, run_user_code=True)


def _permute_rows(sample: Any, order: torch.Tensor) -> Any:
    if isinstance(sample, torch.Tensor):
        return sample[order] if sample.dim() > 0 and sample.shape[0] == len(order) else sample
    if isinstance(sample, Mapping):
        return {key: _permute_rows(value, order) for key, value in sample.items()}
    return sample
