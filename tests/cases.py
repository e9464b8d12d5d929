"""Small trainings that many tests share: a model, its data, and the workload that rebuilds both for replay."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import recorder
from recorder.layout import PARAMETERS, Layout, Slot
from recorder.manifest import Manifest
from recorder.segmentwriter import SegmentWriter, State
from recorder.steps import Step


class TinyTransformer(nn.Module):
    """A causal language model whose parameter names follow fairseq's, smooth everywhere (GELU)."""

    def __init__(self, *, vocabulary: int = 13, width: int = 8, heads: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.decoder = _Decoder(vocabulary, width, heads, layers)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.decoder(tokens)
        return logits


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        query, key, value = (
            projection(x).view(batch, length, self.num_heads, -1).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: torch.Tensor = self.out_proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return out


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_attn = _Attention(width, heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.self_attn_layer_norm(x + self.self_attn(x))
        out: torch.Tensor = self.final_layer_norm(x + self.fc2(functional.gelu(self.fc1(x))))
        return out


class _Decoder(nn.Module):
    def __init__(self, vocabulary: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(_Layer(width, heads) for _ in range(layers))
        self.output_projection = nn.Linear(width, vocabulary, bias=False)
        self.output_projection.weight = self.embed_tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        logits: torch.Tensor = self.output_projection(x)
        return logits


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelling:
    """The workload of `train`: next-token prediction on a fixed random text."""

    dtype: torch.dtype = torch.float32
    examples: int = 64
    length: int = 7
    vocabulary: int = 13

    def _text(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(5)
        return torch.randint(self.vocabulary, (self.examples, self.length), generator=generator)

    def model(self) -> nn.Module:
        return TinyTransformer(vocabulary=self.vocabulary).to(self.dtype)

    def indices(self, split: str) -> Sequence[int]:
        half = self.examples * 3 // 4
        return range(half) if split == "train" else range(half, self.examples)

    def batch(self, indices: Sequence[int], *, split: str, epoch: int) -> Any:
        return {"tokens": self._text()[list(indices)]}

    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor | float]:
        tokens = batch["tokens"]
        logits = model(tokens[:, :-1])
        loss_sum = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        return loss_sum, tokens[:, 1:].numel()


def workload() -> LanguageModelling:
    """What ``--workload tests.cases:workload`` names."""
    return LanguageModelling()


def workload_float64() -> LanguageModelling:
    """What ``--workload tests.cases:workload_float64`` names."""
    return LanguageModelling(dtype=torch.float64)


def write_segment(run: Path, thetas: Sequence[Mapping[str, torch.Tensor]], steps: Sequence[Step]) -> None:
    """Put consecutive steps into a run as one segment of its first attempt, replacing one of the same steps."""
    writer = SegmentWriter(run, Manifest.read(run).run_id, 1, 0, len(steps))
    for theta, step in zip(thetas, [None, *steps], strict=True):
        layout = Layout(tuple(Slot.of(PARAMETERS, name, tensor) for name, tensor in theta.items()))
        vectors = layout.allocate()
        for view, tensor in zip(layout.views(vectors), theta.values(), strict=True):
            view.copy_(tensor)
        writer.add(State(steps[0].step if step is None else step.step + 1, layout, vectors), step)
    writer.seal()


def train(
    run: Path,
    *,
    steps: int = 6,
    micro_batches: int = 2,
    factory: Callable[[], LanguageModelling] = workload,
    make_optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
    steps_to_record: str = "all",
    frozen: str | None = None,
    **watch_arguments: Any,
) -> nn.Module:
    """Train `LanguageModelling` for a few steps with the recorder on, as the README shows; return the trained model."""
    torch.manual_seed(1)
    task = factory()
    model = task.model()
    if frozen is not None:
        model.get_submodule(frozen).requires_grad_(False)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(parameters) if make_optimizer else torch.optim.Adam(parameters, lr=1e-2)
    examples = torch.Generator().manual_seed(2)
    arguments: dict[str, Any] = {
        "run": run,
        "workload": f"tests.cases:{factory.__name__}",
        "steps": steps_to_record,
        **watch_arguments,
    }
    with recorder.watch(model, optimizer, **arguments) as rec:
        for _ in range(steps):
            counts = 0.0
            for _ in range(micro_batches):
                indices = torch.randperm(len(task.indices("train")), generator=examples)[:8]
                batch = task.batch(indices.tolist(), split="train", epoch=1)
                rec.batch(indices, batch)
                loss_sum, predictions = task.loss(model, batch)
                rec.loss(loss_sum, predictions)
                loss_sum.backward()  # type: ignore[no-untyped-call]
                counts += float(predictions)
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.div_(counts)
            optimizer.step()
            optimizer.zero_grad()
    return model
