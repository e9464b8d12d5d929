"""The trainings that the recorder is measured on, each the same whenever it is made with the same seed."""

from __future__ import annotations

import gzip
import io
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import torch
from torch import nn
from torch.nn import functional

from demo.corpus import write_corpus
from recorder.errors import UsageError

Announce = Callable[[Any], None]


class Training(Protocol):
    """A training that can be told to make one update at a time.

    Attributes
    ----------
    model, optimizer
        What is trained, and by what.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def step(self, announce: Announce) -> None:
        """Make one update; `announce` is called with its batch just before the forward pass."""
        ...


class CausalLanguageModel(nn.Module):
    """A Transformer that predicts each token from those before it.

    Parameters
    ----------
    vocabulary
        Number of tokens.
    layers, width
        Its size; feed-forward layers are four times as wide, heads 64 wide.
    length
        Tokens in a sequence.
    """

    def __init__(self, vocabulary: int, *, layers: int, width: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        nn.init.normal_(self.tokens.weight, std=width**-0.5)
        nn.init.normal_(self.positions.weight, std=0.02)
        layer = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        for name, weight in self.layers.named_parameters():
            # Copies of one layer begin alike.
            if weight.dim() > 1:
                nn.init.xavier_uniform_(weight)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Score the next token at every place.

        Parameters
        ----------
        tokens
            int64 of shape (sequences, length).

        Returns
        -------
        torch.Tensor
            Shape (sequences, length, vocabulary).
        """
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        hidden = self.tokens(tokens) + self.positions.weight[:length]
        return functional.linear(self.layers(hidden, mask=mask, is_causal=True), self.tokens.weight)


class LanguageModelTraining:
    """A causal language model trained on text: Adam, learning rate 5e-4 after a warm-up of 100 updates.

    Parameters
    ----------
    text
        All tokens in a row, int64 of shape (tokens,).
    vocabulary, layers, width
        As for `CausalLanguageModel`.
    sequences, length
        Sequences of an update and their tokens.
    seed
        Decides the initial parameters and the batches.
    """

    def __init__(
        self,
        text: torch.Tensor,
        *,
        vocabulary: int,
        layers: int,
        width: int = 256,
        sequences: int,
        length: int = 125,
        seed: int = 1,
    ) -> None:
        torch.manual_seed(seed)
        self.model: nn.Module = CausalLanguageModel(vocabulary, layers=layers, width=width, length=length)
        self.optimizer: torch.optim.Optimizer = torch.optim.Adam(self.model.parameters(), lr=5e-4, betas=(0.9, 0.98))
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda update: min((update + 1) / 100, 1))
        self._text = text
        self._draw = torch.Generator().manual_seed(seed)
        self._sequences, self._length = sequences, length

    def step(self, announce: Announce) -> None:
        """Make one update.

        Parameters
        ----------
        announce
            Called with the batch, int64 of shape (sequences, length + 1).
        """
        starts = torch.randint(len(self._text) - self._length, (self._sequences, 1), generator=self._draw)
        batch = self._text[starts + torch.arange(self._length + 1)]
        announce(batch)
        scores = self.model(batch[:, :-1])
        loss = functional.cross_entropy(scores.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self._schedule.step()
        self.optimizer.zero_grad()


def tokens_of(folder: Path | None, vocabulary: int, scratch: Path) -> torch.Tensor:
    """Cut text into pieces.

    Parameters
    ----------
    folder
        Holds ``train.*``, plain or gzipped; None for the demo's corpus, made on the spot.
    vocabulary
        Number of different pieces.
    scratch
        Where the corpus may be written.

    Returns
    -------
    torch.Tensor
        int64 of shape (pieces,).

    Raises
    ------
    UsageError
        If there is no text.
    """
    if folder is None:
        folder = scratch / "text"
        write_corpus(folder, train=20_000)
    lines: list[str] = []
    for path in sorted(folder.glob("train.*")):
        content = path.read_bytes()
        lines += (gzip.decompress(content) if path.suffix == ".gz" else content).decode().splitlines()
    if not lines:
        message = f"{folder}: expected text in files train.*, plain or .gz, found none"
        raise UsageError(message)
    pieces = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=pieces, vocab_size=vocabulary, hard_vocab_limit=False,
        minloglevel=2, num_threads=1,
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_proto=pieces.getvalue())
    encoded = processor.encode(lines, add_eos=True)
    return torch.tensor([piece for line in encoded for piece in line])


