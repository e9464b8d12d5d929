"""Workloads whose model has names that the checkpoints do not have, or buffers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests import cases


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> Any:
        return self.model(tokens)


class WrappedModelling(cases.LanguageModelling):
    def model(self) -> nn.Module:
        return Wrapped(super().model())


def workload() -> WrappedModelling:
    return WrappedModelling()


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)


class NormedModelling(cases.LanguageModelling):
    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return Normed()


def normed() -> NormedModelling:
    return NormedModelling()
