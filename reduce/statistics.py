"""The statistics of the cube, each as data: chunk, combine, finalize.

    chunk      units of one parameter    -> blocks of units     inside one shard
    combine    blocks and groups so far  -> groups              over the parameters of a shard
    finalize   groups, entries           -> the cube's numbers  over a block of steps

Steps are never merged, so the groups of two shards are only laid one behind the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from reduce.grouping import NO_GROUP, Grouping, Groups

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]


def sum_of_blocks(values: npt.NDArray[Any], blocks: int) -> Floats:
    """Sum the units of each of a number of equal consecutive blocks.

    Every step is summed by itself along the contiguous axis, so a step's result has the same bits whichever steps
    share its shard.

    Parameters
    ----------
    values
        Array of shape (steps, units), any real dtype.
    blocks
        Number of blocks; divides the number of units.

    Returns
    -------
    numpy.ndarray
        Array of shape (steps, blocks), float64.

    Examples
    --------
    >>> sum_of_blocks(np.array([[1.0, 2.0, 3.0, 4.0]]), 2)
    array([[3., 7.]])
    """
    steps, units = values.shape
    contiguous = np.ascontiguousarray(values).reshape(steps, blocks, units // blocks)
    sums: Floats = contiguous.sum(axis=2, dtype=np.float64)
    return sums


def as_it_is(totals: Floats, entries: npt.NDArray[np.int64]) -> Floats:
    """Return the totals, NaN where a group has no entries.

    Parameters
    ----------
    totals
        Array of shape (..., *groups), float64.
    entries
        Array of shape (*groups), int64.

    Returns
    -------
    numpy.ndarray
        Array of the shape of `totals`, float64, in its unit.
    """
    return np.where(entries > 0, totals, np.nan)


def share_of_entries(totals: Floats, entries: npt.NDArray[np.int64]) -> Floats:
    """Return the totals as a share of the entries, NaN where a group has none.

    Parameters
    ----------
    totals
        Array of shape (..., *groups), float64: how many entries count.
    entries
        Array of shape (*groups), int64.

    Returns
    -------
    numpy.ndarray
        Array of the shape of `totals`, float64, from 0 to 1.

    Examples
    --------
    >>> share_of_entries(np.array([3.0, 0.0]), np.array([4, 0]))
    array([0.75,  nan])
    """
    return totals / np.where(entries > 0, entries, np.nan)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Statistic:
    """One variable of the cube, made from one quantity of the shards.

    Parameters
    ----------
    variable
        Its name in the cube.
    quantity
        Its name in the shards: one of `replay.columns.PER_UNIT`.
    over
        Which groups of a `Grouping` it has.
    chunk
        (steps, units) and a number of blocks to (steps, blocks).
    combine
        Two arrays of partial results to one.
    finalize
        (..., *groups) and the entries of the groups to the cube's numbers.
    """

    variable: str
    quantity: str
    over: Literal["cells", "heads"]
    chunk: Callable[[npt.NDArray[Any], int], Floats] = sum_of_blocks
    combine: Callable[[Floats, Floats], Floats] = np.add
    finalize: Callable[[Floats, npt.NDArray[np.int64]], Floats] = as_it_is

    def groups(self, grouping: Grouping) -> Groups:
        """Return the groups this statistic is taken over.

        Parameters
        ----------
        grouping
            All groups of the parameter table.

        Returns
        -------
        Groups
            Those of the axis names in `over`.
        """
        return grouping.cells if self.over == "cells" else grouping.heads

    def partial(self, units: Mapping[str, npt.NDArray[Any]], groups: Groups, steps: int) -> Floats:
        """Reduce one shard: chunk every member, combine the chunks in their groups.

        Parameters
        ----------
        units
            Parameter name to array of shape (steps, units).
        groups
            The groups.
        steps
            Number of steps.

        Returns
        -------
        numpy.ndarray
            Array of shape (steps, groups), float64, not finalized.
        """
        totals = np.zeros((steps, groups.size), dtype=np.float64)
        # A step that is not finite carries NaN and inf; they pass through, and its status tells.
        with np.errstate(invalid="ignore", over="ignore"):
            for member in groups.members:
                blocks = self.chunk(units[member.parameter], len(member.codes))
                if member.distinct:
                    totals[:, member.codes] = self.combine(totals[:, member.codes], blocks)
                    continue
                for position, code in enumerate(member.codes):
                    if code != NO_GROUP:
                        totals[:, code] = self.combine(totals[:, code], blocks[:, position])
        return totals


STATISTICS = (
    Statistic(variable="lca", quantity="sum", over="cells"),
    Statistic(variable="lca_positive", quantity="positive_sum", over="cells"),
    Statistic(variable="hurting", quantity="positive_count", over="cells", finalize=share_of_entries),
    Statistic(variable="lca_head", quantity="sum", over="heads"),
)
"""Every variable of the cube that is made from units.

LCA: Lan et al., NeurIPS 2019, section 2; its sums over components and layers: Vázquez et al., COLING 2022,
section 2.3.
"""
