"""The parameter table turned into integer codes, once and early: everything after works on codes.

A group is a cell (layer, component) or a head of a cell (layer, attention component, head). Groups are numbered in
the C order of their axes, so that an array over groups becomes the cube's axes by one reshape.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from recorder.errors import FormatError
from replay.shards import ATTENTION_COMPONENTS, COMPONENTS, MODEL_LAYER, Parameter

if TYPE_CHECKING:
    import numpy.typing as npt

NO_GROUP = -1
_FIRST_STACKS = ("encoder", "decoder")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One layer of the model.

    Parameters
    ----------
    name
        Such as ``encoder.0``, or `MODEL_LAYER` for the parameters outside any layer.
    stack, depth
        Its two parts; `MODEL_LAYER` and -1 outside any layer.
    """

    name: str
    stack: str
    depth: int

    @property
    def _order(self) -> tuple[bool, int, str, int, str]:
        rank = _FIRST_STACKS.index(self.stack) if self.stack in _FIRST_STACKS else len(_FIRST_STACKS)
        return (self.name == MODEL_LAYER, rank, self.stack, self.depth, self.name)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Member:
    """A trained parameter's part in a set of groups.

    Parameters
    ----------
    parameter
        Its name.
    codes
        Array of shape (blocks,), int64: its units fall into this many equal consecutive blocks, and block b is
        added to the group ``codes[b]``; to none where that is `NO_GROUP`.
    """

    parameter: str
    codes: npt.NDArray[np.int64]

    @property
    def distinct(self) -> bool:
        """Whether every block has a group, and each another."""
        return bool((self.codes != NO_GROUP).all()) and len(np.unique(self.codes)) == len(self.codes)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Groups:
    """A set of groups and what is added up into each.

    Parameters
    ----------
    shape
        Lengths of the axes of the groups.
    members
        The parameters that take part.
    entries
        Array of `shape`, int64: number of entries in each group; 0 where there is no such group.
    """

    shape: tuple[int, ...]
    members: tuple[Member, ...]
    entries: npt.NDArray[np.int64]

    @property
    def size(self) -> int:
        """Number of groups."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Grouping:
    """All groups of a parameter table.

    Parameters
    ----------
    layers
        The layers in the cube's order.
    cells
        Groups of shape (layers, components). Every trained parameter is in exactly one.
    heads
        Groups of shape (layers, attention components, heads). Only attention weights are members: a bias is no
        slice of its weight's head, so it counts in `cells` alone.
    parts
        Parameter name to the cells of its parts, in the order of `Parameter.parts`: array of shape (parts,), int64.
    not_recorded
        Array of shape (layers, components), int64: entries of parameters that the recording left out.
    tied
        Array of shape (layers, components), int64: entries that are in another cell, too, for another use of the same
        tied parameter. Without them the entries of all cells are those of the model.
    """

    layers: tuple[Layer, ...]
    cells: Groups
    heads: Groups
    parts: Mapping[str, npt.NDArray[np.int64]]
    not_recorded: npt.NDArray[np.int64]
    tied: npt.NDArray[np.int64]


def grouping(parameters: Sequence[Parameter]) -> Grouping:
    """Assign every trained parameter of a table to its groups.

    Layers that hold untrained parameters only keep their place on the layer axis, as do their heads.

    Parameters
    ----------
    parameters
        The run's parameter table.

    Returns
    -------
    Grouping
        The groups. The head axis is at least one long, because netCDF takes a length of zero for an unlimited
        dimension.
    """
    layers = _layers(parameters)
    layer_code = {layer.name: code for code, layer in enumerate(layers)}

    def codes_of_parts(parameter: Parameter, components: Sequence[str]) -> list[int]:
        # Where a part is of none of the components, the parameter has no heads there.
        first = layer_code[parameter.layer] * len(components)
        names = [part.component for part in parameter.parts]
        return [first + components.index(name) if name in components else NO_GROUP for name in names]

    def cells_of(parameter: Parameter) -> list[int]:
        codes = codes_of_parts(parameter, COMPONENTS)
        return [codes[block.part] for block in parameter.blocks]

    def heads_of(weight: Parameter) -> list[int]:
        codes = codes_of_parts(weight, ATTENTION_COMPONENTS)
        return [
            NO_GROUP if block.head is None or codes[block.part] == NO_GROUP else codes[block.part] * heads + block.head
            for block in weight.blocks
        ]

    weights = [parameter for parameter in parameters if _has_heads(parameter)]
    heads = max((part.heads for weight in weights for part in weight.parts), default=1)
    cells = (len(layers), len(COMPONENTS))
    trained = [parameter for parameter in parameters if parameter.trained]
    return Grouping(
        layers=layers,
        cells=_groups(cells, parameters, cells_of),
        heads=_groups((len(layers), len(ATTENTION_COMPONENTS), heads), weights, heads_of),
        parts={row.name: np.array(codes_of_parts(row, COMPONENTS), dtype=np.int64) for row in trained},
        not_recorded=_entries(cells, [row for row in parameters if row.status == "not_recorded"], cells_of),
        tied=_entries(cells, [row for row in trained if row.tied_to is not None], cells_of),
    )


def _layers(parameters: Sequence[Parameter]) -> tuple[Layer, ...]:
    layers: dict[str, Layer] = {}
    for parameter in parameters:
        layer = Layer(name=parameter.layer, stack=parameter.stack, depth=parameter.depth)
        first = layers.setdefault(layer.name, layer)
        if first != layer:
            message = (
                f"parameter {parameter.name!r}: expected layer {layer.name!r} to be stack {first.stack!r} depth "
                f"{first.depth} as before it in the table, found stack {layer.stack!r} depth {layer.depth}"
            )
            raise FormatError(message)
    return tuple(sorted(layers.values(), key=lambda layer: layer._order))


def _has_heads(parameter: Parameter) -> bool:
    with_heads = any(part.component in ATTENTION_COMPONENTS and part.heads for part in parameter.parts)
    return with_heads and len(parameter.shape) >= 2


def _groups(
    shape: tuple[int, ...], parameters: Sequence[Parameter], codes_of: Callable[[Parameter], list[int]]
) -> Groups:
    trained = [parameter for parameter in parameters if parameter.trained]
    members = tuple(_member(parameter, codes_of(parameter)) for parameter in trained)
    return Groups(shape=shape, members=members, entries=_entries(shape, trained, codes_of))


def _member(parameter: Parameter, codes: Sequence[int]) -> Member:
    # Neighbouring blocks of one group are one block, and then all are cut to the length that divides them all.
    lengths: list[tuple[int, int]] = []
    for code, block in zip(codes, parameter.blocks, strict=True):
        if lengths and lengths[-1][0] == code:
            lengths[-1] = (code, lengths[-1][1] + block.units)
        else:
            lengths.append((code, block.units))
    length = math.gcd(*(units for _, units in lengths)) or 1
    equal = [code for code, units in lengths for _ in range(units // length or 1)]
    return Member(parameter=parameter.name, codes=np.array(equal, dtype=np.int64))


def _entries(
    shape: tuple[int, ...], parameters: Sequence[Parameter], codes_of: Callable[[Parameter], list[int]]
) -> npt.NDArray[np.int64]:
    entries = np.zeros(math.prod(shape), dtype=np.int64)
    for parameter in parameters:
        of_unit = parameter.size // parameter.units if parameter.units else 0
        for code, block in zip(codes_of(parameter), parameter.blocks, strict=True):
            if code != NO_GROUP:
                entries[code] += block.units * of_unit
    return entries.reshape(shape)
