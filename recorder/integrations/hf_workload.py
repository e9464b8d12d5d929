"""The workload of a training by ``transformers.Trainer``, made of what its user gave the Trainer."""

from __future__ import annotations

import copy
import inspect
import math
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from recorder import tensorfile
from recorder.batches import take_apart
from recorder.errors import UsageError
from recorder.integrations.hf_loss import IGNORED, shifts_labels, summed_cross_entropy, targets, unwrapped

from transformers import default_data_collator  # isort: skip
from transformers.trainer_pt_utils import LabelSmoother  # isort: skip


class TrainerWorkload:
    """The `recorder.workload.Workload` of a language model trained by a Trainer: causal, masked, or with an encoder.

    The model gives logits, the batch has labels, and -100 among them marks what is not to be predicted. For another
    loss override `loss`.

    Parameters
    ----------
    model
        Builds the model: ``lambda: GPT2LMHeadModel(config)``, or ``from_pretrained``. Its values do not matter.
    train_dataset, eval_dataset
        As given to the Trainer, with examples by index.
    data_collator
        As given to the Trainer. It may draw random numbers: `batch` seeds the generators and puts them back.
    remove_unused_columns
        As in ``TrainingArguments``.
    label_smoothing
        As ``label_smoothing_factor`` in ``TrainingArguments``.
    shift_labels
        Whether the label at a position is predicted from those before it; found out from the model's class if None.

    Examples
    --------
    In a module that replay can import::

        def workload():
            return TrainerWorkload(lambda: GPT2LMHeadModel(config), train_dataset, eval_dataset)
    """

    def __init__(
        self,
        model: Callable[[], nn.Module],
        train_dataset: Any,
        eval_dataset: Any = None,
        data_collator: Callable[[Any], Any] = default_data_collator,
        *,
        remove_unused_columns: bool = True,
        label_smoothing: float = 0.0,
        shift_labels: bool | None = None,
    ) -> None:
        self._build = model
        self._datasets = {"train": train_dataset, "valid": eval_dataset}
        self._collate = data_collator
        self._remove_unused_columns = remove_unused_columns
        self._label_smoothing = label_smoothing
        self._shift_labels = shift_labels
        self._columns: frozenset[str] | None = None
        self._divides_by_all: bool | None = None

    def model(self) -> nn.Module:
        """Build the model.

        Returns
        -------
        torch.nn.Module
            The user's.
        """
        return self._build()

    def indices(self, split: str) -> Sequence[int]:
        """List the examples of a split.

        Parameters
        ----------
        split
            ``train`` or ``valid``.

        Returns
        -------
        sequence of int
            All positions in its data set.
        """
        return range(len(self._dataset(split)))

    def _dataset(self, split: str) -> Any:
        dataset = self._datasets[split]
        if dataset is None:
            message = f"the workload has no data for the split {split!r}: give TrainerWorkload an eval_dataset"
            raise UsageError(message)
        return dataset

    def batch(self, indices: Sequence[int], *, split: str, epoch: int) -> Any:
        """Collate examples as the Trainer does, without the columns that the model does not take.

        Parameters
        ----------
        indices
            Which.
        split
            ``train`` or ``valid``.
        epoch
            From 1. A collator that draws random numbers draws others in another epoch.

        Returns
        -------
        dict
            What the collator made.
        """
        return self._collated(indices, split, f"{split} {epoch} {list(indices)}")

    def collates_at_random(self, indices: Sequence[int], *, split: str) -> bool:
        """Say whether the collator draws random numbers for these examples, as one that masks tokens does.

        Parameters
        ----------
        indices
            Which.
        split
            ``train`` or ``valid``.

        Returns
        -------
        bool
            Whether two seeds give different batches.
        """
        first, second = (take_apart(self._collated(indices, split, seed))[1] for seed in ("first", "second"))
        return {path: tensorfile.checksum(tensor) for path, tensor in first.items()} != {
            path: tensorfile.checksum(tensor) for path, tensor in second.items()
        }

    def _collated(self, indices: Sequence[int], split: str, seed: str) -> dict[str, Any]:
        dataset, columns = self._dataset(split), self._columns_of_the_model()
        with _seeded(zlib.crc32(seed.encode())):
            examples = [_only(columns, dataset[index]) for index in indices]
            # A collator with a seed of its own makes its generator in its first call: each call is the first of a copy.
            return dict(copy.copy(self._collate)(examples))

    def _columns_of_the_model(self) -> frozenset[str] | None:
        if self._columns is None and self._remove_unused_columns:
            with _seeded(0):  # building draws
                accepted = inspect.signature(unwrapped(self._build()).forward).parameters
            self._columns = frozenset(accepted) | {"label", "label_ids"}
        return self._columns

    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Measure the cross-entropy of the model's predictions.

        Parameters
        ----------
        model
            The model.
        batch
            What the collator made, with ``labels``.

        Returns
        -------
        loss_sum : torch.Tensor
            Summed over predictions, in nats.
        predictions : torch.Tensor
            How many labels there are to predict.

        Raises
        ------
        UsageError
            If the batch has no labels, or the model's class does not tell whether they are shifted.
        """
        if "labels" not in batch:
            message = f"expected a batch with labels; found {', '.join(batch)}: override TrainerWorkload.loss"
            raise UsageError(message)
        shifted = shifts_labels(model) if self._shift_labels is None else self._shift_labels
        if shifted is None:
            message = (
                f"{type(unwrapped(model)).__name__} is neither a causal nor a masked language model of transformers: "
                "pass TrainerWorkload shift_labels=True where a label is predicted from the positions before it, "
                "else shift_labels=False"
            )
            raise UsageError(message)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        if model.config.is_encoder_decoder and not {"decoder_input_ids", "decoder_inputs_embeds"} & set(inputs):  # type: ignore[union-attr]
            inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])  # type: ignore[operator]
        expected = targets(batch["labels"], shifted=shifted)
        loss_sum = summed_cross_entropy(model(**inputs).logits, expected, self._label_smoothing)
        return loss_sum, expected.ne(IGNORED).sum()

    def weight(self, model: nn.Module, batch: Any) -> float:
        """Weigh a micro-batch as a Trainer does that accumulates gradients.

        Most models divide their loss by the predictions of the whole accumulation, which the Trainer tells them.
        Others (BERT) divide by those of the micro-batch, so that every micro-batch counts as much as any.

        Parameters
        ----------
        model
            The model.
        batch
            A micro-batch.

        Returns
        -------
        float
            The weight of the summed loss.
        """
        if self._divides_by_all is None:
            self._divides_by_all = _divides_by_all(model, batch, smoothed=self._label_smoothing != 0)
        if self._divides_by_all:
            return 1.0
        _, predictions = self.loss(model, batch)
        return 1 / max(1, int(predictions))


def _only(columns: frozenset[str] | None, example: Any) -> Any:
    if columns is None or not isinstance(example, dict):
        return example
    return {name: value for name, value in example.items() if name in columns}


def _divides_by_all(model: nn.Module, batch: Any, *, smoothed: bool) -> bool:
    inner = unwrapped(model)
    takes = inspect.signature(inner.forward).parameters.values()
    if not getattr(inner, "accepts_loss_kwargs", any(entry.kind is entry.VAR_KEYWORD for entry in takes)):
        return False
    if smoothed:  # then the Trainer computes the loss itself; since transformers 5 over the whole accumulation
        return "num_items_in_batch" in inspect.signature(LabelSmoother.__call__).parameters
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            by_one, by_two = (float(model(**batch, num_items_in_batch=torch.tensor(number)).loss) for number in (1, 2))
    finally:
        model.train(training)
    return not math.isclose(by_one, by_two, rel_tol=1e-3)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    # The three that collators draw from.
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(pytorch)
