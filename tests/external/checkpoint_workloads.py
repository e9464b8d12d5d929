"""Workloads for checkpoints that trainers have written: named by ``--workload``."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

FAIRSEQ_ARGUMENTS = "LOSSLEDGER_TEST_FAIRSEQ_ARGUMENTS"
VOCABULARY, LENGTH = 11, 6


def fairseq() -> Any:
    """The training of the arguments in the environment, rebuilt by fairseq."""
    from recorder.integrations.fairseq_workload import fairseq_workload

    return fairseq_workload(json.loads(os.environ[FAIRSEQ_ARGUMENTS]))


class _Text:
    def indices(self, split: str) -> Sequence[int]:
        return range(24) if split == "train" else range(24, 32)

    def batch(self, indices: Sequence[int], *, split: str, epoch: int) -> Any:
        start = torch.tensor(list(indices))[:, None]
        return (start + start // 3 * torch.arange(LENGTH)) % VOCABULARY


class GPT2(_Text):
    def model(self) -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": LENGTH, "vocab_size": VOCABULARY}
        model: nn.Module = GPT2LMHeadModel(GPT2Config(**sizes))
        return model

    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, int]:
        scores, following = model(batch).logits[:, :-1], batch[:, 1:]
        return functional.cross_entropy(scores.flatten(0, 1), following.flatten(), reduction="sum"), following.numel()


def gpt2() -> GPT2:
    return GPT2()


class Plain(_Text):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY))

    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, int]:
        scores, following = model(batch[:, :-1]), batch[:, 1:]
        return functional.cross_entropy(scores.flatten(0, 1), following.flatten(), reduction="sum"), following.numel()


def plain() -> Plain:
    return Plain()
