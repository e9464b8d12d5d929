"""The whole way from run to shards against brute force that shares no code with the engine.

In float64, by 64-point Gauss-Legendre quadrature of autograd's gradient, summed into cells by a table of names
written out by hand. The steps are short enough for Simpson's own error to stay below the target of 1e-9.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from recorder.runformat import Run
from replay.shards import ShardFolder
from tests import cases
from tests.replay.variants import one_thread

STEPS = 4
TARGET = 1e-9
FLOOR = 1e-15
"""Of the step's Σ|entry|: the absolute error allowed to what is zero in theory (a key's bias) or passes through it."""

CELLS = {
    r"decoder\.embed_tokens\.weight": "embedding",
    r"decoder\.layers\.(\d)\.self_attn\.k_proj\.(weight|bias)": "key",
    r"decoder\.layers\.(\d)\.self_attn\.q_proj\.(weight|bias)": "query",
    r"decoder\.layers\.(\d)\.self_attn\.v_proj\.(weight|bias)": "value",
    r"decoder\.layers\.(\d)\.self_attn\.out_proj\.(weight|bias)": "out",
    r"decoder\.layers\.(\d)\.fc1\.(weight|bias)": "W1",
    r"decoder\.layers\.(\d)\.fc2\.(weight|bias)": "W2",
    r"decoder\.layers\.(\d)\.(self_attn|final)_layer_norm\.(weight|bias)": "norm",
}


def _cell(name: str) -> tuple[str, str]:
    for pattern, component in CELLS.items():
        match = re.fullmatch(pattern, name)
        if match:
            return ("model" if component == "embedding" else f"decoder.{match[1]}"), component
    raise AssertionError(name)


def _mean_loss(model: nn.Module, theta: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    logits = torch.func.functional_call(model, theta, (tokens[:, :-1],))
    chosen = logits.gather(-1, tokens[:, 1:, None])[..., 0]
    mean: torch.Tensor = (logits.logsumexp(-1) - chosen).mean()
    return mean


def brute_force(run: Path, loss_data: str) -> Iterator[dict[str, Any]]:
    """Yield for every step the LCA of every entry and both losses."""
    opened, model = Run(run), cases.workload_float64().model()
    text = torch.randint(13, (64, 7), generator=torch.Generator().manual_seed(5))
    probe = text[np.random.default_rng(0).choice(48, size=16, replace=False)]
    nodes, weights = np.polynomial.legendre.leggauss(64)
    for t in range(STEPS):
        batch = text[torch.cat([entry.indices for entry in opened.step(t).micro_batches])]
        tokens = batch if loss_data == "batch" else probe
        start, end = opened.parameters(t), opened.parameters(t + 1)
        total = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
        for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
            theta = {name: ((1 - node) * start[name] + node * end[name]).requires_grad_() for name in start}
            gradients = torch.autograd.grad(_mean_loss(model, theta, tokens), list(theta.values()))
            for name, gradient in zip(theta, gradients, strict=True):
                total[name] += weight * gradient
        with torch.no_grad():
            losses = [float(_mean_loss(model, theta, tokens)) for theta in (start, end)]
        yield {"lca": {name: total[name] * (end[name] - start[name]) for name in start}, "losses": losses}


def record_for_brute_force(run: Path) -> None:
    adam = functools.partial(torch.optim.Adam, lr=3e-5)
    with one_thread():
        cases.train(run, steps=STEPS, factory=cases.workload_float64, make_optimizer=adam)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("brute") / "run"
    record_for_brute_force(run)
    return run


def _worst(found: dict[Any, float], expected: dict[Any, float], floor: float) -> float:
    assert found.keys() == expected.keys()
    return max(abs(found[key] - expected[key]) / max(abs(expected[key]), floor / TARGET) for key in expected)


@pytest.mark.parametrize("loss_data", ["batch", "probe"])
def test_every_cell_and_every_head_of_every_step_agrees_withbrute_force(
    run: Path,
    loss_data: str,
    replay: Callable[..., int],
    folder: Callable[[Path, str], ShardFolder],
    record_property: Callable[[str, object], None],
) -> None:
    # Uses of tied weights have a test of their own, with brute force of their own.
    chosen = "probe:16" if loss_data == "probe" else "batch"
    assert replay(run, "--tied-weights", "whole", loss_data=(chosen,)) == 0
    shards = folder(run, loss_data)
    shard = shards.read(0, STEPS)
    worst_cell = worst_head = worst_unit = 0.0
    for t, truth in enumerate(brute_force(run, loss_data)):
        cells: dict[tuple[str, str], float] = {}
        positive: dict[tuple[str, str], float] = {}
        expected_cells: dict[tuple[str, str], float] = {}
        expected_positive: dict[tuple[str, str], float] = {}
        heads: dict[tuple[str, int], float] = {}
        expected_heads: dict[tuple[str, int], float] = {}
        for parameter in shards.parameters:  # the engine's own table decides its cells
            key = (parameter.layer, parameter.component)
            cells[key] = cells.get(key, 0.0) + float(shard.per_unit["sum"][parameter.name][t].sum())
            positive[key] = positive.get(key, 0.0) + float(shard.per_unit["positive_sum"][parameter.name][t].sum())
            if parameter.heads and len(parameter.shape) == 2:
                blocks = shard.per_unit["sum"][parameter.name][t].reshape(parameter.heads, -1).sum(axis=1)
                heads |= {(parameter.name, head): float(block) for head, block in enumerate(blocks)}
        floor = FLOOR * sum(float(entries.abs().sum()) for entries in truth["lca"].values())
        for name, entries in truth["lca"].items():
            key = _cell(name)
            expected_cells[key] = expected_cells.get(key, 0.0) + float(entries.sum())
            expected_positive[key] = expected_positive.get(key, 0.0) + float(entries.clamp(min=0).sum())
            projection = re.search(r"self_attn\.(k|q|v|out)_proj\.weight", name)
            if projection:
                for head in (0, 1):
                    own = slice(4 * head, 4 * head + 4)
                    of_head = entries[:, own] if projection[1] == "out" else entries[own]
                    expected_heads[name, head] = float(of_head.sum())
            columns = re.search(r"(out_proj|fc2)\.weight", name)
            units = entries.sum(dim=0 if columns else 1) if entries.dim() == 2 else entries
            difference = (units - torch.tensor(shard.per_unit["sum"][name][t])).abs()
            worst_unit = max(worst_unit, float((difference / units.abs().clamp(min=floor / TARGET)).max()))
        worst_cell = max(worst_cell, _worst(cells, expected_cells, floor), _worst(positive, expected_positive, floor))
        worst_head = max(worst_head, _worst(heads, expected_heads, floor))
        assert len(cells) == 1 + 2 * 7
        assert len(heads) == 2 * 4 * 2
        losses = [shard.per_step[name][t] for name in ("loss_start", "loss_end")]
        np.testing.assert_allclose(losses, truth["losses"], rtol=1e-13)
        assert abs(shard.per_step["residual"][t]) < TARGET * abs(losses[1] - losses[0])
    record_property("worst_relative_error", f"cells {worst_cell:.1e}, heads {worst_head:.1e}, units {worst_unit:.1e}")
    assert worst_cell < TARGET
    assert worst_head < TARGET
    assert worst_unit < TARGET
