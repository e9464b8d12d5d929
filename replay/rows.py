"""A shard in the making: one row of it for every step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from recorder.steps import Step
from recorder.table import Parameter
from replay.allocation import Allocation
from replay.columns import PER_PARAMETER, PER_STEP, PER_UNIT, Shard, spread_shape
from replay.tolerance import Tolerance
from replay.unitsums import total_of

if TYPE_CHECKING:
    import numpy.typing as npt


class Rows:
    """The rows of one shard.

    Parameters
    ----------
    steps
        How many.
    trained
        The parameters in the ledger.
    tolerance
        Decides the status of every row.
    """

    def __init__(self, steps: int, trained: Sequence[Parameter], tolerance: Tolerance) -> None:
        self._steps, self._trained, self._tolerance = steps, trained, tolerance
        self._filled = 0
        self._per_step: dict[str, npt.NDArray[Any]] = {name: np.zeros(steps, dtype) for name, dtype in PER_STEP.items()}
        self._per_unit: dict[str, dict[str, npt.NDArray[Any]]] = {
            quantity: {parameter.name: np.zeros((steps, parameter.units), dtype) for parameter in trained}
            for quantity, dtype in PER_UNIT.items()
        }
        self._per_parameter: dict[str, dict[str, npt.NDArray[Any]]] = {
            quantity: {parameter.name: np.zeros(steps, dtype) for parameter in trained}
            for quantity, dtype in PER_PARAMETER.items()
        }
        self._spread: dict[str, npt.NDArray[Any]] = {}
        self._counts: npt.NDArray[Any] | None = None
        self._pieces: dict[int, int] = {}

    def add(self, step: Step, allocation: Allocation) -> None:
        """Fill the next row.

        Parameters
        ----------
        step
            The recorded step.
        allocation
            Its ledger.
        """
        row = self._filled
        self._filled += 1
        summed = allocation.sums(self._trained)
        if allocation.total is None:
            allocation = dataclasses.replace(allocation, total=total_of(summed))
        residual, predictions = allocation.residual, step.predictions
        entries: dict[str, float] = {
            "step": step.step,
            "epoch": step.epoch,
            "lr": step.learning_rates[0],
            "predictions": 0 if math.isnan(predictions) else round(predictions),
            "weight": allocation.predictions,
            "loss_start": allocation.loss_start,
            "loss_end": allocation.loss_end,
            "residual": residual,
            "tolerance": self._tolerance.allowed(allocation.loss_start, allocation.loss_end, allocation.predictions),
            "status": allocation.status(self._tolerance),
            "evaluations": allocation.evaluations,
        }
        for key, value in entries.items():
            self._per_step[key][row] = value
        for name, sums in summed.items():
            for quantity in PER_UNIT:
                self._per_unit[quantity][name][row] = getattr(sums, quantity)
            for quantity in PER_PARAMETER:
                self._per_parameter[quantity][name][row] = getattr(sums, quantity)
        if allocation.pieces > 1:
            self._pieces[step.step] = allocation.pieces
        if allocation.spread is not None:
            self._add_spread(row, allocation)

    def _add_spread(self, row: int, allocation: Allocation) -> None:
        assert allocation.spread is not None
        if self._counts is None:
            shape = (self._steps, len(allocation.counts))
            self._counts = np.zeros(shape)
            self._spread = {row.name: np.zeros(spread_shape(row, shape)) for row in self._trained}
        self._counts[row] = allocation.counts
        for name, values in allocation.spread.items():
            self._spread[name][row] = values.cpu().numpy()

    def shard(self) -> Shard:
        """Return the shard, all rows filled.

        Returns
        -------
        Shard
            Ready to be written.
        """
        return Shard(
            per_step=self._per_step,
            per_unit=self._per_unit,
            per_parameter=self._per_parameter,
            spread=self._spread,
            counts=self._counts,
            pieces=self._pieces,
        )
