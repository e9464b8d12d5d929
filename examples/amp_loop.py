"""A loop with torch.amp: autocast, a gradient scaler where it computes in float16, gradient accumulation, clipping.

    python examples/amp_loop.py runs/amp
    python -m replay --run runs/amp --workload examples.amp_loop:workload
    python -m reduce --run runs/amp
    python -m viz --run runs/amp

``--dtype float16`` trains in float16 with a gradient scaler, ``--device cuda`` on a GPU.

A Transformer encoder learns to tell which of two numbers comes up more often in a sequence of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import recorder

EXAMPLES = 2048
LENGTH = 15
WIDTH = 32
UPDATES = 24
MICRO_BATCHES = 2


class Majority(nn.Module):
    """Embeds zeros and ones with their positions, attends, and scores the two answers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2, WIDTH)
        self.position = nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, nhead=4, dim_feedforward=64, dropout=0.1, activation="gelu", batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.output = nn.Linear(WIDTH, 2)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """Score the answers.

        Parameters
        ----------
        numbers
            Zeros and ones of shape (examples, length).

        Returns
        -------
        torch.Tensor
            Scores of shape (examples, 2).
        """
        hidden = self.embedding(numbers) + self.position.weight
        scores: torch.Tensor = self.output(self.encoder(hidden).mean(dim=1))
        return scores


class MajorityTask:
    """The workload: what replay cannot know by itself. It names no autocast: replay knows it from the record."""

    def model(self) -> nn.Module:
        """Build the network afresh.

        Returns
        -------
        torch.nn.Module
            The network, in float32.
        """
        return Majority()

    def indices(self, split: str) -> Sequence[int]:
        """List the examples of a split.

        Parameters
        ----------
        split
            ``train`` or ``valid``.

        Returns
        -------
        sequence of int
            Nine tenths of them are for training.
        """
        border = EXAMPLES * 9 // 10
        return range(border) if split == "train" else range(border, EXAMPLES)

    def batch(self, indices: Sequence[int], *, split: str, epoch: int) -> Any:
        """Collate examples: example i is drawn from the seed i.

        Parameters
        ----------
        indices
            Which.
        split, epoch
            Make no difference here.

        Returns
        -------
        dict
            ``numbers`` of shape (examples, length) and ``answer`` of shape (examples,).
        """
        numbers = torch.stack(
            [torch.randint(2, (LENGTH,), generator=torch.Generator().manual_seed(i)) for i in indices]
        )
        return {"numbers": numbers, "answer": (numbers.sum(dim=1) > LENGTH // 2).long()}

    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, int]:
        """Measure the loss.

        Parameters
        ----------
        model
            The network.
        batch
            What `batch` returned.

        Returns
        -------
        loss_sum : torch.Tensor
            Cross-entropy summed over the examples, in nats.
        predictions : int
            Number of examples.
        """
        return functional.cross_entropy(model(batch["numbers"]), batch["answer"], reduction="sum"), len(batch["answer"])


def workload() -> MajorityTask:
    """Return the workload: what ``--workload examples.amp_loop:workload`` names.

    Returns
    -------
    MajorityTask
        The workload.
    """
    return MajorityTask()


def train(run: str, *, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", updates: int = UPDATES) -> nn.Module:
    """Train for a few updates and record each of them.

    Parameters
    ----------
    run
        The folder of the run to make.
    dtype
        What autocast computes in.
    device
        ``cpu`` or ``cuda``.
    updates
        How many.

    Returns
    -------
    torch.nn.Module
        The trained network.
    """
    torch.manual_seed(0)
    task = workload()
    model = task.model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    loader = torch.utils.data.DataLoader(task.indices("train"), batch_size=32, shuffle=True)
    workload_name = "examples.amp_loop:workload"
    with recorder.watch(model, optimizer, run=run, workload=workload_name, updates=updates) as rec:
        for position, indices in zip(range(updates * MICRO_BATCHES), loader, strict=False):
            batch = task.batch(indices.tolist(), split="train", epoch=1)
            batch = {name: entry.to(device) for name, entry in batch.items()}
            rec.batch(indices, batch)  # inside or outside of autocast: the recorder sees in what the model computes
            with torch.autocast(device, dtype):
                loss_sum, examples = task.loss(model, batch)
            rec.loss(loss_sum.detach(), examples)
            scaler.scale(loss_sum / examples / MICRO_BATCHES).backward()
            if position % MICRO_BATCHES == MICRO_BATCHES - 1:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scaler.step(optimizer)  # may skip the update: then no step is recorded
                scaler.update()
                optimizer.zero_grad()
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a small Transformer under torch.amp with the recorder on.")
    parser.add_argument("run", help="the folder to record into")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16"], default="bfloat16", help="what autocast computes in"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    train(arguments.run, dtype=getattr(torch, arguments.dtype), device=arguments.device)
