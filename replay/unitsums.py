"""Sums of LCA over the units of every parameter, in one pass over memory.

The two parameter sets of a step and the gradients on the way are read once, in blocks small enough to stay in a
processor's cache; nothing of the parameters' size is written. On a model of tens of millions of parameters the sums
would wait for the memory otherwise, not for arithmetic.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from recorder.table import Parameter

if TYPE_CHECKING:
    import numpy.typing as npt

BLOCK = 1 << 17
"""Entries in a block on a CPU: a megabyte in float64."""

Place = tuple[slice, slice]


@dataclasses.dataclass(frozen=True, slots=True)
class Cut:
    """A tensor looked at as an array of shape (before, units, after), and cut into blocks of whole rows.

    Parameters
    ----------
    shape
        Entries before the unit axis, units, entries after it.
    rows
        Length of a block along the axis that is cut: the units where nothing stands before them, else the first.
    """

    shape: tuple[int, int, int]
    rows: int

    @classmethod
    def of(cls, shape: Sequence[int], unit_axis: int, device: torch.device) -> Cut:
        """Cut tensors of one shape.

        Parameters
        ----------
        shape
            Of the tensor.
        unit_axis
            The axis whose slices are summed.
        device
            A GPU takes a tensor whole: starting its work costs more than its memory does.

        Returns
        -------
        Cut
            The same for every step, so that the order of all sums is too.
        """
        before, units, after = math.prod(shape[:unit_axis]), 1, math.prod(shape[unit_axis + 1 :])
        if shape:
            units = shape[unit_axis]
        if device.type != "cpu":
            return cls((before, units, after), max(before, units, 1))
        row = after if before == 1 else units * after
        return cls((before, units, after), max(1, BLOCK // max(row, 1)))

    def places(self) -> Iterator[Place]:
        """Yield where each block lies.

        Yields
        ------
        (slice, slice)
            Along the first two axes of `shape`.
        """
        before, units, _ = self.shape
        for first in range(0, units if before == 1 else before, self.rows):
            part = slice(first, first + self.rows)
            yield (slice(None), part) if before == 1 else (part, slice(None))


class Combination(Mapping[str, torch.Tensor]):
    """A weighted sum of sets of tensors, in float64, made only where it is looked at.

    The mean gradient along a step is one, and so is the update: the end minus the start.

    Parameters
    ----------
    terms
        Weights, and name to tensor or another combination: a name that is missing stands for zeros.
    like
        A tensor of the right shape for every name.
    """

    def __init__(
        self, terms: Sequence[tuple[float, Mapping[str, torch.Tensor]]], like: Mapping[str, torch.Tensor]
    ) -> None:
        self._terms = tuple(_plain(terms))
        self.like: Mapping[str, torch.Tensor] = like.like if isinstance(like, Combination) else like

    def __getitem__(self, name: str) -> torch.Tensor:
        whole = Cut((1, 1, self.like[name].numel()), 1)
        return self.block(name, whole, (slice(None), slice(None))).view(self.like[name].shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.like)

    def __len__(self) -> int:
        return len(self.like)

    def __contains__(self, name: object) -> bool:
        return name in self.like

    @property
    def terms(self) -> tuple[tuple[float, Mapping[str, torch.Tensor]], ...]:
        """Weights and sets of tensors, none of them a combination."""
        return self._terms

    def block(self, name: str, cut: Cut, place: Place) -> torch.Tensor:
        """Make one block of the sum.

        Parameters
        ----------
        name
            Of the tensor.
        cut
            How it is looked at.
        place
            One of the cut's places.

        Returns
        -------
        torch.Tensor
            float64, in memory of its own.
        """
        total: torch.Tensor | None = None
        for weight, tensors in self._terms:
            if name not in tensors:
                continue
            part = tensors[name].reshape(cut.shape)[place]
            if total is None:
                total = part.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
                if weight != 1:
                    total.mul_(weight)
            else:
                total.add_(part, alpha=weight)
        if total is None:
            total = torch.zeros_like(self.like[name].reshape(cut.shape)[place], dtype=torch.float64)
        return total


def _plain(
    terms: Iterable[tuple[float, Mapping[str, torch.Tensor]]],
) -> Iterator[tuple[float, Mapping[str, torch.Tensor]]]:
    for weight, tensors in terms:
        if isinstance(tensors, Combination):
            yield from ((weight * inner, of_inner) for inner, of_inner in tensors.terms)
        else:
            yield weight, tensors


def combination(tensors: Mapping[str, torch.Tensor]) -> Combination:
    """Take a set of tensors as a combination.

    Parameters
    ----------
    tensors
        Name to tensor, or a combination already.

    Returns
    -------
    Combination
        Of these tensors.
    """
    return tensors if isinstance(tensors, Combination) else Combination([(1.0, tensors)], tensors)


def dots(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Multiply two sets of tensors entry by entry, and sum over the entries of each tensor.

    Parameters
    ----------
    left, right
        Name to tensor, of the same names and shapes.

    Returns
    -------
    torch.Tensor
        float64 of shape (names,), on the tensors' device, in the order of `left`.
    """
    left, right = combination(left), combination(right)
    sums = []
    for name, like in left.like.items():
        cut = Cut.of((like.numel(),), 0, like.device)
        products = [
            torch.dot(left.block(name, cut, place).view(-1), right.block(name, cut, place).view(-1))
            for place in cut.places()
        ]
        sums.append(products[0] if len(products) == 1 else _sum_of(products, like.device))
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.float64)


def _sum_of(products: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    return torch.stack(products).sum() if products else torch.zeros((), dtype=torch.float64, device=device)


def dot(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> float:
    """Multiply two sets of tensors entry by entry, and sum it all up.

    Parameters
    ----------
    left, right
        As for `dots`.

    Returns
    -------
    float
        Without rounding between tensors. Not finite where an entry is not.
    """
    sums: list[float] = dots(left, right).tolist()
    # fsum raises where infinities of both signs meet; a diverged step has them.
    return math.fsum(sums) if all(map(math.isfinite, sums)) else sum(sums)


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
    packed = [_packed_sums(parameter, slopes, steps) for parameter in parameters]
    # One transfer for all parameters, where they are on a GPU.
    flat = torch.cat(packed).cpu().numpy() if packed else None
    found, used = {}, 0
    for parameter, sums in zip(parameters, packed, strict=True):
        assert flat is not None
        found[parameter.name] = _unpacked(flat[used : used + len(sums)])
        used += len(sums)
    return found


def _packed_sums(parameter: Parameter, slopes: Combination, steps: Combination) -> torch.Tensor:
    # Four sums for every unit, then the squares of both norms. Counts in float64 are exact, and summed several times
    # faster than booleans are.
    name = parameter.name
    like = slopes.like[name]
    cut = Cut.of(parameter.shape, parameter.unit_axis, like.device)
    packed = torch.zeros(4 * parameter.units + 2, dtype=torch.float64, device=like.device)
    totals, squares = packed[:-2].view(4, parameter.units), packed[-2:]
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
    return packed


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
