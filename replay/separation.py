"""Whether the uses of tied weights can be told apart: found out on one micro-batch, before the work.

A model that ties its weights anew in every pass, or reads a tied tensor by another name than its module's, would let
all gradient reach one use and none the other. So the first step's loss must be the same without the tie, to the bit; a
gradient must reach every use; and together they must be the gradient of the tied tensor, within rounding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from replay.work import Replayer, replayer

if TYPE_CHECKING:
    from recorder.runformat import Run
    from recorder.table import Parameter
    from replay.job import Job

ROUNDING = 8
"""Spacings by which the gradients of the uses, added up, may miss that of the tied tensor, relative to their norms."""


def opened_by_use(job: Job, run: Run) -> tuple[Replayer, list[str]]:
    """Open a run for replay, the uses of its tied weights told apart where they can be.

    Parameters
    ----------
    job
        What to do.
    run
        The run as it is now: an earlier replay of this process may have opened it when it held less.

    Returns
    -------
    opened : Replayer
        Ready to work. Its job names the parameters that stay whole, so that all workers have the same ledger.
    found : list of str
        What became of each tied parameter, in sentences for the user.
    """
    opened = replayer(job)
    opened.take_up(run)
    reasons = _why_inseparable(opened)
    if reasons:
        opened = replayer(dataclasses.replace(job, whole=(*job.whole, *reasons)))
        opened.take_up(run)
    uses = _uses(opened.trained)
    return opened, [
        *(f"tied weights {rows[0].name!r} told apart: {', '.join(row.component for row in rows)}" for rows in uses),
        *(f"tied weights {name!r} stay whole, for {reason}" for name, reason in reasons.items()),
    ]


def _uses(trained: Iterable[Parameter]) -> list[list[Parameter]]:
    # The rows of each parameter whose uses are told apart, its own first.
    rows = {row.name: [row] for row in trained if row.tied_to is None}
    for row in trained:
        if row.tied_to is not None:
            rows[row.tied_to].append(row)
    return [found for found in rows.values() if len(found) > 1]


def _why_inseparable(opened: Replayer) -> dict[str, str]:
    # Name of a tied parameter to the reason why its uses cannot be told apart.
    surface, run = opened.surface, opened.run
    reasons = dict(surface.inseparable)
    uses = {rows[0].name: rows for rows in _uses(opened.trained) if rows[0].name not in reasons}
    if not uses:
        return reasons
    t, loss_data = run.steps[0], opened.measuring.evaluated(next(iter(opened.loss_data)))[0]
    with surface.together():
        tied = opened.evaluate(t, loss_data, most=1)
    try:
        apart = opened.evaluate(t, loss_data, most=1)
    except Exception as error:  # whatever a model raises that looks for its tie
        return reasons | dict.fromkeys(uses, f"without the tie the model fails ({type(error).__name__}: {error})")
    if apart.loss != tied.loss and not (math.isnan(apart.loss) and math.isnan(tied.loss)):
        reason = f"without the tie the loss of step {t} is {apart.loss!r} where it was {tied.loss!r}"
        return reasons | dict.fromkeys(uses, reason)
    for name, rows in uses.items():
        names = [row.name for row in rows]
        reason = _why_not_the_sum(tied.gradient, apart.gradient, names, opened.precision.epsilon)
        if reason:
            reasons[name] = reason
    return reasons


def _why_not_the_sum(
    tied: Mapping[str, torch.Tensor], apart: Mapping[str, torch.Tensor], uses: list[str], epsilon: float
) -> str:
    unreached = [use for use in uses if use not in apart]
    if unreached:
        return f"in the first step no gradient reaches it as {unreached[0]!r}"
    parts = [apart[use].double() for use in uses]
    difference = float(torch.linalg.vector_norm(sum(parts[1:], start=parts[0]) - tied[uses[0]].double()))
    norms = sum(float(torch.linalg.vector_norm(part)) for part in parts)
    # A diverged step holds NaN, which passes no comparison and tells nothing.
    if difference > ROUNDING * epsilon * norms:
        return f"their gradients miss that of the tied tensor by {difference / norms:.3g} of their norms"
    return ""
