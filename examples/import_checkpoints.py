"""A training that nobody recorded left checkpoints behind: import them, and ask which parts learned between them.

    python examples/import_checkpoints.py checkpoints
    python -m recorder import checkpoints --run runs/imported --workload examples.import_checkpoints:workload
    python -m replay --run runs/imported --workload recorded --loss-data probe:256
    python -m reduce --run runs/imported
    python -m viz --run runs/imported

The network, a small Transformer, learns to continue arithmetic progressions modulo 23.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

MODULUS = 23
LENGTH = 8
WIDTH, HEADS, LAYERS = 32, 4, 2
UPDATES, EVERY = 60, 20


class Attention(nn.Module):
    """Causal self-attention with a projection each for queries, keys, values and what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mix each place with those before it.

        Parameters
        ----------
        x
            Of shape (examples, places, width).

        Returns
        -------
        torch.Tensor
            Of the same shape.
        """
        examples, places, _ = x.shape
        query, key, value = (
            projection(x).view(examples, places, HEADS, -1).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out_proj(mixed.transpose(1, 2).reshape(examples, places, WIDTH))


class Layer(nn.Module):
    """Attention, then a feed-forward net, each normed before it and added to what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.self_attn = Attention()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer.

        Parameters
        ----------
        x
            Of shape (examples, places, width).

        Returns
        -------
        torch.Tensor
            Of the same shape.
        """
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        return x + self.fc2(functional.gelu(self.fc1(self.final_layer_norm(x))))


class Decoder(nn.Module):
    """Embeddings of numbers and places, layers, and scores of the next number."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.embed_positions = nn.Embedding(MODULUS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.layer_norm = nn.LayerNorm(WIDTH)
        self.output_projection = nn.Linear(WIDTH, MODULUS, bias=False)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """Score the next number at every place.

        Parameters
        ----------
        numbers
            int64 of shape (examples, places).

        Returns
        -------
        torch.Tensor
            Of shape (examples, places, 23).
        """
        x = self.embed_tokens(numbers) + self.embed_positions(torch.arange(numbers.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.output_projection(self.layer_norm(x))


class Network(nn.Module):
    """The decoder under the name that naming rules know."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = Decoder()

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """Score the next number at every place.

        Parameters
        ----------
        numbers
            int64 of shape (examples, places).

        Returns
        -------
        torch.Tensor
            Of shape (examples, places, 23).
        """
        return self.decoder(numbers)


class Progressions:
    """The workload: what the checkpoints do not hold, model, data and loss."""

    def model(self) -> nn.Module:
        """Build the network afresh.

        Returns
        -------
        torch.nn.Module
            The one that was trained, at any parameters.
        """
        return Network()

    def indices(self, split: str) -> Sequence[int]:
        """List the examples of a split: one for every start and every difference.

        Parameters
        ----------
        split
            ``train`` or ``valid``.

        Returns
        -------
        sequence of int
            Every ninth is for validation.
        """
        return [index for index in range(MODULUS**2) if (index % 9 == 0) == (split == "valid")]

    def batch(self, indices: Sequence[int], *, split: str, epoch: int) -> Any:
        """Collate examples.

        Parameters
        ----------
        indices
            Which: example i starts at i and goes on by i // 23.
        split, epoch
            Make no difference here.

        Returns
        -------
        torch.Tensor
            int64 of shape (examples, places + 1).
        """
        index = torch.tensor(list(indices))[:, None]
        return (index + index // MODULUS * torch.arange(LENGTH + 1)) % MODULUS

    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, int]:
        """Measure the loss from the third number on: the first two say how it goes on.

        Parameters
        ----------
        model
            The network.
        batch
            What `batch` returned.

        Returns
        -------
        loss_sum : torch.Tensor
            Cross-entropy summed over all predictions, in nats.
        predictions : int
            Their number.
        """
        scores, following = model(batch[:, :-1])[:, 1:], batch[:, 2:]
        return functional.cross_entropy(scores.flatten(0, 1), following.flatten(), reduction="sum"), following.numel()


def workload() -> Progressions:
    """Return the workload: what ``--workload examples.import_checkpoints:workload`` names.

    Returns
    -------
    Progressions
        The workload.
    """
    return Progressions()


def train(updates: int, after: Callable[[int, nn.Module], None]) -> None:
    """Train with Adam.

    Parameters
    ----------
    updates
        How many.
    after
        Called with the number of updates done and the network, before the first update and after each.
    """
    torch.manual_seed(0)
    task = workload()
    model = task.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    loader = torch.utils.data.DataLoader(task.indices("train"), batch_size=64, shuffle=True)
    done = 0
    after(done, model)
    while done < updates:
        for indices in loader:
            loss_sum, predictions = task.loss(model, task.batch(indices.tolist(), split="train", epoch=1))
            (loss_sum / predictions).backward()
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            after(done, model)
            if done == updates:
                return


def main(folder: Path) -> None:
    """Train, and save the weights every now and then.

    Parameters
    ----------
    folder
        Where the checkpoints go: ``step0.safetensors``, ``step20.safetensors``, ...
    """
    folder.mkdir(parents=True, exist_ok=True)

    def save(done: int, model: nn.Module) -> None:
        if done % EVERY == 0:
            save_file(model.state_dict(), folder / f"step{done}.safetensors")

    train(UPDATES, save)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a small network and save checkpoints.")
    parser.add_argument("folder", type=Path, help="where the checkpoints go")
    main(parser.parse_args().folder)
