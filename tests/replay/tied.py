"""A small model with tied weights, and with query, key and value in one tensor.

Three names, two uses: an encoder and a decoder share one embedding module, and the output projection shares its weight.
Some models of other habits read the same tensor so that its uses cannot be told apart. The workloads are named on
command lines as ``--workload tests.replay.tied:<function>``.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from recorder.manifest import Manifest
from recorder.parameters import UnmappedParameterWarning
from recorder.runformat import Run
from recorder.table import Parameter, Part
from tests import cases
from tests.cases import LanguageModelling
from tests.replay.variants import one_thread

HERE = "tests.replay.tied"
WIDTH, HEADS, TOKENS, VOCABULARY = 8, 2, 13, 17
"""Of the vocabulary only the first so many tokens are in the text."""

EMBEDDING, OUTPUT = "encoder.embed.weight", "output.weight"
FUSED = {"encoder.qkv.weight": 1, "encoder.qkv.bias": 1, "decoder.qkv.weight": HEADS, "decoder.qkv.bias": HEADS}
"""Tensors of three components, and how often these repeat themselves along the units."""


class _Block(nn.Module):
    """Attention whose query, key and value stand one behind the other, or head by head."""

    def __init__(self, embed: nn.Embedding, *, interleaved: bool) -> None:
        super().__init__()
        self.embed = embed
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.interleaved = interleaved

    def forward(self, tokens: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
        x: torch.Tensor = self.embed(tokens)
        x = x if before is None else x + before
        shape = (*x.shape[:2], HEADS, 3, -1) if self.interleaved else (*x.shape[:2], 3, HEADS, -1)
        query, key, value = self.qkv(x).view(shape).unbind(3 if self.interleaved else 2)
        mixed = functional.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True
        )
        added: torch.Tensor = x + self.out(functional.gelu(mixed.transpose(1, 2).flatten(2)))
        return added


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        embed = nn.Embedding(VOCABULARY, WIDTH)
        self.encoder, self.decoder = _Block(embed, interleaved=False), _Block(embed, interleaved=True)
        self.output = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.output.weight = embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.output(self.decoder(tokens, self.encoder(tokens)))
        return logits


class _TiesAnew(Tied):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.output.weight = self.encoder.embed.weight
        return super().forward(tokens)


class _ReadsTheOther(Tied):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.decoder(tokens, self.encoder(tokens))
        return functional.linear(hidden, self.encoder.embed.weight)


class _InsistsOnTheTie(Tied):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.output.weight is not self.encoder.embed.weight:
            message = "expected tied weights"
            raise ValueError(message)
        return super().forward(tokens)


class _LooksForTheTie(Tied):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = super().forward(tokens)
        return logits if self.output.weight is self.encoder.embed.weight else logits * 2


class _HidesFromTheTied(Tied):
    """Leaves out the gradient of the output where it is tied."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        weight = self.output.weight
        hidden = self.decoder(tokens, self.encoder(tokens))
        return functional.linear(hidden, weight.detach() if weight is self.encoder.embed.weight else weight)


