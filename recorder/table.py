"""The parameter table: one row for every trainable tensor of a model, and the cell it belongs to.

The table is written into the run's manifest and copied into every folder of shards, so that whoever reads the
numbers knows which parameter is which without the model. Ground floor: imports no torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from recorder.errors import FormatError

MODEL_LAYER = "model"
"""The layer of every parameter outside any layer."""

ATTENTION_COMPONENTS = (
    "key",
    "query",
    "value",
    "out",
    "cross_key",
    "cross_query",
    "cross_value",
    "cross_out",
)
COMPONENTS = (*ATTENTION_COMPONENTS, "gate", "W1", "W2", "embedding", "position", "norm", "output", "other")
FUSED = "fused"
"""In place of a component where one tensor holds several: `Parameter.fused` says which."""

PLACE = ("layer", "stack", "depth", "component", "unit_axis", "heads", "fused", "repeats", "uses")
"""The fields of a row that say which parameter it is; the others say what was recorded."""

Status = Literal["trained", "untrained", "not_recorded"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Consecutive units of a parameter that belong to one component.

    Parameters
    ----------
    component
        One of `COMPONENTS`.
    units
        Number of units, in all repetitions together.
    heads
        Number of attention heads in them, 0 where they have none.
    """

    component: str
    units: int
    heads: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Consecutive units that belong to one component and, where it has heads, to one head.

    Parameters
    ----------
    part
        Position of their part in `Parameter.parts`.
    head
        Which head of the part; None where it has none.
    units
        Number of units.
    """

    part: int
    head: int | None
    units: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One trainable tensor and its place in the ledger.

    Parameters
    ----------
    name
        Its first name in ``model.named_parameters()``.
    aliases
        Its other names, where weights are tied.
    shape, dtype
        Of the recorded tensor, as torch prints them, the dtype without the prefix ``torch.``.
    model_dtype
        Dtype of the model's own tensor where it is another: ``float16`` where the optimizer updates, and the run
        records, a float32 master.
    status
        ``trained``; ``untrained`` for a tensor that never received a gradient; ``not_recorded`` for one that the user
        left out.
    layer
        ``encoder.0`` ... or `MODEL_LAYER`.
    stack, depth
        The two coordinates of the layer; ``model`` and -1 outside any layer.
    component
        One of `COMPONENTS`, or `FUSED`. A bias belongs to its weight's component.
    unit_axis
        The axis whose slices are the parameter's units.
    heads
        Number of attention heads, 0 where the parameter has none. Head h is the h-th of `heads` equal blocks
        of consecutive units. Those of a fused parameter stand in its parts.
    fused
        Where one tensor holds several components: its parts, in the order of its units.
    repeats
        How often the order of the parts repeats itself along the units: GPT-NeoX has query, key and value of the
        first head, then those of the second. Every repetition has an equal share of each part's units and heads.
    uses
        Where the tensor is tied and its names belong to several cells: a row for each, as if it were a parameter of its
        own. The first has the name of this row.
    tied_to
        In a row for one use: name of the parameter whose entries it shares, in all rows but that parameter's own.
    """

    name: str
    aliases: tuple[str, ...] = ()
    shape: tuple[int, ...]
    dtype: str
    model_dtype: str | None = None
    status: Status = "trained"
    layer: str = MODEL_LAYER
    stack: str = MODEL_LAYER
    depth: int = -1
    component: str = "other"
    unit_axis: int = 0
    heads: int = 0
    fused: tuple[Part, ...] = ()
    repeats: int = 1
    uses: tuple[Parameter, ...] = ()
    tied_to: str | None = None

    def __post_init__(self) -> None:
        if self.shape and not 0 <= self.unit_axis < len(self.shape):
            message = f"parameter {self.name!r}: unit axis {self.unit_axis} is not an axis of shape {self.shape}"
            raise FormatError(message)
        if (self.component == FUSED) != bool(self.fused) or (self.fused and self.heads):
            message = (
                f"parameter {self.name!r}: expected component {FUSED!r} and no heads where it has parts, and only "
                f"there; found component {self.component!r}, {len(self.fused)} parts, {self.heads} heads"
            )
            raise FormatError(message)
        for part in self.parts:
            self._check(part)
        if sum(part.units for part in self.parts) != self.units:
            message = (
                f"parameter {self.name!r}: its parts have {' + '.join(str(part.units) for part in self.parts)} units, "
                f"but it has {self.units}"
            )
            raise FormatError(message)
        self._check_uses()

    def _check(self, part: Part) -> None:
        if part.component not in COMPONENTS:
            message = f"parameter {self.name!r}: component {part.component!r} is none of {', '.join(COMPONENTS)}"
            raise FormatError(message)
        if part.heads and part.units % part.heads:
            message = f"parameter {self.name!r}: {part.units} units do not divide into {part.heads} heads"
            raise FormatError(message)
        if self.repeats < 1 or part.units % self.repeats or part.heads % self.repeats:
            message = (
                f"parameter {self.name!r}: {part.units} units in {part.heads} heads of component {part.component!r} "
                f"do not divide into {self.repeats} repetitions"
            )
            raise FormatError(message)

    def _check_uses(self) -> None:
        if not self.uses:
            return
        first, *others = self.uses
        tied_to = [use.tied_to for use in others]
        if first.name != self.name or first.tied_to or any(name != self.name for name in tied_to) or not others:
            message = (
                f"parameter {self.name!r}: expected two uses or more, the first of this name and the others tied to "
                f"it, found {[(use.name, use.tied_to) for use in self.uses]}"
            )
            raise FormatError(message)
        if any(use.shape != self.shape or use.uses for use in self.uses):
            message = f"parameter {self.name!r}: its uses must have its shape {self.shape}, and no uses themselves"
            raise FormatError(message)

    @property
    def parts(self) -> tuple[Part, ...]:
        """What its units hold: those of `fused`, or the whole as one."""
        return self.fused or (Part(component=self.component, units=self.units, heads=self.heads),)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Its units from first to last, cut where component or head changes."""
        return tuple(self._blocks())

    def _blocks(self) -> Iterator[Block]:
        for repetition in range(self.repeats):
            for number, part in enumerate(self.parts):
                units, heads = part.units // self.repeats, part.heads // self.repeats
                if not heads:
                    yield Block(part=number, head=None, units=units)
                for head in range(heads):
                    yield Block(part=number, head=repetition * heads + head, units=units // heads)

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def units(self) -> int:
        """Number of units; a 0-d parameter is one unit."""
        return self.shape[self.unit_axis] if self.shape else 1

    @property
    def computed_dtype(self) -> str:
        """Dtype that training computed with: the model's own."""
        return self.model_dtype or self.dtype

    @property
    def trained(self) -> bool:
        """Whether the parameter ever received a gradient, and so is in the ledger."""
        return self.status == "trained"

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain JSON types.

        Returns
        -------
        dict
            Field name to value; without those of few parameters where there is nothing to tell: `model_dtype`,
            `fused`, `repeats`, `uses`, `tied_to`.
        """
        row = dataclasses.asdict(self)
        row["uses"] = [use.to_dict() for use in self.uses]
        untold: dict[str, Any] = {"model_dtype": None, "fused": (), "repeats": 1, "uses": [], "tied_to": None}
        return {name: value for name, value in row.items() if name not in untold or value != untold[name]}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Parameter:
        """Build a row from what `to_dict` gave and JSON kept.

        Parameters
        ----------
        row
            Field name to value.

        Returns
        -------
        Parameter
            The row.

        Raises
        ------
        FormatError
            If a field is missing or unknown.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        missing = {"name", "shape", "dtype"} - set(row)
        unknown = set(row) - known
        if missing or unknown:
            message = (
                f"parameter table, row {row.get('name', '?')!r}: missing fields {sorted(missing)}, "
                f"unknown fields {sorted(unknown)}"
            )
            raise FormatError(message)
        values = dict(row)
        values["shape"] = tuple(values["shape"])
        values["aliases"] = tuple(values.get("aliases", ()))
        try:
            values["fused"] = tuple(Part(**part) for part in values.get("fused", ()))
        except TypeError as error:
            message = f"parameter table, row {row['name']!r}: a part is not understood ({error})"
            raise FormatError(message) from error
        values["uses"] = tuple(cls.from_dict(use) for use in values.get("uses", ()))
        return cls(**values)


