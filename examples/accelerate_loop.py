"""A training loop prepared by accelerate, with the recorder on, and the workload from which replay rebuilds it.

    python examples/accelerate_loop.py runs/accelerate
    python -m replay --run runs/accelerate --workload examples.accelerate_loop:workload
    python -m reduce --run runs/accelerate
    python -m viz --run runs/accelerate

The network learns to continue arithmetic progressions modulo 23. Every example carries its index, for accelerate may
skip batches, share them out or hand some out twice. It needs ``pip install 'lossledger[hf]'``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, default_collate

import recorder

MODULUS = 23
EXAMPLES = 1000
EPOCHS = 2
LARGEST_GRADIENT = 1.0


class Progressions(Dataset[dict[str, Any]]):
    """Two numbers of a progression and the next one, with the index of the example."""

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, step = index % MODULUS, index // MODULUS % MODULUS
        numbers = torch.tensor([start, (start + step) % MODULUS])
        return {"index": index, "numbers": numbers, "next": (start + 2 * step) % MODULUS}


class Task:
    """The workload: what replay cannot know by itself."""

    def __init__(self) -> None:
        self.dataset = Progressions()

    def model(self) -> nn.Module:
        """Build the network afresh.

        Returns
        -------
        torch.nn.Module
            Two numbers in, scores of the next one out.
        """
        return nn.Sequential(
            nn.Embedding(MODULUS, 16), nn.Flatten(), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, MODULUS)
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
        """Collate examples as the loader does.

        Parameters
        ----------
        indices
            Which.
        split, epoch
            Make no difference here.

        Returns
        -------
        dict
            ``index`` and ``next`` of shape (examples,), ``numbers`` of shape (examples, 2).
        """
        return default_collate([self.dataset[index] for index in indices])

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
        scores = model(batch["numbers"]).float()
        return functional.cross_entropy(scores, batch["next"], reduction="sum"), len(batch["next"])


def workload() -> Task:
    """Return the workload: what ``--workload examples.accelerate_loop:workload`` names.

    Returns
    -------
    Task
        The workload.
    """
    return Task()


def train(run: str) -> None:
    """Train for two epochs, with two micro-batches to an update, and record each update.

    Parameters
    ----------
    run
        The folder of the run to make.
    """
    set_seed(0)
    task = workload()
    accelerator = Accelerator(gradient_accumulation_steps=2)
    data = torch.utils.data.Subset(task.dataset, task.indices("train"))
    loader = DataLoader(data, batch_size=32, shuffle=True)
    model = task.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    named = "examples.accelerate_loop:workload"
    with recorder.watch(accelerator.unwrap_model(model), optimizer, run=run, workload=named) as rec:
        for epoch in range(EPOCHS):
            rec.epoch = epoch + 1
            for batch in loader:
                with accelerator.accumulate(model):
                    with accelerator.autocast():  # with mixed precision: the recorder asks torch which one is on
                        rec.batch(batch["index"], batch)
                    loss_sum, predictions = task.loss(model, batch)
                    rec.loss(loss_sum, predictions)
                    accelerator.backward(loss_sum / predictions)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)
                    optimizer.step()
                    optimizer.zero_grad()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a small network with accelerate and the recorder.")
    parser.add_argument("run", help="the folder to record into")
    train(parser.parse_args().run)