class _OneModule(Tied):
    """The output use has no module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.output = self.encoder.embed  # type: ignore[assignment]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.decoder(tokens, self.encoder(tokens))
        return functional.linear(hidden, self.output.weight)


class _Dropping(Tied):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return functional.dropout(super().forward(tokens), 0.2, self.training)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TiedModelling(LanguageModelling):
    kind: type[Tied] = Tied

    def model(self) -> nn.Module:
        return self.kind().to(self.dtype)


def workload() -> TiedModelling:
    return TiedModelling()


def workload_float64() -> TiedModelling:
    return TiedModelling(dtype=torch.float64)


def ties_anew() -> TiedModelling:
    return TiedModelling(kind=_TiesAnew)


def reads_the_other() -> TiedModelling:
    return TiedModelling(kind=_ReadsTheOther)


def insists_on_the_tie() -> TiedModelling:
    return TiedModelling(kind=_InsistsOnTheTie)


def looks_for_the_tie() -> TiedModelling:
    return TiedModelling(kind=_LooksForTheTie)


def hides_from_the_tied() -> TiedModelling:
    return TiedModelling(kind=_HidesFromTheTied)


def one_module() -> TiedModelling:
    return TiedModelling(kind=_OneModule)


def dropping() -> TiedModelling:
    return TiedModelling(kind=_Dropping)


def with_uses(row: Parameter) -> Parameter:
    """Say of a row of the recorded table which uses it has, and which components."""
    if row.name in FUSED:
        parts = tuple(Part(component=name, units=WIDTH, heads=HEADS) for name in ("query", "key", "value"))
        stack = row.name.partition(".")[0]
        place: dict[str, Any] = {"layer": f"{stack}.0", "stack": stack, "depth": 0}
        return dataclasses.replace(row, component="fused", fused=parts, repeats=FUSED[row.name], **place)
    if row.name != EMBEDDING:
        return row
    whole = dataclasses.replace(row, component="embedding", uses=())
    embedding = dataclasses.replace(whole, aliases=("decoder.embed.weight",))
    output = dataclasses.replace(whole, name=OUTPUT, aliases=(), component="output", tied_to=EMBEDDING)
    return dataclasses.replace(whole, uses=(embedding, output))


def rewrite_table(run: Path, change: Callable[[Parameter], Parameter]) -> None:
    """Put another parameter table into a recorded run."""
    manifest = Manifest.read(run)
    dataclasses.replace(manifest, parameters=tuple(map(change, manifest.parameters))).write(run)


def record(run: Path, factory: Callable[[], TiedModelling] = workload, **arguments: Any) -> Path:
    with one_thread(), warnings.catch_warnings():
        # Its table is put in by hand.
        warnings.simplefilter("ignore", UnmappedParameterWarning)
        cases.train(run, factory=factory, workload=f"{HERE}:{factory.__name__}", **arguments)
    rewrite_table(run, with_uses)
    return run


def untied(theta: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters of a model of which every use of the tied tensor has a copy."""
    return {**theta, "decoder.embed.weight": theta[EMBEDDING], OUTPUT: theta[EMBEDDING].clone()}


def loss_sum(theta: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """The loss of the model without ties, at `untied` parameters."""
    logits = torch.func.functional_call(Tied().double(), theta, (tokens[:, :-1],), tie_weights=False)
    chosen = logits.gather(-1, tokens[:, 1:, None])[..., 0]
    total: torch.Tensor = (logits.logsumexp(-1) - chosen).sum()
    return total


def gradients(theta: dict[str, torch.Tensor], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the summed loss, one for every use: the embedding's is that of the module that both stacks share."""
    leaves = {name: tensor.double().clone().requires_grad_() for name, tensor in untied(theta).items()}
    leaves["decoder.embed.weight"] = leaves[EMBEDDING]
    wanted = [name for name in leaves if name != "decoder.embed.weight"]
    found = torch.autograd.grad(loss_sum(leaves, tokens), [leaves[name] for name in wanted])
    return dict(zip(wanted, found, strict=True))


def brute_force(run: Path, loss_data: str) -> Iterator[dict[str, torch.Tensor]]:
    """Yield for every step the LCA of every entry of every use, by 64-point Gauss-Legendre quadrature."""
    opened = Run(run)
    text = torch.randint(TOKENS, (64, 7), generator=torch.Generator().manual_seed(5))
    probe = text[np.random.default_rng(0).choice(48, size=16, replace=False)]
    nodes, weights = np.polynomial.legendre.leggauss(64)
    for t in opened.steps:
        batch = text[torch.cat([entry.indices for entry in opened.step(t).micro_batches])]
        tokens = batch if loss_data == "batch" else probe
        start, end = opened.parameters(t), opened.parameters(t + 1)
        lca: dict[str, torch.Tensor] = {}
        for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
            theta = {name: (1 - node) * start[name] + node * end[name] for name in start}
            for name, gradient in gradients(theta, tokens).items():
                owner = EMBEDDING if name == OUTPUT else name
                part = weight * gradient / tokens[:, 1:].numel() * (end[owner] - start[owner])
                lca[name] = lca[name] + part if name in lca else part
        yield lca
