"""The runs that replay is measured on, each recorded on the spot, and the workloads that rebuild them."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import recorder
from benchmarks.trainings import CausalLanguageModel, tokens_of
from recorder.parameters import UnmappedParameterWarning


@functools.cache
def _text(vocabulary: int) -> torch.Tensor:
    with tempfile.TemporaryDirectory() as folder:
        return tokens_of(None, vocabulary, Path(folder))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelling:
    """Next-token prediction on the demo's corpus, cut into sequences of one length.

    Parameters
    ----------
    vocabulary, layers, width, length
        As for `benchmarks.trainings.CausalLanguageModel`.
    """

    vocabulary: int = 8000
    layers: int = 12
    width: int = 512
    length: int = 125

    def model(self) -> nn.Module:
        """Build the model.

        Returns
        -------
        torch.nn.Module
            At its initial parameters.
        """
        return CausalLanguageModel(self.vocabulary, layers=self.layers, width=self.width, length=self.length)

    def indices(self, split: str) -> Sequence[int]:
        """List the sequences; both splits are the same.

        Returns
        -------
        range
            Their numbers.
        """
        del split
        return range(len(_text(self.vocabulary)) // (self.length + 1))

    def batch(self, indices: Sequence[int], *, split: str, epoch: int) -> Any:
        """Collate sequences.

        Returns
        -------
        torch.Tensor
            int64 of shape (sequences, length + 1).
        """
        del split, epoch
        first = torch.tensor(list(indices))[:, None] * (self.length + 1)
        return _text(self.vocabulary)[first + torch.arange(self.length + 1)]

    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, int]:
        """Sum the cross-entropy over all tokens but the first of each sequence.

        Returns
        -------
        tuple
            The sum in nats, and the number of predictions.
        """
        scores, target = model(batch[:, :-1]), batch[:, 1:].flatten()
        return functional.cross_entropy(scores.flatten(0, 1), target, reduction="sum"), len(target)


class Digits:
    """Classification of 8x8 digits by a fully connected net of three layers, the work of Lan et al.'s program."""

    def model(self) -> nn.Module:
        """Build the model.

        Returns
        -------
        torch.nn.Module
            At its initial parameters.
        """
        return nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10))

    def indices(self, split: str) -> Sequence[int]:
        """List the examples; both splits are the same.

        Returns
        -------
        range
            Their numbers.
        """
        del split
        return range(len(_digits()[1]))

    def batch(self, indices: Sequence[int], *, split: str, epoch: int) -> Any:
        """Collate examples.

        Returns
        -------
        dict
            ``images`` of shape (examples, 64), ``labels`` of shape (examples,).
        """
        del split, epoch
        images, labels = _digits()
        chosen = list(indices)
        return {"images": images[chosen], "labels": labels[chosen]}

    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, int]:
        """Sum the cross-entropy over all examples.

        Returns
        -------
        tuple
            The sum in nats, and the number of predictions.
        """
        return functional.cross_entropy(model(batch["images"]), batch["labels"], reduction="sum"), len(batch["labels"])


@functools.cache
def _digits() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)


def large() -> LanguageModelling:
    """Make the workload of 12 layers of width 512, 42 million parameters.

    Returns
    -------
    LanguageModelling
        Named by the run.
    """
    return LanguageModelling()


def small() -> LanguageModelling:
    """Make the workload of 2 layers of width 64, too small to fill a processor.

    Returns
    -------
    LanguageModelling
        Named by the run.
    """
    return LanguageModelling(vocabulary=1000, layers=2, width=64, length=31)


def digits() -> Digits:
    """Make the workload of the original program.

    Returns
    -------
    Digits
        Named by the run.
    """
    return Digits()


def record(run: Path, factory: Any, *, steps: int, examples: int, lr: float, adam: bool, device: str) -> None:
    """Train and record.

    Parameters
    ----------
    run
        The folder to make.
    factory
        One of the functions above: what replay rebuilds the training from.
    steps, examples
        Updates, and examples of each.
    lr, adam
        Learning rate; Adam, with a warm-up of 100 updates, or plain gradient descent.
    device
        Where to train.
    """
    torch.manual_seed(1)
    task = factory()
    model = task.model().to(device)
    optimizer: torch.optim.Optimizer = (torch.optim.Adam if adam else torch.optim.SGD)(model.parameters(), lr=lr)
    # Adam's first steps are as large as its last; without a warm-up no rule balances them.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: min((update + 1) / 100, 1) if adam else 1)
    draw = torch.Generator().manual_seed(1)
    available = task.indices("train")
    # The parameters need no place in a network's anatomy here.
    with warnings.catch_warnings(action="ignore", category=UnmappedParameterWarning):
        watch = recorder.watch(model, optimizer, run=run, workload=f"{__name__}:{factory.__name__}", strict=True)
        with watch as recording:
            for _ in range(steps):
                chosen = torch.randperm(len(available), generator=draw)[:examples]
                batch = task.batch(chosen.tolist(), split="train", epoch=1)
                recording.batch(chosen, batch)
                loss, count = task.loss(model, _on(batch, device))
                recording.loss(loss, count)
                (loss / count).backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()


def _on(batch: Any, device: str) -> Any:
    if isinstance(batch, dict):
        return {name: tensor.to(device) for name, tensor in batch.items()}
    return batch.to(device)
