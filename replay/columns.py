"""What a shard holds of every step: its arrays, with their dtypes and shapes.

Part of the shard format (docs/formats/shards.md); imports no torch.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from recorder.table import Parameter


class Status(enum.IntEnum):
    """How an entry came about: one for every step and loss data."""

    CONVERGED = 0
    TOLERANCE_NOT_MET = 1
    NOT_FINITE = 2
    NOT_CHECKED = 3


PER_STEP = {
    "step": np.int64,
    "epoch": np.int64,
    "lr": np.float64,
    "predictions": np.int64,
    "weight": np.float64,
    "loss_start": np.float64,
    "loss_end": np.float64,
    "residual": np.float64,
    "tolerance": np.float64,
    "status": np.uint8,
    "evaluations": np.int64,
}
"""Arrays of shape (steps,) in every shard, with their dtypes.

``epoch``, ``lr`` and ``predictions`` are those of the recorded update; ``weight`` is the number of predictions that the
loss on the shard's loss data is averaged over; the losses, the residual and the tolerance, the
largest residual of a balanced entry, are in nats on the shard's loss data; ``evaluations`` counts gradient evaluations.
"""

PER_UNIT = {"sum": np.float64, "positive_sum": np.float64, "positive_count": np.int64, "zero_count": np.int64}
"""Arrays of shape (steps, units) for every trained parameter, named ``<quantity>/<parameter name>``."""

PER_PARAMETER = {"gradient_norm": np.float64, "update_norm": np.float64, "cosine": np.float64}
"""Arrays of shape (steps,) for every trained parameter, named ``<quantity>/<parameter name>``.

The gradient is its mean along the step, so that the product of the three is the parameter's LCA.
"""


SPREAD, COUNTS = "spread", "counts"


def spread_shape(row: Parameter, counts: tuple[int, ...]) -> tuple[int, ...]:
    """Tell the shape of a parameter's spread.

    Parameters
    ----------
    row
        The parameter.
    counts
        Shape of the numbers of predictions: (steps, micro-batches).

    Returns
    -------
    tuple of int
        The same, and where one tensor holds several components the number of its parts besides.
    """
    return (*counts, len(row.parts)) if row.fused else counts


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """The content of one shard.

    Parameters
    ----------
    per_step
        Name to array of shape (steps,); the names and dtypes of `PER_STEP`.
    per_unit
        Quantity to parameter name to array of shape (steps, units); the quantities and dtypes of `PER_UNIT`.
    per_parameter
        Quantity to parameter name to array of shape (steps,); the quantities and dtypes of `PER_PARAMETER`.
    spread
        On sampled loss data: parameter name to array of `spread_shape`, float64: what every micro-batch gives to the
        parameter's LCA, times all predictions, at one node in the middle of the step.
    counts
        On sampled loss data the predictions of every micro-batch, float64 of shape (steps, micro-batches); else None.
    pieces
        Of each step where a micro-batch did not fit into memory: in how many pieces the most divided one was computed.
    """

    per_step: Mapping[str, npt.NDArray[Any]]
    per_unit: Mapping[str, Mapping[str, npt.NDArray[Any]]]
    per_parameter: Mapping[str, Mapping[str, npt.NDArray[Any]]]
    spread: Mapping[str, npt.NDArray[Any]] = dataclasses.field(default_factory=dict)
    counts: npt.NDArray[Any] | None = None
    pieces: Mapping[int, int] = dataclasses.field(default_factory=dict)

    def before(self, end: int) -> Shard:
        """Take of a shard what comes before a step.

        Parameters
        ----------
        end
            The step.

        Returns
        -------
        Shard
            Of the steps before it.
        """
        steps = int((self.per_step["step"] < end).sum())
        return Shard(
            per_step=_first(steps, self.per_step),
            per_unit={quantity: _first(steps, rows) for quantity, rows in self.per_unit.items()},
            per_parameter={quantity: _first(steps, rows) for quantity, rows in self.per_parameter.items()},
            spread=_first(steps, self.spread),
            counts=None if self.counts is None else self.counts[:steps],
            pieces={step: number for step, number in self.pieces.items() if step < end},
        )


def _first(steps: int, rows: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    return {name: values[:steps] for name, values in rows.items()}
