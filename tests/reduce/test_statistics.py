from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from reduce.statistics import STATISTICS, as_it_is, share_of_entries, sum_of_blocks


@given(steps=st.integers(1, 40), blocks=st.integers(1, 8), length=st.integers(0, 300), seed=st.integers(0, 2**32 - 1))
def test_a_step_has_the_same_bits_alone_and_among_others(steps: int, blocks: int, length: int, seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=(steps, blocks * length))
    together = sum_of_blocks(values, blocks)
    alone = np.concatenate([sum_of_blocks(values[step : step + 1], blocks) for step in range(steps)])
    assert together.tobytes() == alone.tobytes()


def test_blocks_are_consecutive_units() -> None:
    values = np.arange(6, dtype=np.int64)[None]
    assert sum_of_blocks(values, 3).tolist() == [[1.0, 5.0, 9.0]]
    assert sum_of_blocks(values, 3).dtype == np.float64


def test_a_group_without_entries_is_nan_and_never_zero() -> None:
    entries = np.array([2, 0])
    assert np.array_equal(as_it_is(np.array([[0.0, 0.0]]), entries), [[0.0, np.nan]], equal_nan=True)
    assert np.array_equal(share_of_entries(np.array([[1.0, 0.0]]), entries), [[0.5, np.nan]], equal_nan=True)


def test_a_quantity_that_is_not_finite_reduces_without_a_warning() -> None:
    from reduce.grouping import grouping
    from replay.shards import Parameter

    groups = grouping([Parameter(name=name, shape=(2,), dtype="float32") for name in "ab"]).cells
    units = {"a": np.array([[np.inf, -np.inf]]), "b": np.array([[1e308, 1e308]])}
    assert np.isnan(STATISTICS[0].partial(units, groups, 1)).any()
