"""A training loop in the manner of nanoGPT, with the recorder on: it fetches its next batch before the update.

    python examples/nanogpt_loop.py runs/nanogpt
    python -m replay --run runs/nanogpt --workload examples.nanogpt_loop:workload --loss-data batch --loss-data probe:64
    python -m reduce --run runs/nanogpt
    python -m viz --run runs/nanogpt

The batches are random crops of a stream of tokens. Gradients are accumulated and clipped, and the loop sets the
learning rate by itself. A small GPT learns to spell out sums, letter by letter: "twelve plus nine is twenty one."
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import recorder

LAYERS = 2
HEADS = 4
WIDTH = 32
CONTEXT = 32
DROPOUT = 0.1

UPDATES = 24
MICRO_BATCHES = 2
CROPS = 8
EVALUATE_EVERY = 8

_SMALL = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_TEENS = [f"{word}teen" for word in ("thir", "four", "fif", "six", "seven", "eigh", "nine")]
_TENS = [f"{word}ty" for word in ("twen", "thir", "for", "fif", "six", "seven", "eigh", "nine")]


def spelled(number: int) -> str:
    """Spell out a number below a hundred.

    Parameters
    ----------
    number
        The number.

    Returns
    -------
    str
        Its words.
    """
    if number < 20:
        return (_SMALL + _TEENS)[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens - 2] + (f" {_SMALL[ones]}" if ones else "")


@cache
def tokens() -> dict[str, torch.Tensor]:
    """Make the two streams of tokens, the same at every call.

    Returns
    -------
    dict of str to torch.Tensor
        ``train`` and ``valid``: letters as numbers, int64.
    """
    pairs = torch.randint(50, (1500, 2), generator=torch.Generator().manual_seed(0)).tolist()
    text = " ".join(f"{spelled(a)} plus {spelled(b)} is {spelled(a + b)}." for a, b in pairs)
    letters = {letter: number for number, letter in enumerate(sorted(set(text)))}
    stream = torch.tensor([letters[letter] for letter in text])
    border = len(stream) * 9 // 10
    return {"train": stream[:border], "valid": stream[border:]}


class CausalSelfAttention(nn.Module):
    """Query, key and value from one matrix, stacked in this order; every position attends to those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.n_head = HEADS
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
        self.c_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Attend.

        Parameters
        ----------
        hidden
            Of shape (crops, positions, width).

        Returns
        -------
        torch.Tensor
            Of the same shape.
        """
        parts = self.c_attn(hidden).chunk(3, dim=2)
        query, key, value = (part.unflatten(2, (self.n_head, -1)).transpose(1, 2) for part in parts)
        dropout = DROPOUT if self.training else 0.0
        attended = functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        mixed: torch.Tensor = self.c_proj(attended.transpose(1, 2).flatten(2))
        return mixed


class Block(nn.Module):
    """Attention, then a feed-forward network; each normalised before and added to what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(WIDTH)
        self.attn = CausalSelfAttention()
        self.ln_2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(WIDTH, 4 * WIDTH), "c_proj": nn.Linear(4 * WIDTH, WIDTH)})
        self.drop = nn.Dropout(DROPOUT)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute the layer.

        Parameters
        ----------
        hidden
            Of shape (crops, positions, width).

        Returns
        -------
        torch.Tensor
            Of the same shape.
        """
        hidden = hidden + self.drop(self.attn(self.ln_1(hidden)))
        inner = functional.gelu(self.mlp["c_fc"](self.ln_2(hidden)))
        hidden = hidden + self.drop(self.mlp["c_proj"](inner))
        return hidden


class GPT(nn.Module):
    """A GPT with the names of nanoGPT, its output projection tied to the embedding of tokens."""

    def __init__(self) -> None:
        super().__init__()
        letters = int(tokens()["train"].max()) + 1
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(letters, WIDTH),
                "wpe": nn.Embedding(CONTEXT, WIDTH),
                "drop": nn.Dropout(DROPOUT),
                "h": nn.Sequential(*(Block() for _ in range(LAYERS))),
                "ln_f": nn.LayerNorm(WIDTH),
            }
        )
        self.lm_head = nn.Linear(WIDTH, letters, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                deeper = math.sqrt(2 * LAYERS) if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(parameter, std=0.02 / deeper)

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        """Score the letter after each position.

        Parameters
        ----------
        crops
            Tokens, of shape (crops, positions).

        Returns
        -------
        torch.Tensor
            Scores of shape (crops, positions, letters).
        """
        parts = self.transformer
        hidden = parts["drop"](parts["wte"](crops) + parts["wpe"](torch.arange(crops.shape[1], device=crops.device)))
        scores: torch.Tensor = self.lm_head(parts["ln_f"](parts["h"](hidden)))
        return scores


class Crops:
    """The workload: what replay cannot know by itself. The index of a crop is the place in the stream it starts at."""

    def model(self) -> nn.Module:
        """Build the network afresh.

        Returns
        -------
        torch.nn.Module
            The network.
        """
        return GPT()

    def indices(self, split: str) -> Sequence[int]:
        """List where crops of a split may start.

        Parameters
        ----------
        split
            ``train`` or ``valid``.

        Returns
        -------
        sequence of int
            Every place with a whole crop and one more token behind it.
        """
        return range(len(tokens()[split]) - CONTEXT)

    def batch(self, indices: Sequence[int], *, split: str, epoch: int) -> Any:
        """Cut crops out of the stream.

        Parameters
        ----------
        indices
            Where they start.
        split
            ``train`` or ``valid``.
        epoch
            Makes no difference here.

        Returns
        -------
        dict
            ``x`` and ``y``, each of shape (crops, positions); y is one token further.
        """
        stream = tokens()[split]
        return {
            "x": torch.stack([stream[start : start + CONTEXT] for start in indices]),
            "y": torch.stack([stream[start + 1 : start + 1 + CONTEXT] for start in indices]),
        }

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
            Cross-entropy summed over all positions, in nats.
        predictions : int
            Number of positions. It is the same for all micro-batches; so the mean over all of them, which replay takes,
            is what the loop gets by dividing each micro-batch's mean by their number.
        """
        scores = model(batch["x"])
        return functional.cross_entropy(scores.flatten(0, 1), batch["y"].flatten(), reduction="sum"), batch["y"].numel()