class TransformerBase(nn.Module):
    """The Transformer of the paper's size: 6 + 6 layers, width 512, 32,000 tokens, 60 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(32_000, 512)
        self.body = nn.Transformer(512, 8, 6, 6, 2048, dropout=0.0, batch_first=True)
        nn.init.normal_(self.tokens.weight, std=512**-0.5)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Score the next target token at every place.

        Parameters
        ----------
        source, target
            int64 of shape (sentences, length).

        Returns
        -------
        torch.Tensor
            Shape (sentences, length, 32000).
        """
        mask = nn.Transformer.generate_square_subsequent_mask(
            target.shape[1], device=target.device, dtype=self.tokens.weight.dtype
        )
        hidden = self.body(self.tokens(source), self.tokens(target), tgt_mask=mask, tgt_is_causal=True)
        return functional.linear(hidden, self.tokens.weight)


class _Drift(torch.optim.Optimizer):
    # Every parameter moves along its gradient and a second direction, both fixed noise of size 1, in shares that turn
    # from step to step: by the angle whose cosine is Adam's momentum, so that consecutive updates are as alike as
    # Adam's. Each tensor has its own phase, and its own size within a factor of two.
    _ANGLE = math.acos(0.9)

    def __init__(self, parameters: list[nn.Parameter], directions: list[torch.Tensor], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        self._directions = directions
        self._updates = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        del closure
        rate = self.param_groups[0]["lr"]
        for index, (weight, direction) in enumerate(zip(self.param_groups[0]["params"], self._directions, strict=True)):
            angle = self._ANGLE * self._updates + index
            size = rate * (1.0 + 0.5 * math.cos(0.1 * self._updates + 2 * index))
            weight.add_(weight.grad, alpha=size * math.cos(angle)).add_(direction, alpha=size * math.sin(angle))
        self._updates += 1


class PacedTraining:
    """Transformer-base in float32 as a GPU's host sees it: 1.4 s with the host's cores free, then new parameters.

    Parameters
    ----------
    noise
        As many entries as `noise_for` says; shared by all trainings of a process.
    pace
        Seconds that stand for the GPU.
    rate
        Size of an update's entries. With the default a step's difference is coded to 0.51 of its size, as those of case
        (d), a real training, are.
    """

    def __init__(self, noise: torch.Tensor, *, pace: float = 1.4, rate: float = 4e-5) -> None:
        torch.manual_seed(1)
        self.model: nn.Module = TransformerBase()
        weights = list(self.model.parameters())
        directions, used = [], 0
        for weight in weights:
            weight.grad = noise[used : used + weight.numel()].view_as(weight)
            second = noise[used + weight.numel() : used + 2 * weight.numel()]
            directions.append(second.view_as(weight))
            used += 2 * weight.numel()
        self.optimizer: torch.optim.Optimizer = _Drift(weights, directions, rate)
        self._pace = pace
        self._batch = torch.zeros(2, 25_000, dtype=torch.int64)

    @staticmethod
    def noise() -> torch.Tensor:
        """Make the noise that all trainings of a process share.

        Returns
        -------
        torch.Tensor
            float32, two entries for every parameter.
        """
        with torch.device("meta"):
            size = sum(weight.numel() for weight in TransformerBase().parameters())
        return torch.randn(2 * size, generator=torch.Generator().manual_seed(1))

    def step(self, announce: Announce) -> None:
        """Make one update.

        Parameters
        ----------
        announce
            Called with the batch: 25,000 tokens of either language, as in the paper.
        """
        announce(self._batch)
        time.sleep(self._pace)
        self.optimizer.step()


class GpuTraining:
    """Transformer-base in bfloat16 on a GPU: AdamW, 25,000 tokens of either language an update, as in the paper.

    Parameters
    ----------
    sentences, length
        Size of a batch.
    """

    def __init__(self, *, sentences: int = 500, length: int = 50) -> None:
        torch.manual_seed(1)
        self.model: nn.Module = TransformerBase().to("cuda", torch.bfloat16)
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.model.parameters(), lr=7e-4, fused=True)
        self._draw = torch.Generator(device="cuda").manual_seed(1)
        self._shape = (2, sentences, length + 1)

    def step(self, announce: Announce) -> None:
        """Make one update, and wait for it.

        Parameters
        ----------
        announce
            Called with the batch, int64 of shape (2, sentences, length + 1).
        """
        batch = torch.randint(32_000, self._shape, generator=self._draw, device="cuda")
        announce(batch)
        source, target = batch
        scores = self.model(source, target[:, :-1])
        functional.cross_entropy(scores.flatten(0, 1).float(), target[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch.cuda.synchronize()
