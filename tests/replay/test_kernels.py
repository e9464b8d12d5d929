"""Which kernels compute the loss: the same with and without gradient, and told in the recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from replay import kernels
from replay.gradients import LossSurface
from replay.precision import PRECISIONS
from replay.shards import ShardFolder

CPU = torch.device("cpu")
EXAMPLES, LENGTH, WIDTH = 16, 12, 16


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 4 * WIDTH, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(x, src_key_padding_mask=padding)
        return out


@dataclasses.dataclass(frozen=True)
class _Pooling:
    """A loss that looks at padded places too."""

    def model(self) -> nn.Module:
        torch.manual_seed(1)
        return _Net()

    def indices(self, split: str) -> Sequence[int]:
        return range(EXAMPLES)

    def batch(self, indices: Sequence[int], *, split: str, epoch: int) -> Any:
        raise AssertionError

    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor | float]:
        padding = torch.arange(LENGTH)[None] >= torch.arange(EXAMPLES)[:, None] % 5 + LENGTH - 4
        return (model(batch, padding).float().mean(dim=1) ** 2).sum(), len(batch)


def _losses(precision: str) -> tuple[float, float]:
    workload, batch = _Pooling(), torch.randn(EXAMPLES, LENGTH, WIDTH, generator=torch.Generator().manual_seed(2))
    theta = {name: tensor.detach() for name, tensor in workload.model().named_parameters()}
    surface = LossSurface(workload, list(theta), {}, CPU, PRECISIONS[precision])
    theta = PRECISIONS[precision].converted(theta)
    return surface.evaluate(theta, [batch]).loss, surface.loss(theta, [batch])


@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
def test_torchs_own_layers_lose_the_same_with_and_without_gradient(precision: str) -> None:
    kernels.rule_out_inexact()
    with_gradient, alone = _losses(precision)
    assert alone == pytest.approx(with_gradient, rel=1e-6)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_on_the_fast_path_they_would_not() -> None:
    # As torch has it; a replay elsewhere in this process may have switched it off.
    torch.backends.mha.set_fastpath_enabled(True)
    with_gradient, alone = _losses("float32")
    assert abs(alone - with_gradient) > 1e-3 * with_gradient


def test_the_recipe_tells_micro_batches_and_the_kernels_of_attention(
    run: Path, replay: Callable[..., int], folder: Callable[[Path, str], ShardFolder]
) -> None:
    assert replay(run, "--steps", "0:1", "--chunk", "1", loss_data=("batch", "probe:16")) == 0
    recipes = {name: folder(run, name).settings.recipe for name in ("batch", "probe")}
    assert {name: recipe["micro_batch"] for name, recipe in recipes.items()} == {"batch": "recorded", "probe": 8}
    assert recipes["batch"]["attention"] == {"scaled_dot_product": ["flash", "math"], "fastpath": False}


def test_a_kernel_that_is_switched_off_leaves_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: False)
    assert kernels.attention(CPU)["scaled_dot_product"] == ["math"]
