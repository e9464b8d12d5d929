"""Sums of LCA over the units of every parameter, in one pass over memory.

The two parameter sets of a step and the gradients on the way are read once, in blocks that stay in a processor's
cache; nothing of the parameters' size is written. On a model of tens of millions of parameters the sums would wait for
the memory otherwise, not for arithmetic.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from recorder.table import Parameter
from replay.blocks import Combination, Cut, bundles, combination, units_of
from replay.products import unrounded

if TYPE_CHECKING:
    import numpy.typing as npt


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ParameterSums:
    """What is kept of one parameter's part in a step.

    Parameters
    ----------
    sum, positive_sum
        float64 of shape (units,), in nats: LCA over all entries of a unit, and over those with LCA > 0.
    positive_count, zero_count
        int64 of shape (units,): the number of entries with LCA > 0, and of those with LCA = 0 exactly.
    gradient_norm, update_norm
        Euclidean norms of the mean gradient along the step and of the update.
    cosine
        Of the angle between them; NaN where one of the norms is 0. The product of the three is the parameter's LCA.
    """

    sum: npt.NDArray[Any]
    positive_sum: npt.NDArray[Any]
    positive_count: npt.NDArray[Any]
    zero_count: npt.NDArray[Any]
    gradient_norm: float
    update_norm: float
    cosine: float


def sum_parameters(
    parameters: Sequence[Parameter], gradient: Mapping[str, torch.Tensor], delta: Mapping[str, torch.Tensor]
) -> dict[str, ParameterSums]:
    """Sum the LCA of every parameter over each of its units.

    Parameters
    ----------
    parameters
        Rows of the parameter table: they say which axis is the unit axis.
    gradient
        Parameter name to the mean gradient along the step.
    delta
        Parameter name to the update.

    Returns
    -------
    dict of str to ParameterSums
        By parameter name, in host memory.
    """
    slopes, steps = combination(gradient), combination(delta)
    rows = {parameter.name: parameter for parameter in parameters}
    sums: list[torch.Tensor] = []
    for names in bundles({name: slopes.like[name] for name in rows}):
        together = [rows[name] for name in names]
        sums += _sums_of_one(together[0], slopes, steps) if len(names) == 1 else _sums_of(together, slopes, steps)
    # One transfer for all parameters, where they are on a GPU.
    flat = torch.cat([part.view(-1) for part in sums]).cpu().numpy() if sums else None
    found, used = {}, 0
    for parameter in parameters:
        assert flat is not None
        length = 4 * parameter.units + 2
        found[parameter.name] = _unpacked(flat[used : used + length])
        used += length
    return found


def total_of(sums: Mapping[str, ParameterSums]) -> float:
    """Sum the LCA of all parameters.

    Parameters
    ----------
    sums
        As `sum_parameters` gives them.

    Returns
    -------
    float
        In nats, as `dot` gives it.
    """
    return unrounded([float(of_parameter.sum.sum()) for of_parameter in sums.values()])


# For every parameter four sums of each of its units, then the squares of both norms. Counts in float64 are exact, and
# summed several times faster than booleans are.


def _sums_of(parameters: Sequence[Parameter], slopes: Combination, steps: Combination) -> list[torch.Tensor]:
    names, sizes = [row.name for row in parameters], [row.size for row in parameters]
    slope, step = slopes.joined(names), steps.joined(names)
    quantities = torch.empty((4, len(slope)), dtype=torch.float64, device=slope.device)
    lca = torch.mul(slope, step, out=quantities[0])
    torch.clamp_min(lca, 0, out=quantities[1])
    torch.gt(lca, 0, out=quantities[2])
    torch.eq(lca, 0, out=quantities[3])
    sums: list[torch.Tensor] = []
    parts = zip(
        parameters, torch.split(quantities, sizes, 1), torch.split(slope, sizes), torch.split(step, sizes), strict=True
    )
    for parameter, part, of_slope, of_step in parts:
        before, units, after = units_of(parameter.shape, parameter.unit_axis)
        sums.append(part.view(4, before, units, after).sum(dim=(1, 3)))
        sums += [torch.dot(of_slope, of_slope), torch.dot(of_step, of_step)]
    return sums


def _sums_of_one(parameter: Parameter, slopes: Combination, steps: Combination) -> list[torch.Tensor]:
    name = parameter.name
    like = slopes.like[name]
    cut = Cut.of(parameter.shape, parameter.unit_axis, like.device)
    totals = torch.zeros((4, parameter.units), dtype=torch.float64, device=like.device)
    squares = torch.zeros(2, dtype=torch.float64, device=like.device)
    for place in cut.places():
        slope, step = slopes.block(name, cut, place), steps.block(name, cut, place)
        squares[0] += torch.dot(slope.view(-1), slope.view(-1))
        squares[1] += torch.dot(step.view(-1), step.view(-1))
        lca, scratch = slope.mul_(step), step
        of_block = totals[:, place[1]]
        of_block[0] += lca.sum(dim=(0, 2))
        of_block[1] += torch.clamp_min(lca, 0, out=scratch).sum(dim=(0, 2))
        of_block[2] += torch.gt(lca, 0, out=scratch).sum(dim=(0, 2))
        of_block[3] += torch.eq(lca, 0, out=scratch).sum(dim=(0, 2))
    return [totals, squares]


def _unpacked(packed: npt.NDArray[Any]) -> ParameterSums:
    sums, positive_sums, positive_counts, zero_counts = packed[:-2].reshape(4, -1)
    gradient_norm, update_norm = (math.sqrt(square) for square in packed[-2:])
    product = gradient_norm * update_norm
    return ParameterSums(
        sum=sums,
        positive_sum=positive_sums,
        positive_count=positive_counts.astype("int64"),
        zero_count=zero_counts.astype("int64"),
        gradient_norm=gradient_norm,
        update_norm=update_norm,
        cosine=float(sums.sum()) / product if product else math.nan,
    )
