"""A model of one's own, that lossledger does not know, with a map that says which parameter is which.

    python examples/own_model.py runs/own
    python -m recorder map runs/own
    python -m replay --run runs/own --workload examples.own_model:workload
    python -m reduce --run runs/own
    python -m viz --run runs/own

The map is examples/own_model.toml. A run that was recorded without it is put right afterwards:

    python examples/own_model.py runs/unsaid --without-map
    python -m recorder map runs/unsaid
    python -m recorder map runs/unsaid --map examples/own_model.toml

A small causal Transformer learns to continue arithmetic progressions modulo 23.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import recorder

MODULUS, LENGTH, WIDTH, HEADS, LAYERS = 23, 6, 32, 4, 2
UPDATES = 30
MAP = Path(__file__).with_suffix(".toml")


class Mixing(nn.Module):
    """Causal self-attention with one weight for query, key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.merge = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mix what stands at different places.

        Parameters
        ----------
        x
            Of shape (examples, length, width).

        Returns
        -------
        torch.Tensor
            Of the same shape.
        """
        batch, length, _ = x.shape
        query, key, value = self.qkv(x).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: torch.Tensor = self.merge(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        return out


class Block(nn.Module):
    """One layer."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.mixing = nn.LayerNorm(WIDTH), Mixing()
        self.between = nn.LayerNorm(WIDTH)
        self.widen, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer.

        Parameters
        ----------
        x
            Of shape (examples, length, width).

        Returns
        -------
        torch.Tensor
            Of the same shape.
        """
        x = x + self.mixing(self.before(x))
        out: torch.Tensor = x + self.narrow(functional.gelu(self.widen(self.between(x))))
        return out


class Model(nn.Module):
    """A language model whose scores are read off its embeddings: one tensor with two uses."""

    def __init__(self) -> None:
        super().__init__()
        self.symbols = nn.Embedding(MODULUS, WIDTH)
        self.places = nn.Parameter(torch.zeros(LENGTH, WIDTH))
        self.trunk = nn.ModuleList(Block() for _ in range(LAYERS))
        self.scores = nn.Linear(WIDTH, MODULUS, bias=False)
        self.scores.weight = self.symbols.weight

    def forward(self, symbols: torch.Tensor) -> torch.Tensor:
        """Score the symbol after each.

        Parameters
        ----------
        symbols
            Of shape (examples, length), int64.

        Returns
        -------
        torch.Tensor
            Scores of shape (examples, length, 23).
        """
        x = self.symbols(symbols) + self.places[: symbols.shape[1]]
        for block in self.trunk:
            x = block(x)
        scores: torch.Tensor = self.scores(x)
        return scores


class Progressions:
    """The workload: what replay cannot know by itself."""

    def model(self) -> nn.Module:
        """Build the network afresh.

        Returns
        -------
        torch.nn.Module
            Symbols in, scores of the next ones out.
        """
        return Model()

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
        border = MODULUS**2 * 9 // 10
        return range(border) if split == "train" else range(border, MODULUS**2)

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
            ``symbols`` of shape (examples, 7).
        """
        index = torch.tensor(list(indices))[:, None]
        return {"symbols": (index + index // MODULUS * torch.arange(LENGTH + 1)) % MODULUS}

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
            Cross-entropy summed over the predictions, in nats.
        predictions : int
            Their number.
        """
        symbols = batch["symbols"]
        scores = model(symbols[:, :-1])
        following = symbols[:, 1:]
        return functional.cross_entropy(scores.flatten(0, 1), following.flatten(), reduction="sum"), following.numel()


def workload() -> Progressions:
    """Return the workload: what ``--workload examples.own_model:workload`` names.

    Returns
    -------
    Progressions
        The workload.
    """
    return Progressions()


def train(run: str, *, with_map: bool = True) -> None:
    """Train for a few updates and record each of them.

    Parameters
    ----------
    run
        The folder of the run to make.
    with_map
        Say at once which parameter is which.
    """
    torch.manual_seed(0)
    task = workload()
    model = task.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    loader = torch.utils.data.DataLoader(task.indices("train"), batch_size=32, shuffle=True)
    workload_name, own_map = "examples.own_model:workload", MAP if with_map else None
    with recorder.watch(model, optimizer, run=run, workload=workload_name, map=own_map) as rec:
        for epoch in range(1 + UPDATES // len(loader)):
            for step, indices in enumerate(loader):
                if epoch * len(loader) + step == UPDATES:
                    break
                batch = task.batch(indices.tolist(), split="train", epoch=epoch + 1)
                rec.batch(indices, batch)
                loss_sum, predictions = task.loss(model, batch)
                (loss_sum / predictions).backward()
                optimizer.step()
                optimizer.zero_grad()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a small network with the recorder on.")
    parser.add_argument("run", help="the folder to record into")
    parser.add_argument("--without-map", action="store_true", help="leave it to python -m recorder map")
    options = parser.parse_args()
    train(options.run, with_map=not options.without_map)
