"""Standard errors from the spread over micro-batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from reduce.grouping import grouping
from reduce.sampling import standard_errors
from replay.shards import Parameter, Part, Shard

TABLE = (
    Parameter(name="a", shape=(2,), dtype="float32", component="W1", layer="encoder.0", stack="encoder", depth=0),
    Parameter(name="b", shape=(2,), dtype="float32", component="W1", layer="encoder.0", stack="encoder", depth=0),
    Parameter(name="c", shape=(2,), dtype="float32", component="W2", layer="encoder.0", stack="encoder", depth=0),
)
GROUPING = grouping(TABLE)
CELLS = GROUPING.cells
W1, W2 = (next(member.codes[0] for member in CELLS.members if member.parameter == name) for name in "ac")


def _shard(given: dict[str, np.ndarray], counts: np.ndarray | None) -> Shard:
    steps = 1 if counts is None else len(counts)
    return Shard(per_step={"step": np.arange(steps)}, per_unit={}, per_parameter={}, spread=given, counts=counts)


def test_it_is_the_spread_of_means_over_many_draws() -> None:
    # Micro-batches of unequal size with correlated parameters; the truth is the spread over repeated draws.
    generator = np.random.default_rng(0)
    draws, micro_batches = 4000, 24
    counts = generator.integers(5, 15, size=(draws, micro_batches)).astype(float)
    common = generator.normal(size=counts.shape)
    given = {
        "a": counts * (0.5 + common + generator.normal(size=counts.shape)),
        "b": counts * (-0.2 + generator.normal(size=counts.shape)),
        "c": counts * (0.1 - common),
    }
    of_cells, of_total = standard_errors(_shard(given, counts), GROUPING)
    means = {name: values.sum(axis=1) / counts.sum(axis=1) for name, values in given.items()}
    assert np.sqrt(np.square(of_cells[:, W1]).mean()) == pytest.approx((means["a"] + means["b"]).std(), rel=0.05)
    assert np.sqrt(np.square(of_cells[:, W2]).mean()) == pytest.approx(means["c"].std(), rel=0.05)
    assert np.sqrt(np.square(of_total).mean()) == pytest.approx(sum(means.values()).std(), rel=0.05)
    # The common part cancels between the cells: they are not independent.
    assert of_total.mean() < np.hypot(of_cells[:, W1], of_cells[:, W2]).mean() * 0.9
    others = [code for code in range(CELLS.size) if code not in (W1, W2)]
    assert np.isnan(of_cells[:, others]).all()


def test_with_equal_micro_batches_it_is_that_of_a_mean() -> None:
    values = np.array([[1.0, 4.0, -2.0, 0.5]])
    given = {"a": values * 10, "b": np.zeros_like(values), "c": np.zeros_like(values)}
    of_cells, of_total = standard_errors(_shard(given, np.full((1, 4), 10.0)), GROUPING)
    expected = values.std(ddof=1) / 2
    assert of_cells[0, W1] == pytest.approx(expected, rel=1e-12)
    assert (of_cells[0, W2], of_total[0]) == (0, pytest.approx(expected, rel=1e-12))


@pytest.mark.parametrize("counts", [None, np.full((1, 1), 8.0)], ids=["not sampled", "one micro-batch"])
def test_without_a_spread_there_is_none(counts: np.ndarray | None) -> None:
    of_cells, of_total = standard_errors(_shard({name: np.ones((1, 1)) for name in "abc"}, counts), GROUPING)
    assert np.isnan(of_cells).all()
    assert np.isnan(of_total).all()


def test_a_fused_parameter_gives_each_of_its_cells_its_own_part() -> None:
    layer: dict[str, Any] = {"layer": "encoder.0", "stack": "encoder", "depth": 0}
    parts = (Part(component="query", units=2), Part(component="key", units=1))
    table = grouping([Parameter(name="qk", shape=(3, 5), dtype="float32", component="fused", fused=parts, **layer)])
    generator = np.random.default_rng(1)
    query, key = generator.normal(size=(2, 3, 6))
    counts = np.full((3, 6), 4.0)
    of_cells, of_total = standard_errors(_shard({"qk": np.stack([query, key], axis=-1)}, counts), table)
    codes = table.parts["qk"]
    for values, code in zip((query, key), codes, strict=True):
        np.testing.assert_allclose(of_cells[:, code], values.std(axis=1, ddof=1) / np.sqrt(6) / 4, rtol=1e-12)
    np.testing.assert_allclose(of_total, (query + key).std(axis=1, ddof=1) / np.sqrt(6) / 4, rtol=1e-12)
