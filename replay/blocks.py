"""Weighted sums of sets of tensors, made a block at a time where they are looked at.

A large tensor is cut into blocks small enough to stay in a processor's cache, and small tensors that follow each other
share one: for a net of small tensors the calls would cost more than the arithmetic.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

BLOCK = 1 << 17
"""Entries in a block on a CPU: a megabyte in float64."""

SHARED_ON_GPU = 1 << 22
"""Entries of small tensors that share a block on a GPU, where starting its work costs more than memory does."""

Place = tuple[slice, slice]


def units_of(shape: Sequence[int], unit_axis: int) -> tuple[int, int, int]:
    """Look at a tensor as an array of three axes, of which the second is the unit axis.

    Parameters
    ----------
    shape
        Of the tensor; one of no axes is one unit.
    unit_axis
        The axis whose slices are summed.

    Returns
    -------
    (int, int, int)
        Entries before the unit axis, units, entries after it.
    """
    units = shape[unit_axis] if shape else 1
    return math.prod(shape[:unit_axis]), units, math.prod(shape[unit_axis + 1 :])


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
        before, units, after = units_of(shape, unit_axis)
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


def bundles(like: Mapping[str, torch.Tensor]) -> Iterator[list[str]]:
    """Group tensors that follow each other and fit into one block.

    Parameters
    ----------
    like
        Name to tensor.

    Yields
    ------
    list of str
        Names, in order. A tensor that fills a block by itself comes alone.
    """
    names: list[str] = []
    entries = 0
    for name, tensor in like.items():
        size = tensor.numel()
        if names and entries + size > (BLOCK if tensor.device.type == "cpu" else SHARED_ON_GPU):
            yield names
            names, entries = [], 0
        names.append(name)
        entries += size
    if names:
        yield names


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

    def joined(self, names: Sequence[str]) -> torch.Tensor:
        """Make the sum of several tensors, one after the other in one vector.

        Parameters
        ----------
        names
            Of the tensors.

        Returns
        -------
        torch.Tensor
            float64 of shape (entries,), in memory of its own; the same bits as `block` makes.
        """
        total: torch.Tensor | None = None
        for weight, tensors in self._terms:
            pieces = [
                tensors[name].reshape(-1) if name in tensors else torch.zeros_like(self.like[name]).view(-1)
                for name in names
            ]
            part = torch.cat(pieces)
            if total is None:
                total = part.to(torch.float64)
                if weight != 1:
                    total.mul_(weight)
            else:
                total.add_(part, alpha=weight)
        if total is None:
            total = torch.cat([torch.zeros_like(self.like[name], dtype=torch.float64).view(-1) for name in names])
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
