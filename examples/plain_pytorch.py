"""A plain PyTorch training with the recorder on, and the workload from which replay rebuilds it.

    python examples/plain_pytorch.py runs/plain
    python -m replay --run runs/plain --workload examples.plain_pytorch:workload
    python -m reduce --run runs/plain
    python -m viz --run runs/plain

The network learns to continue arithmetic progressions modulo 23.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import recorder

MODULUS = 23
EXAMPLES = 4096
UPDATES = 40


class Progressions:
    """The workload: what replay cannot know by itself."""

    def model(self) -> nn.Module:
        """Build the network afresh.

        Returns
        -------
        torch.nn.Module
            Two numbers in, scores of the next one out.
        """
        return nn.Sequential(
            nn.Embedding(MODULUS, 16),
            nn.Flatten(),
            nn.Linear(32, 64),
            nn.GELU(),
            nn.Dropout(0.1),
            nn.Linear(64, MODULUS),
        )

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
        """Collate examples: example i starts at i with a step of i // 23.

        Parameters
        ----------
        indices
            Which.
        split, epoch
            Make no difference here.

        Returns
        -------
        dict
            ``numbers`` of shape (examples, 2) and ``next`` of shape (examples,).
        """
        index = torch.tensor(list(indices))
        start, step = index % MODULUS, index // MODULUS % MODULUS
        numbers = torch.stack([start, (start + step) % MODULUS], dim=1)
        return {"numbers": numbers, "next": (start + 2 * step) % MODULUS}

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
        return functional.cross_entropy(model(batch["numbers"]), batch["next"], reduction="sum"), len(batch["next"])


def workload() -> Progressions:
    """Return the workload: what ``--workload examples.plain_pytorch:workload`` names.

    Returns
    -------
    Progressions
        The workload.
    """
    return Progressions()


def train(run: str) -> None:
    """Train for a few updates and record each of them.

    Parameters
    ----------
    run
        The folder of the run to make.
    """
    torch.manual_seed(0)
    task = workload()
    model = task.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    loader = torch.utils.data.DataLoader(task.indices("train"), batch_size=64, shuffle=True)
    workload_name = "examples.plain_pytorch:workload"
    with recorder.watch(model, optimizer, run=run, workload=workload_name, updates=UPDATES) as rec:
        for _, indices in zip(range(UPDATES), loader, strict=False):
            batch = task.batch(indices.tolist(), split="train", epoch=1)
            rec.batch(indices, batch)
            loss_sum, predictions = task.loss(model, batch)
            (loss_sum / predictions).backward()
            optimizer.step()
            optimizer.zero_grad()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a small network with the recorder on.")
    parser.add_argument("run", help="the folder to record into")
    train(parser.parse_args().run)
