"""The parameter table turned into integer codes, once and early: everything after works on codes.

A group is a cell (layer, component) or a head of a cell (layer, attention component, head). Groups are numbered in
the C order of their axes, so that an array over groups becomes the cube's axes by one reshape.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from recorder.errors import FormatError
from replay.shards import ATTENTION_COMPONENTS, COMPONENTS, MODEL_LAYER, Parameter

if TYPE_CHECKING:
    import numpy.typing as npt

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
        added to the group ``codes[b]``. No code comes twice.
    """

    parameter: str
    codes: npt.NDArray[np.int64]


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
    not_recorded
        Array of shape (layers, components), int64: entries of parameters that the recording left out.
    """

    layers: tuple[Layer, ...]
    cells: Groups
    heads: Groups
    not_recorded: npt.NDArray[np.int64]


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

    def code(parameter: Parameter, components: Sequence[str]) -> int:
        return layer_code[parameter.layer] * len(components) + components.index(parameter.component)

    weights = [parameter for parameter in parameters if _has_heads(parameter)]
    heads = max((weight.heads for weight in weights), default=1)
    not_recorded = np.zeros((len(layers), len(COMPONENTS)), dtype=np.int64)
    for parameter in parameters:
        if parameter.status == "not_recorded":
            not_recorded.flat[code(parameter, COMPONENTS)] += parameter.size
    return Grouping(
        layers=layers,
        cells=_groups(
            (len(layers), len(COMPONENTS)),
            parameters,
            lambda parameter: np.array([code(parameter, COMPONENTS)], dtype=np.int64),
        ),
        heads=_groups(
            (len(layers), len(ATTENTION_COMPONENTS), heads),
            weights,
            lambda weight: code(weight, ATTENTION_COMPONENTS) * heads + np.arange(weight.heads, dtype=np.int64),
        ),
        not_recorded=not_recorded,
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
    return parameter.component in ATTENTION_COMPONENTS and parameter.heads > 0 and len(parameter.shape) >= 2


def _groups(
    shape: tuple[int, ...],
    parameters: Sequence[Parameter],
    codes_of: Callable[[Parameter], npt.NDArray[np.int64]],
) -> Groups:
    entries = np.zeros(math.prod(shape), dtype=np.int64)
    members = []
    for parameter in parameters:
        if parameter.trained:
            member = Member(parameter=parameter.name, codes=codes_of(parameter))
            entries[member.codes] += parameter.size // len(member.codes)
            members.append(member)
    return Groups(shape=shape, members=tuple(members), entries=entries.reshape(shape))
