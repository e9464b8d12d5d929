"""What a replay found, in numbers: computed from the shards, for the command's last lines."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from recorder.manifest import CHORD
from replay.columns import Status
from replay.shardfolder import ShardFolder


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """The books of one loss data.

    Parameters
    ----------
    steps
        Number of replayed steps.
    counts
        Status to number of steps.
    change
        Σ ΔL over the steps whose losses were measured, in nats; so are all further numbers but the last.
    residual_median, residual_p99, residual_worst
        Of |residual|, in nats; NaN where no step was checked.
    worst_step
        The step of the worst residual, or the updates before the worst interval; None where no step was checked.
    cumulative_residual
        Σ residual over the steps, in nats.
    cumulative_change
        Σ |ΔL| over the steps, in nats.
    evaluations
        Gradient evaluations.
    noun
        What the entries are of: a step, or an interval between checkpoints.
    """

    steps: int
    counts: Mapping[Status, int]
    change: float
    residual_median: float
    residual_p99: float
    residual_worst: float
    worst_step: int | None
    cumulative_residual: float
    cumulative_change: float
    evaluations: int
    noun: str = "step"

    @property
    def balanced(self) -> bool:
        """Whether every entry converged that was checked; one that is not finite is told in any case."""
        return self.counts[Status.CONVERGED] + self.counts[Status.NOT_CHECKED] == self.steps

    @property
    def _worst(self) -> str:
        return f"{self.noun} {self.worst_step}" if self.noun == "step" else f"the one from update {self.worst_step}"

    def lines(self, name: str) -> list[str]:
        """Say it in two lines.

        Parameters
        ----------
        name
            The loss data.

        Returns
        -------
        list of str
            For a terminal.
        """
        counts = ", ".join(f"{count} {status.name.lower()}" for status, count in self.counts.items() if count)
        share = abs(self.cumulative_residual) / self.cumulative_change if self.cumulative_change else 0.0
        checked = self.steps - self.counts[Status.NOT_CHECKED]
        over = "" if checked == self.steps else f" over the {checked} checked {self.noun}s"
        totals = f"ΔL {self.change:+.4f} nat{over}, {self.evaluations} gradient evaluations"
        if not checked:
            totals = f"{self.evaluations} gradient evaluations"
            return [
                f"{name}: {self.steps} {self.noun}s ({counts}), {totals}",
                f"{name}: no {self.noun}'s residual was taken",
            ]
        residuals = (
            f"|residual| median {self.residual_median:.1e}, 99th percentile {self.residual_p99:.1e}, worst "
            f"{self.residual_worst:.1e} nat at {self._worst}; cumulative {share:.1e} of Σ|ΔL|"
        )
        return [f"{name}: {self.steps} {self.noun}s ({counts}), {totals}", f"{name}: {residuals}"]


def summarise(folder: ShardFolder) -> Summary:
    """Read the per-step entries of all shards of a folder and sum them up.

    Parameters
    ----------
    folder
        With at least one shard.

    Returns
    -------
    Summary
        The books.
    """
    shards = [folder.read_per_step(start, stop) for start, stop in folder.finished()]
    status, residual, start, end, evaluations = (
        np.concatenate([shard[name] for shard in shards])
        for name in ("status", "residual", "loss_start", "loss_end", "evaluations")
    )
    step = np.concatenate([folder.updates(first, last)[:, 0] for first, last in folder.finished()])
    counts = {member: int((status == member).sum()) for member in Status}
    checked = status != Status.NOT_CHECKED
    step, residual, start, end = (column[checked] for column in (step, residual, start, end))
    size = np.abs(residual)
    # In a diverged step inf - inf is NaN, as the summary then says; the interpolation of a quantile subtracts too.
    with np.errstate(invalid="ignore"):
        change = end - start
        cumulative_residual = residual.sum()
        median, p99 = np.quantile(size, [0.5, 0.99]) if size.size else (np.nan, np.nan)
    # A residual that is not finite is the worst of all.
    worst = int(np.argmax(np.where(np.isfinite(size), size, np.inf))) if size.size else None
    return Summary(
        steps=len(status),
        counts=counts,
        change=float(change.sum()),
        residual_median=float(median),
        residual_p99=float(p99),
        residual_worst=np.nan if worst is None else float(size[worst]),
        worst_step=None if worst is None else int(step[worst]),
        cumulative_residual=float(cumulative_residual),
        cumulative_change=float(np.abs(change).sum()),
        evaluations=int(evaluations.sum()),
        noun="interval" if folder.settings.path == CHORD else "step",
    )