def split_by_use(parameters: Iterable[Parameter]) -> tuple[Parameter, ...]:
    """Put in place of every tied parameter its uses.

    Parameters
    ----------
    parameters
        Rows of a parameter table.

    Returns
    -------
    tuple of Parameter
        In the same order; a parameter that has no `uses` as it is. A use has the status of its parameter.
    """
    return tuple(
        dataclasses.replace(use, status=parameter.status)
        for parameter in parameters
        for use in parameter.uses or (parameter,)
    )


def place_of(parameter: Parameter) -> dict[str, Any]:
    """Take of a row what says which parameter it is.

    Parameters
    ----------
    parameter
        The row.

    Returns
    -------
    dict
        The fields of `PLACE` as plain JSON types.
    """
    return {name: value for name, value in parameter.to_dict().items() if name in PLACE}


def with_place(parameter: Parameter, place: Mapping[str, Any]) -> Parameter:
    """Put another place into a row.

    Parameters
    ----------
    parameter
        The row.
    place
        As `place_of` gives it. A `FormatError` tells if it does not fit the row.

    Returns
    -------
    Parameter
        The row with it; name, shape, dtypes, aliases and status stay.
    """
    rest = {name: value for name, value in parameter.to_dict().items() if name not in PLACE}
    return Parameter.from_dict({**rest, **place})
