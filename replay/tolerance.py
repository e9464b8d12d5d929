"""When the books of a step balance."""

from __future__ import annotations

import dataclasses
import math

from replay.columns import Status
from replay.precision import EXACT, Rounding


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """When the books balance: |residual| ≤ rtol · |ΔL| + atol + the rounding floor.

    Parameters
    ----------
    rtol
        Relative to the measured change of the loss.
    atol
        In nats.
    rounding
        The rounding floor, relative to the larger of the two losses: what lies below is rounding, which no refinement
        takes away.
    """

    rtol: float
    atol: float
    rounding: Rounding = EXACT

    def allowed(self, loss_start: float, loss_end: float, predictions: float) -> float:
        """Return the largest |residual| of a balanced entry.

        Parameters
        ----------
        loss_start, loss_end
            The measured losses, in nats.
        predictions
            What they are averaged over.

        Returns
        -------
        float
            In nats; NaN or infinite where the losses are.
        """
        floor = self.rounding.over(predictions) * max(abs(loss_start), abs(loss_end))
        return self.rtol * abs(loss_end - loss_start) + self.atol + floor

    def status(self, residual: float, loss_start: float, loss_end: float, predictions: float) -> Status:
        """Judge one entry.

        Parameters
        ----------
        residual
            Σ LCA - ΔL, in nats.
        loss_start, loss_end
            The measured losses, in nats.
        predictions
            What they are averaged over.

        Returns
        -------
        Status
            Converged, tolerance not met, or not finite.
        """
        if not (math.isfinite(residual) and math.isfinite(loss_end - loss_start)):
            return Status.NOT_FINITE
        within = abs(residual) <= self.allowed(loss_start, loss_end, predictions)
        return Status.CONVERGED if within else Status.TOLERANCE_NOT_MET
