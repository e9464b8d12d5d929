"""The parameter tables of torch.nn's own Transformer modules, of nanoGPT, and of fairseq's names."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from recorder.parameters import parameter_table
from tests.cases import TinyTransformer
from tests.naming_properties import Family, NamingProperties

TOKENS = torch.tensor([[3, 7, 4, 9, 5, 3]])
SELF = {"query", "key", "value", "out"}
CROSS = {"cross_query", "cross_key", "cross_value", "cross_out"}


class NanoAttention(nn.Module):
    """As in nanoGPT's model.py: query, key and value in one Linear, the number of heads under n_head."""

    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width, bias=bias)
        self.c_proj = nn.Linear(width, width, bias=bias)
        self.n_head = heads
        self.n_embd = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.size()
        q, k, v = (
            each.view(batch, length, self.n_head, width // self.n_head).transpose(1, 2)
            for each in self.c_attn(x).split(self.n_embd, dim=2)
        )
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: torch.Tensor = self.c_proj(y.transpose(1, 2).contiguous().view(batch, length, width))
        return out


class NanoBlock(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, bias=bias)
        self.attn = NanoAttention(width, heads, bias)
        self.ln_2 = nn.LayerNorm(width, bias=bias)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, 4 * width, bias=bias), "c_proj": nn.Linear(4 * width, width, bias=bias)}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        out: torch.Tensor = x + self.mlp["c_proj"](functional.gelu(self.mlp["c_fc"](self.ln_2(x))))
        return out


class NanoGPT(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(11, 16),
                "wpe": nn.Embedding(12, 16),
                "h": nn.ModuleList(NanoBlock(16, 4, bias) for _ in range(3)),
                "ln_f": nn.LayerNorm(16, bias=bias),
            }
        )
        self.lm_head = nn.Linear(16, 11, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.transformer["wte"](tokens) + self.transformer["wpe"](torch.arange(tokens.shape[1]))
        for block in self.transformer["h"].children():
            x = block(x)
        logits: torch.Tensor = self.lm_head(self.transformer["ln_f"](x))
        return logits


class OwnBlocks(nn.Module):
    """MultiheadAttention in a user's own module; keys and values may have a width of their own."""

    def __init__(self, **options: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"attn": nn.MultiheadAttention(16, 4, batch_first=True, **options)}) for _ in range(3)
        )

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            attention = block["attn"]  # type: ignore[index]
            x = x + attention(x, memory[..., : attention.kdim], memory[..., : attention.vdim])[0]
        return x


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def next_token(model: nn.Module) -> torch.Tensor:
    return functional.cross_entropy(model(TOKENS)[0, :-1], TOKENS[0, 1:])


def squares(*inputs: torch.Tensor) -> Callable[[nn.Module], torch.Tensor]:
    def loss(model: nn.Module) -> torch.Tensor:
        found: torch.Tensor = model(*inputs).square().mean()
        return found

    return loss


def decoders(number: int) -> tuple[tuple[str, str], ...]:
    return tuple((f"decoder.{depth}", "") for depth in range(number))


def lists(**paths: str) -> dict[str, Callable[[nn.Module], nn.ModuleList]]:
    def find(path: str) -> Callable[[nn.Module], nn.ModuleList]:
        return lambda model: model.get_submodule(path)  # type: ignore[return-value]

    return {stack: find(path) for stack, path in paths.items()}


def transformer(**options: bool) -> nn.Module:
    return nn.Transformer(16, 4, 3, 2, 20, dropout=0.0, batch_first=True, **options)  # type: ignore[arg-type]


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 20, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(16))