def workload() -> Crops:
    """Return the workload: what ``--workload examples.nanogpt_loop:workload`` names.

    Returns
    -------
    Crops
        The workload.
    """
    return Crops()


def get_batch(split: str) -> tuple[torch.Tensor, Any]:
    """Draw crops from torch's global generator.

    Parameters
    ----------
    split
        ``train`` or ``valid``.

    Returns
    -------
    starts : torch.Tensor
        Where they start: nanoGPT's own function draws these numbers too, and need only return them.
    batch : dict
        The crops.
    """
    starts = torch.randint(len(tokens()[split]) - CONTEXT, (CROPS,))
    return starts, workload().batch(starts.tolist(), split=split, epoch=1)


def learning_rate(update: int, updates: int) -> float:
    """Warm up, then fall along a cosine.

    Parameters
    ----------
    update, updates
        Which of how many.

    Returns
    -------
    float
        The learning rate.
    """
    warm_up, largest, smallest = 4, 3e-3, 3e-4
    if update < warm_up:
        return largest * (update + 1) / warm_up
    fallen = (update - warm_up) / max(updates - warm_up, 1)
    return smallest + 0.5 * (1 + math.cos(math.pi * fallen)) * (largest - smallest)


@torch.no_grad()
def evaluate(model: nn.Module) -> dict[str, float]:
    """Estimate the loss on other crops, in evaluation mode.

    Parameters
    ----------
    model
        The network.

    Returns
    -------
    dict of str to float
        Mean loss in nats for each split.
    """
    model.eval()
    found = {}
    for split in ("train", "valid"):
        loss_sum, predictions = workload().loss(model, get_batch(split)[1])
        found[split] = float(loss_sum) / predictions
    model.train()
    return found


def train(run: str, *, updates: int = UPDATES, fused: bool = False) -> nn.Module:
    """Train for a few updates and record each of them.

    Parameters
    ----------
    run
        The folder of the run to make.
    updates
        How many.
    fused
        Whether AdamW is to be the fused one.

    Returns
    -------
    torch.nn.Module
        The trained network.
    """
    torch.manual_seed(0)
    model = GPT()
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=fused)
    name = "examples.nanogpt_loop:workload"
    with recorder.watch(model, optimizer, run=run, workload=name, updates=updates) as rec:
        starts, batch = get_batch("train")  # the very first
        for update in range(updates):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(update, updates)
            if update % EVALUATE_EVERY == 0:
                print(f"update {update}:", *(f"{split} {loss:.3f}" for split, loss in evaluate(model).items()))
            for _ in range(MICRO_BATCHES):
                # Right before the forward pass, the batch that goes into it. That the next one is fetched before the
                # step makes no difference then.
                rec.batch(starts, batch)
                scores = model(batch["x"])
                loss = functional.cross_entropy(scores.flatten(0, 1), batch["y"].flatten())
                rec.loss(loss.detach() * batch["y"].numel(), batch["y"].numel())  # summed, and before it is divided
                starts, batch = get_batch("train")  # the next, while a GPU would still be busy with this one
                (loss / MICRO_BATCHES).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a small GPT with the recorder on.")
    parser.add_argument("run", help="the folder to record into")
    parser.add_argument("--fused", action="store_true", help="take the fused AdamW")
    arguments = parser.parse_args()
    train(arguments.run, fused=arguments.fused)
