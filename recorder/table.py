"""The parameter table: one row for every trainable tensor of a model, and the cell it belongs to.

The table is written into the run's manifest and copied into every folder of shards, so that whoever reads the
numbers knows which parameter is which without the model. Ground floor: imports no torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
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
COMPONENTS = (*ATTENTION_COMPONENTS, "W1", "W2", "embedding", "position", "norm", "output", "other")

Status = Literal["trained", "untrained", "not_recorded"]


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
        One of `COMPONENTS`. A bias belongs to its weight's component.
    unit_axis
        The axis whose slices are the parameter's units.
    heads
        Number of attention heads, 0 where the parameter has none. Head h is the h-th of `heads` equal blocks
        of consecutive units.
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

    def __post_init__(self) -> None:
        if self.component not in COMPONENTS:
            message = f"parameter {self.name!r}: component {self.component!r} is none of {', '.join(COMPONENTS)}"
            raise FormatError(message)
        if self.shape and not 0 <= self.unit_axis < len(self.shape):
            message = f"parameter {self.name!r}: unit axis {self.unit_axis} is not an axis of shape {self.shape}"
            raise FormatError(message)
        if self.heads and self.units % self.heads:
            message = f"parameter {self.name!r}: {self.units} units do not divide into {self.heads} heads"
            raise FormatError(message)

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
            Field name to value; without `model_dtype` where there is none to tell.
        """
        row = dataclasses.asdict(self)
        if self.model_dtype is None:
            del row["model_dtype"]
        return row

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
        return cls(**values)
