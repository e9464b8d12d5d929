"""Products of sets of tensors, entry by entry, summed over each tensor, over each of its parts, or over all.

Made a block at a time, as the sums over units are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from recorder.table import Parameter
from replay.blocks import Combination, Cut, bundles, combination, units_of


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
    right = combination(right)
    return _dots(combination(left), right, _cut(right))


class Projection:
    """Products of one set of tensors with others, one after another.

    Parameters
    ----------
    direction
        Name to tensor: made at once, for it is looked at again and again.
    parameters
        Rows of the ledger: where one tensor holds several components, its product is told of each part of it.
    """

    def __init__(self, direction: Mapping[str, torch.Tensor], parameters: Iterable[Parameter] = ()) -> None:
        direction = combination(direction)
        self._components = {
            row.name: _Components.of(row, direction.like[row.name].device) for row in parameters if row.fused
        }
        self._parts = [(names, parts or (direction[names[0]],)) for names, parts in _cut(direction)]
        made = {name: part for names, parts in self._parts for name, part in zip(names, parts, strict=True)}
        self._like = direction.like
        self._direction = Combination([(1.0, made)], self._like)

    def dots(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Multiply entry by entry, and sum over the entries of each tensor.

        Parameters
        ----------
        tensors
            Name to tensor: a name that is missing stands for zeros.

        Returns
        -------
        torch.Tensor
            As from `dots`, in the order of the direction; of a tensor that holds several components one number for
            each part of it, in their order.
        """
        return _dots(Combination([(1.0, tensors)], self._like), self._direction, self._parts, self._components)

    def of_each(self, reached: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tell apart what was added to a sum of sets of tensors, one set after another.

        Parameters
        ----------
        reached
            Products with the sum after each addition, as from `dots`; at least one.

        Returns
        -------
        dict of str to torch.Tensor
            By name in the order of the direction, float64: the products with each summand, of shape (summands,), or
            (summands, parts) where one tensor holds several components.
        """
        totals = torch.stack(list(reached))
        added = torch.diff(totals, dim=0, prepend=torch.zeros_like(totals[:1])).T
        found, used = {}, 0
        for name in self._direction:
            parts = len(self._components[name].units) if name in self._components else 1
            found[name] = added[used : used + parts].T if name in self._components else added[used]
            used += parts
        return found


@dataclasses.dataclass(frozen=True, slots=True)
class _Components:
    """A tensor that holds several components: entries before the unit axis, units, entries after it; units by part."""

    row: Parameter
    units: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, row: Parameter, device: torch.device) -> _Components:
        parts: list[list[int]] = [[] for _ in row.parts]
        first = 0
        for block in row.blocks:
            parts[block.part] += range(first, first + block.units)
            first += block.units
        return cls(row, tuple(torch.tensor(units, dtype=torch.int64, device=device) for units in parts))

    def sums(self, of_units: torch.Tensor) -> list[torch.Tensor]:
        return [of_units[units].sum() for units in self.units]

    def dots(self, left: torch.Tensor, right: torch.Tensor) -> list[torch.Tensor]:
        shape = units_of(self.row.shape, self.row.unit_axis)
        return self.sums((left * right).view(shape).sum(dim=(0, 2)))


_Part = tuple[list[str], tuple[torch.Tensor, ...]]
"""Names of tensors that share a block, and each of them as a vector; none of one that comes alone."""


def _cut(tensors: Combination) -> Iterator[_Part]:
    for names in bundles(tensors.like):
        sizes = [tensors.like[name].numel() for name in names]
        yield names, torch.split(tensors.joined(names), sizes) if len(names) > 1 else ()


def _dots(
    left: Combination, right: Combination, parts: Iterable[_Part], components: Mapping[str, _Components] | None = None
) -> torch.Tensor:
    components = components or {}
    sums: list[torch.Tensor] = []
    for names, of_right in parts:
        if len(names) == 1:
            name = names[0]
            sums += (
                _dots_of_parts(left, right, components[name])
                if name in components
                else [_dot_of_one(name, left, right)]
            )
            continue
        of_left = torch.split(left.joined(names), [len(part) for part in of_right])
        for name, one, other in zip(names, of_left, of_right, strict=True):
            sums += components[name].dots(one, other) if name in components else [torch.dot(one, other)]
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.float64)


def _dot_of_one(name: str, left: Combination, right: Combination) -> torch.Tensor:
    like = left.like[name]
    cut = Cut.of((like.numel(),), 0, like.device)
    products = [
        torch.dot(left.block(name, cut, place).view(-1), right.block(name, cut, place).view(-1))
        for place in cut.places()
    ]
    return products[0] if len(products) == 1 else _sum_of(products, like.device)


def _dots_of_parts(left: Combination, right: Combination, components: _Components) -> list[torch.Tensor]:
    row = components.row
    device = left.like[row.name].device
    cut = Cut.of(row.shape, row.unit_axis, device)
    of_units = torch.zeros(row.units, dtype=torch.float64, device=device)
    for place in cut.places():
        product = left.block(row.name, cut, place).mul_(right.block(row.name, cut, place))
        of_units[place[1]] += product.sum(dim=(0, 2))
    return components.sums(of_units)


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
    return unrounded(dots(left, right).tolist())


def unrounded(sums: Sequence[float]) -> float:
    """Add up numbers without rounding between them.

    Parameters
    ----------
    sums
        Any, also such as are not finite.

    Returns
    -------
    float
        Their sum.
    """
    # fsum raises where infinities of both signs meet; a diverged step has them.
    return math.fsum(sums) if all(map(math.isfinite, sums)) else sum(sums)
