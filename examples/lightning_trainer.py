"""A training with Lightning's Trainer and the recorder's callback.

    python examples/lightning_trainer.py runs/lightning
    python -m replay --run runs/lightning --workload examples.lightning_trainer:workload
    python -m reduce --run runs/lightning
    python -m viz --run runs/lightning

``--checkpoint FILE`` takes a training up again, in the same run. It needs ``pip install 'lossledger[lightning]'``.

A Transformer encoder learns to sort: to say for each place which number stands there once they are sorted.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import lightning
import torch
from torch import nn
from torch.nn import functional

from recorder.integrations.lightning_callback import RecorderCallback

EXAMPLES = 1024
LENGTH = 6
NUMBERS = 10
WIDTH = 32
UPDATES = 24


class Examples(torch.utils.data.Dataset[dict[str, Any]]):
    """Example i is drawn from the seed i. Each carries its index, under ``id``."""

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        numbers = torch.randint(NUMBERS, (LENGTH,), generator=torch.Generator().manual_seed(index))
        return {"id": index, "numbers": numbers, "sorted": numbers.sort().values}


class Sorter(lightning.LightningModule):
    """Embeds numbers with their places, attends, and scores the numbers of the sorted sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUMBERS, WIDTH)
        self.position = nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, nhead=4, dim_feedforward=64, dropout=0.1, activation="gelu", batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.output = nn.Linear(WIDTH, NUMBERS)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """Score.

        Parameters
        ----------
        numbers
            Of shape (examples, length).

        Returns
        -------
        torch.Tensor
            Scores of shape (examples, length, numbers).
        """
        scores: torch.Tensor = self.output(self.encoder(self.embedding(numbers) + self.position.weight))
        return scores

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Measure the loss of a batch.

        Parameters
        ----------
        batch
            Collated examples.
        batch_idx
            Its number.

        Returns
        -------
        torch.Tensor
            Cross-entropy in nats: its mean over all places.
        """
        return functional.cross_entropy(self(batch["numbers"]).flatten(0, 1), batch["sorted"].flatten())

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        """Log the loss of a batch.

        Parameters
        ----------
        batch
            Collated examples.
        batch_idx
            Its number.
        """
        self.log("valid", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer.

        Returns
        -------
        torch.optim.Optimizer
            One, as a run needs it.
        """
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Sorting:
    """The workload: what replay cannot know by itself."""

    def model(self) -> nn.Module:
        """Build the module afresh.

        Returns
        -------
        lightning.LightningModule
            The module that the Trainer trained.
        """
        return Sorter()

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
            ``id``, of shape (examples,), ``numbers`` and ``sorted``, of shape (examples, length).
        """
        examples = Examples()
        return torch.utils.data.default_collate([examples[index] for index in indices])

    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, int]:
        """Measure the loss.

        Parameters
        ----------
        model
            The module.
        batch
            What `batch` returned.

        Returns
        -------
        loss_sum : torch.Tensor
            Cross-entropy summed over all places, in nats.
        predictions : int
            Number of places. With accumulate_grad_batches=N, Lightning divides the mean of each batch by N; that is the
            mean over all places, which replay takes, since all batches have as many.
        """
        places = batch["sorted"].flatten()
        return functional.cross_entropy(model(batch["numbers"]).flatten(0, 1), places, reduction="sum"), len(places)


def workload() -> Sorting:
    """Return the workload: what ``--workload examples.lightning_trainer:workload`` names.

    Returns
    -------
    Sorting
        The workload.
    """
    return Sorting()


def train(run: str, *, checkpoint: str | None = None, **trainer: Any) -> Sorter:
    """Train for a few updates and record each of them.

    Parameters
    ----------
    run
        The folder of the run to make, or to go on with.
    checkpoint
        What to go on from; None begins anew.
    **trainer
        Further arguments of Lightning's Trainer.

    Returns
    -------
    Sorter
        The trained module.
    """
    lightning.seed_everything(0, verbose=False)
    module, data, task = Sorter(), Examples(), workload()
    train_data, valid_data = (torch.utils.data.Subset(data, task.indices(split)) for split in ("train", "valid"))
    recorder = RecorderCallback(
        run,
        workload="examples.lightning_trainer:workload",
        indices="id",
        predictions=lambda batch: batch["sorted"].numel(),
    )
    settings: dict[str, Any] = {"max_steps": UPDATES, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
    settings |= {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    lightning.Trainer(callbacks=[recorder], **settings | trainer).fit(
        module,
        torch.utils.data.DataLoader(train_data, batch_size=32, shuffle=True, drop_last=True),
        torch.utils.data.DataLoader(valid_data, batch_size=32),
        ckpt_path=checkpoint,
    )
    return module


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a small Transformer with Lightning and the recorder on.")
    parser.add_argument("run", help="the folder to record into")
    parser.add_argument("--checkpoint", help="a checkpoint to go on from")
    arguments = parser.parse_args()
    train(arguments.run, checkpoint=arguments.checkpoint, default_root_dir=arguments.run + ".checkpoints")
