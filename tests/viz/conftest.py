"""Synthetic cubes, written by hand from docs/formats/cube.md so that they share no code with reduce."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import xarray as xr

ATTENTION = ["key", "query", "value", "out"]
CROSS = [f"cross_{name}" for name in ATTENTION]
FEED_FORWARD = ["W1", "W2"]
COMPONENTS = [*ATTENTION, *CROSS, *FEED_FORWARD, "embedding", "position", "norm", "output", "other"]
STATUSES = ["converged", "tolerance_not_met", "not_finite", "not_checked", "missing"]
LOST = ("not_finite", "missing")
SHAPES = {"encoder-decoder": (6, 6), "decoder-only": (0, 12), "encoder-only": (12, 0)}
HEADS = 4

MakeCube = Callable[..., xr.Dataset]


def _named(dims: Sequence[str], values: object, long_name: str, units: str = "1", **more: object) -> xr.Variable:
    return xr.Variable(dims, values, {"long_name": long_name, "units": units, **more})


def _sizes(layers: list[str], *, cross: bool) -> np.ndarray:
    sizes = np.zeros((len(layers), len(COMPONENTS)), dtype=np.int64)
    for row, layer in enumerate(layers):
        names = ["embedding", "norm"] if layer == "model" else [*ATTENTION, *FEED_FORWARD, "norm"]
        if cross and layer.startswith("decoder"):
            names += CROSS
        for name in names:
            sizes[row, COMPONENTS.index(name)] = 64
    return sizes


def make_cube(
    shape: str = "encoder-decoder",
    *,
    steps: int = 40,
    data: Sequence[str] = ("batch", "probe"),
    seed: int = 0,
    status: dict[tuple[str, int], str] | None = None,
    scale: float = 1e-3,
    path: str = "recorded",
    first_step_still: bool = True,
    tolerances: dict[str, dict[str, float]] | None = None,
) -> xr.Dataset:
    """Make a cube in memory.

    `status` sets single entries, by loss data and position: ``tolerance_not_met`` gets a residual to match,
    ``not_checked`` no losses, the other two NaN. `first_step_still`: learning rate 0, nothing moves, residual exactly
    0.
    """
    random = np.random.default_rng(seed)
    encoders, decoders = SHAPES[shape]
    layers = [f"encoder.{i}" for i in range(encoders)] + [f"decoder.{i}" for i in range(decoders)] + ["model"]
    sizes = _sizes(layers, cross=encoders > 0)
    filled = sizes > 0
    amounts = (len(data), steps, len(layers), len(COMPONENTS))
    pace = np.exp(-np.arange(steps) / (steps / 3))[None, :, None, None]
    lca = scale * pace * random.normal(-0.6, 1.0, amounts)
    lca[..., layers.index("model"), COMPONENTS.index("embedding")] *= 40
    # Multiples of a power of two add up exactly in any order, so that tests can ask for the very sum.
    lca = np.round(lca * 2.0**34) / 2.0**34
    lca[..., ~filled] = np.nan
    codes = np.zeros(amounts[:2], dtype=np.int8)
    residual = 1e-3 * np.nansum(lca, axis=(2, 3)) * random.normal(size=amounts[:2])
    if first_step_still:
        lca[:, 0] = np.where(filled, 0.0, np.nan)
        residual[:, 0] = 0.0
    for (name, position), text in (status or {}).items():
        entry = (list(data).index(name), position)
        codes[entry] = STATUSES.index(text)
        residual[entry] = np.nan if text in LOST else 0.05
        if text in LOST:
            lca[entry] = np.nan
    change = np.nansum(lca, axis=(2, 3)) - residual
    loss_end = 9.0 + np.cumsum(np.nan_to_num(change), axis=1)
    loss_start = loss_end - change
    loss_end[np.isnan(change)] = np.nan
    allowed = np.array([_tolerance(name, tolerances) for name in data])[:, :, None]
    allowed = allowed[:, 0] * np.abs(change) + allowed[:, 1] + 1e-6
    for (name, position), text in (status or {}).items():
        if text == "not_checked":
            for entries in (loss_start, loss_end, residual, allowed):
                entries[list(data).index(name), position] = np.nan
    head = np.full((*amounts[:3], len(ATTENTION + CROSS), HEADS), np.nan)
    head[...] = lca[..., : len(ATTENTION + CROSS), None] / HEADS
    cells, entry_dims = ("data", "step", "layer", "component"), ("data", "step")
    step = np.arange(steps)
    return xr.Dataset(
        {
            "lca": _named(cells, lca, "loss change allocation", "nat"),
            "lca_positive": _named(cells, np.maximum(lca, 0), "loss change allocation of what hurt", "nat"),
            "hurting": _named(cells, np.where(np.isnan(lca), np.nan, 0.5), "share of entries that hurt"),
            "lca_head": _named(
                ("data", "step", "layer", "attention_component", "head"), head, "LCA of the head", "nat"
            ),
            "lca_standard_error": _named(cells, np.full(amounts, np.nan), "standard error of LCA", "nat"),
            "total_standard_error": _named(
                entry_dims, np.full(amounts[:2], np.nan), "standard error of LCA summed over all cells", "nat"
            ),
            "loss_start": _named(entry_dims, loss_start, "loss before the step", "nat"),
            "loss_end": _named(entry_dims, loss_end, "loss after the step", "nat"),
            "residual": _named(entry_dims, residual, "residual", "nat"),
            "tolerance": _named(entry_dims, allowed, "largest residual of a balanced entry", "nat"),
            "status": _named(
                entry_dims,
                codes,
                "how the entry came about",
                flag_values=np.arange(len(STATUSES), dtype=np.int8),
                flag_meanings=" ".join(STATUSES),
            ),
            "evaluations": _named(entry_dims, np.full(amounts[:2], 3), "gradient evaluations"),
            "n_parameters": _named(("layer", "component"), sizes, "entries in the cell"),
            "n_not_recorded": _named(("layer", "component"), np.zeros_like(sizes), "entries that were not recorded"),
            "n_tied": _named(("layer", "component"), np.zeros_like(sizes), "entries that another cell has, too"),
        },
        coords={
            "data": _named(("data",), list(data), "loss data"),
            "step": _named(("step",), step, "optimizer step"),
            "layer": _named(("layer",), layers, "layer"),
            "stack": _named(("layer",), [name.split(".")[0] for name in layers], "stack of the layer"),
            "depth": _named(("layer",), [int((name + ".-1").split(".")[1]) for name in layers], "depth"),
            "component": _named(("component",), COMPONENTS, "component"),
            "attention_component": _named(("attention_component",), ATTENTION + CROSS, "attention component"),
            "head": _named(("head",), np.arange(HEADS), "attention head"),
            "epoch": _named(("step",), np.ones(steps, dtype=np.int64), "epoch"),
            "lr": _named(("step",), np.linspace(0, 1e-3, steps), "learning rate"),
            "predictions": _named(("step",), np.full(steps, 100), "predictions"),
        },
        attrs={
            "Conventions": "CF-1.11",
            "title": "a synthetic cube",
            "source": "tests",
            "history": "",
            "references": "",
            "path": path,
            "lossledger_cube_version": 1,
            "provenance": json.dumps({"loss_data": tolerances or {}}),
        },
    )


def _tolerance(name: str, tolerances: dict[str, dict[str, float]] | None) -> tuple[float, float]:
    asked = (tolerances or {}).get(name, {})
    return asked.get("rtol", 1e-2), asked.get("atol", 1e-5)


@pytest.fixture(name="make_cube")
def make_cube_fixture() -> MakeCube:
    return make_cube