FAMILIES = [
    Family(
        name=f"nanoGPT {'with' if bias else 'without'} biases",
        build=lambda bias=bias: NanoGPT(bias),  # type: ignore[misc]
        loss=next_token,
        attentions=decoders(3),
        stacks=lists(decoder="transformer.h"),
        components=frozenset({*SELF, "W1", "W2", "norm", "embedding", "position", "output"}),
        uses=("embedding", "output"),
    )
    for bias in (True, False)
] + [
    Family(
        name="fairseq's names",
        build=lambda: TinyTransformer(width=16, heads=4, layers=3),
        loss=next_token,
        attentions=decoders(3),
        stacks=lists(decoder="decoder.layers"),
        components=frozenset({*SELF, "W1", "W2", "norm", "embedding", "output"}),
        uses=("embedding", "output"),
    ),
    Family(
        name="Transformer",
        build=transformer,
        loss=squares(normal(1, 5, 16), normal(1, 4, 16)),
        attentions=(
            *(("encoder.0", ""), ("encoder.1", ""), ("encoder.2", "")),
            *(("decoder.0", ""), ("decoder.0", "cross_"), ("decoder.1", ""), ("decoder.1", "cross_")),
        ),
        stacks=lists(encoder="encoder.layers", decoder="decoder.layers"),
        components=frozenset({*SELF, *CROSS, "W1", "W2", "norm"}),
    ),
    Family(
        name="TransformerEncoder",
        build=encoder,
        loss=squares(normal(1, 5, 16)),
        attentions=(("encoder.0", ""), ("encoder.1", ""), ("encoder.2", "")),
        stacks=lists(encoder="layers"),
        components=frozenset({*SELF, "W1", "W2", "norm"}),
    ),
    Family(
        name="MultiheadAttention",
        build=OwnBlocks,
        loss=squares(normal(1, 5, 16), normal(1, 4, 16)),
        attentions=(("blocks.0", ""), ("blocks.1", ""), ("blocks.2", "")),
        stacks=lists(blocks="blocks"),
        components=frozenset(SELF),
    ),
    Family(
        name="MultiheadAttention with keys and values of another width",
        build=lambda: OwnBlocks(kdim=6, vdim=5),
        loss=squares(normal(1, 5, 16), normal(1, 4, 16)),
        attentions=(("blocks.0", ""), ("blocks.1", ""), ("blocks.2", "")),
        stacks=lists(blocks="blocks"),
        components=frozenset(SELF),
    ),
]


@pytest.mark.parametrize("family", FAMILIES, ids=str)
class TestFamilies(NamingProperties):
    """Every property for every family."""


def places(model: nn.Module) -> dict[str, tuple[str, tuple[str, ...], int]]:
    table = parameter_table(model)
    return {row.name: (row.layer, tuple(part.component for part in row.parts), row.unit_axis) for row in table}


def test_a_layer_of_torch_that_stands_alone_has_depth_0() -> None:
    class Own(nn.TransformerDecoderLayer):
        pass

    model = nn.ModuleDict({"lower": nn.TransformerEncoderLayer(4, 2, 6), "upper": Own(4, 2, 6)})
    found = places(model)
    assert {layer for layer, *_ in found.values()} == {"encoder.0", "decoder.0"}
    assert found["lower.self_attn.in_proj_weight"] == ("encoder.0", ("query", "key", "value"), 0)
    assert found["upper.multihead_attn.in_proj_bias"] == ("decoder.0", ("cross_query", "cross_key", "cross_value"), 0)
    assert found["upper.multihead_attn.out_proj.weight"] == ("decoder.0", ("cross_out",), 1)
    assert found["upper.norm3.weight"] == ("decoder.0", ("norm",), 0)
    two = places(nn.ModuleDict({"a": nn.TransformerEncoderLayer(4, 2, 6), "b": nn.TransformerEncoderLayer(4, 2, 6)}))
    assert {layer for layer, *_ in two.values()} == {"a.encoder.0", "b.encoder.0"}
    assert {layer for layer, *_ in places(nn.TransformerEncoderLayer(4, 2, 6)).values()} == {"encoder.0"}


def test_an_encoder_that_serves_as_decoder_is_not_mixed_with_the_encoder_beside_it() -> None:
    found = places(nn.ModuleDict({"encoder": encoder(), "decoder": encoder()}))
    layers = {name: layer for name, (layer, *_) in found.items() if name.endswith("linear1.weight")}
    assert layers["encoder.layers.2.linear1.weight"] == "encoder.encoder.2"
    assert layers["decoder.layers.2.linear1.weight"] == "decoder.encoder.2"
    assert len(set(layers.values())) == 6


def test_the_added_position_of_an_attention_is_of_key_and_value_with_their_heads() -> None:
    rows = {
        row.name: row for row in parameter_table(nn.ModuleDict({"attn": nn.MultiheadAttention(6, 3, add_bias_kv=True)}))
    }
    for name, component in (("attn.bias_k", "key"), ("attn.bias_v", "value")):
        row = rows[name]
        assert (row.layer, row.component, row.unit_axis, row.units, row.heads) == ("model", component, 2, 6, 3)


def test_common_names_in_modules_of_another_kind_are_not_mistaken() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_proj_weight = nn.Parameter(torch.zeros(12, 4))
            self.query_key_value = nn.Linear(4, 12)
            self.q_proj, self.k_proj = nn.Linear(4, 4), nn.Linear(4, 4)

    layers = nn.ModuleList([nn.ModuleDict({"self_attn": Attention(), "attention": Attention()})])
    found = places(nn.ModuleDict({"decoder": nn.ModuleDict({"layers": layers})}))
    assert set(found.values()) == {("model", ("other",), 0)}
