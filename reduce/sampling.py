"""Standard errors on sampled loss data: how far LCA would be off with another draw of as many examples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from reduce.grouping import Grouping
from replay.shards import Shard

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

CELLS, TOTAL = "lca_standard_error", "total_standard_error"
"""The cube's variables: of every cell, and of the sum over all cells."""


def standard_errors(shard: Shard, grouping: Grouping) -> tuple[Floats, Floats]:
    """Estimate standard errors from the spread over micro-batches.

    The loss is a ratio of sums over micro-batches, and so is every cell's LCA: R = Σ c / Σ n, with c what a micro-batch
    gives and n its predictions. The variance of a ratio of sums over M independent draws is estimated by
    M / (M - 1) · Σ (c - R·n)² / (Σ n)² (Cochran 1977, Sampling Techniques, equation 6.9, without the correction for a
    finite population).

    Parameters
    ----------
    shard
        The shard.
    grouping
        The groups of the parameter table: every part of a parameter is in one cell.

    Returns
    -------
    of_cells : numpy.ndarray
        Array of shape (steps, cells), float64, in nats; NaN where no parameter is in the cell, where the loss data was
        not sampled, and where it has fewer than two micro-batches.
    of_total : numpy.ndarray
        Array of shape (steps,), likewise.
    """
    steps, cells = len(shard.per_step["step"]), grouping.cells
    missing = np.full((steps, cells.size), np.nan), np.full(steps, np.nan)
    if shard.counts is None or shard.counts.shape[1] < 2:
        return missing
    counts = shard.counts
    given = np.zeros((*counts.shape, cells.size))
    for name, codes in grouping.parts.items():
        # One number of a parameter with one component, else one of every part.
        spread = shard.spread[name].reshape(*counts.shape, len(codes))
        for position, code in enumerate(codes):
            given[..., code] += spread[..., position]
    of_cells = _of_ratio(given, counts)
    of_cells[:, cells.entries.reshape(-1) == 0] = np.nan
    return of_cells, _of_ratio(given.sum(axis=-1, keepdims=True), counts)[:, 0]


def _of_ratio(given: Floats, counts: Floats) -> Floats:
    micro_batches, predictions = counts.shape[1], counts.sum(axis=1)[:, None]
    # A step that is not finite carries NaN and inf; they pass through, and its status tells.
    with np.errstate(invalid="ignore", over="ignore"):
        ratio = given.sum(axis=1) / predictions
        deviations = given - ratio[:, None] * counts[..., None]
        spread = np.sqrt(micro_batches / (micro_batches - 1) * np.square(deviations).sum(axis=1))
        errors: Floats = spread / predictions
    return errors
