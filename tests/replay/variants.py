"""Variants of the training in tests/cases.py: other loops that record it, and other workloads that replay it.

The workloads are named on command lines as ``--workload tests.replay.variants:<function>``.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import recorder
from recorder.steps import Step
from recorder.workload import RepeatedUpdate
from tests.cases import LanguageModelling, TinyTransformer

HERE = "tests.replay.variants"


@contextmanager
def one_thread() -> Iterator[None]:
    """Models this small are ten times slower with two threads on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherText(LanguageModelling):
    def _text(self) -> torch.Tensor:
        return torch.randint(self.vocabulary, (self.examples, self.length), generator=torch.Generator().manual_seed(6))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PermutedRows(LanguageModelling):
    def batch(self, indices: Sequence[int], *, split: str, epoch: int) -> Any:
        return super().batch(list(indices)[::-1], split=split, epoch=epoch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanLoss(LanguageModelling):
    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor | float]:
        loss_sum, predictions = super().loss(model, batch)
        return loss_sum / predictions, predictions


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherCount(LanguageModelling):
    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor | float]:
        loss_sum, predictions = super().loss(model, batch)
        return loss_sum, float(predictions) + 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherHeads(LanguageModelling):
    """The same parameters in the same shapes, read by four heads for two."""

    def model(self) -> nn.Module:
        return TinyTransformer(vocabulary=self.vocabulary, heads=4).to(self.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewerLayers(LanguageModelling):
    def model(self) -> nn.Module:
        return TinyTransformer(vocabulary=self.vocabulary, layers=1).to(self.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoppedGradient(LanguageModelling):
    """The right loss with a wrong gradient: none for the first layer."""

    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor | float]:
        model.get_submodule("decoder.layers.0").requires_grad_(False)
        return super().loss(model, batch)


class _DroppingOut(TinyTransformer):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return functional.dropout(super().forward(tokens), 0.3, self.training)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DroppingOut(LanguageModelling):
    def model(self) -> nn.Module:
        return _DroppingOut(vocabulary=self.vocabulary).to(self.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawingElsewhere(DroppingOut):
    """Draws one random number that the training did not draw."""

    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor | float]:
        torch.rand(())
        return super().loss(model, batch)


class ShortOfMemory(LanguageModelling):
    """Has room for the gradient of four examples, in evaluation mode."""

    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor | float]:
        if torch.is_grad_enabled() and not model.training and len(batch["tokens"]) > 4:
            raise MemoryError
        return super().loss(model, batch)


class Unhurried(LanguageModelling):
    """Takes its time, so that a replay can be caught at its work however busy the machine is."""

    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor | float]:
        time.sleep(0.05)
        return super().loss(model, batch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repeating(LanguageModelling):
    """Knows its loop's own arithmetic, as the fairseq workload does: Adam, mean over the update's predictions."""

    nudge: float = 0.0

    def repeat_updates(
        self, theta: Mapping[str, torch.Tensor], optimizer_state: Mapping[str, Any] | None, steps: Sequence[Step]
    ) -> Iterator[RepeatedUpdate]:
        model = self.model()
        model.load_state_dict(dict(theta), strict=False)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for step in steps:
            optimizer.zero_grad()
            losses = []
            for micro_batch in step.micro_batches:
                loss_sum, predictions = self.loss(model, micro_batch.batch())
                loss_sum.backward()  # type: ignore[no-untyped-call]
                losses.append((float(loss_sum.detach()), float(predictions)))
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.div_(sum(predictions for _, predictions in losses))
            optimizer.step()
            parameters = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
            parameters["decoder.layers.1.fc2.bias"][0] *= 1 + self.nudge
            yield RepeatedUpdate(losses=tuple(losses), parameters=parameters)


class OwnOptimizer(torch.optim.Optimizer):
    """Gradient descent in a class that is not torch's."""

    def __init__(self, parameters: Any, lr: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] * parameter.grad)


def other_text() -> LanguageModelling:
    return OtherText()


def permuted_rows() -> LanguageModelling:
    return PermutedRows()


def mean_loss() -> LanguageModelling:
    return MeanLoss()


def other_count() -> LanguageModelling:
    return OtherCount()


def other_heads() -> LanguageModelling:
    return OtherHeads()


def fewer_layers() -> LanguageModelling:
    return FewerLayers()


def wider_vocabulary() -> LanguageModelling:
    return LanguageModelling(vocabulary=15)


def stopped_gradient() -> LanguageModelling:
    return StoppedGradient()


def dropping_out() -> LanguageModelling:
    return DroppingOut()


def drawing_elsewhere() -> LanguageModelling:
    return DrawingElsewhere()


def short_of_memory() -> LanguageModelling:
    return ShortOfMemory()


def unhurried() -> LanguageModelling:
    return Unhurried()


def repeating() -> LanguageModelling:
    return Repeating()


def repeating_nudged() -> LanguageModelling:
    return Repeating(nudge=2e-7)


def power_of_two() -> LanguageModelling:
    """64 predictions to an update of two micro-batches: multiplying and dividing by them rounds the same."""
    return LanguageModelling(length=5)


def no_workload() -> object:
    return object()


def record(
    run: Path,
    *,
    factory: Callable[[], LanguageModelling] = dropping_out,
    make_optimizer: Callable[[Any], torch.optim.Optimizer] = torch.optim.Adam,
    steps: int = 3,
    before: int = 0,
    learning_rates: Sequence[float] | None = None,
    divide_by: float | None = None,
    clip: float | None = None,
    tell_losses: bool = True,
    **watch_arguments: Any,
) -> None:
    """Train as `tests.cases.train` does, in a loop of other habits; `before` steps go unrecorded."""
    torch.manual_seed(3)
    task = factory()
    model = task.model()
    optimizer = make_optimizer(model.parameters())
    arguments: dict[str, Any] = {"run": run, "workload": f"{HERE}:{factory.__name__}", **watch_arguments}
    watching: recorder.recording.Recording | None = None
    for t in range(before + steps):
        if t == before:
            watching = recorder.watch(model, optimizer, first_step=before, strict=True, **arguments)
        if learning_rates is not None:
            optimizer.param_groups[0]["lr"] = learning_rates[t]
        counts = 0.0
        for position in range(2):
            indices = [(16 * t + 8 * position + example) % 48 for example in range(8)]
            batch = task.batch(indices, split="train", epoch=1)
            if watching is not None:
                watching.batch(indices, batch)
            loss_sum, predictions = task.loss(model, batch)
            if watching is not None and tell_losses:
                watching.loss(loss_sum, predictions)
            loss_sum.backward()  # type: ignore[no-untyped-call]
            counts += float(predictions)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(divide_by or counts)
        if clip is not None:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            assert norm > clip, "the test's clipping does nothing"
        optimizer.step()
        optimizer.zero_grad()
    assert watching is not None
    watching.close()
