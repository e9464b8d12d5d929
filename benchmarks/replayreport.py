"""What replay costs, as a page of Markdown: beside its gradients, and where the rest of the time goes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.replaycost import Cost
from benchmarks.replaystacked import Stacked
from benchmarks.replayworkers import Workers
from benchmarks.report import machine, table, verdict

Result = Sequence[Cost] | Sequence[Stacked] | Workers | None
"""What a case gave; None where it could not be measured."""

REACH_WORKERS = 1.8
"""How many times as fast as one worker two should be, on two cores."""


def plain(result: Result) -> Any:
    """Turn what a case gave into plain JSON types.

    Parameters
    ----------
    result
        Of the case.

    Returns
    -------
    list, dict or None
        With the same names.
    """
    if result is None:
        return None
    if isinstance(result, Workers):
        return dataclasses.asdict(result)
    return [dataclasses.asdict(row) for row in result]


def text(results: Mapping[str, Result], titles: Mapping[str, str], threads: int) -> str:
    """Write the page.

    Parameters
    ----------
    results
        Case to what its variants gave; None where it could not be measured.
    titles
        Case to what it is.
    threads
        Of torch.

    Returns
    -------
    str
        Markdown, without a last newline.
    """
    unit = "1 thread" if threads == 1 else f"{threads} threads"
    parts = [
        "# What replay costs beside its gradients",
        "Printed by `python -m benchmarks.replay`; how to read it: [README](../README.md).",
        f"{machine()}, {unit} of torch.",
    ]
    for case, result in results.items():
        parts.append(f"## {case}: {titles[case]}")
        if result is None:
            parts.append("no GPU here: not measured")
        elif isinstance(result, Workers):
            parts.append(_workers(result))
        else:
            costs = [row for row in result if isinstance(row, Cost)]
            parts.append(_costs(costs) if costs else _stacked([row for row in result if isinstance(row, Stacked)]))
            parts += [_where(cost) for cost in costs if cost.ratio > (cost.reach or 1)]
    return "\n\n".join(parts)


def _costs(costs: Sequence[Cost]) -> str:
    rows = [
        (
            cost.variant,
            cost.steps,
            f"{cost.steps / cost.seconds:.3g}",
            f"{cost.evaluations:.2f}",
            f"{cost.residual_median:.1e}",
            f"{cost.residual_worst:.1e}",
            cost.unmet,
            f"{cost.peak / 1e6:.0f} MB",
            f"**{cost.ratio:.3f}** ({min(cost.ratios):.3f} to {max(cost.ratios):.3f})",
            "" if cost.reach is None else f"≤ {cost.reach}: {verdict(cost.ratio <= cost.reach)}",
            f"{cost.cpu_ratio:.3f}",
        )
        for cost in costs
    ]
    head = (
        "variant", "steps", "steps/s", "evaluations a step", "relative residual: median", "worst", "unmet",
        "peak memory", "ratio", "reach", "core-time ratio",
    )  # fmt: skip
    return table(head, rows)


def _where(cost: Cost) -> str:
    spent = ", ".join(f"{name} {seconds * 1e3:.4g} ms" for name, seconds in cost.spent.items())
    return f"{cost.variant}: a step of {cost.seconds / cost.steps * 1e3:.4g} ms is {spent}."


def _stacked(results: Sequence[Stacked]) -> str:
    rows = [
        (
            result.model,
            result.points,
            f"{result.alone * 1e3:.3g} ms",
            f"{result.stacked * 1e3:.3g} ms",
            f"**{result.ratio:.2f}** ({min(result.ratios):.2f} to {max(result.ratios):.2f})",
            f"{result.difference:.0e}",
        )
        for result in results
    ]
    return table(("model", "points", "a gradient, one by one", "stacked", "ratio", "relative difference"), rows)


def _workers(result: Workers) -> str:
    rows = [
        (
            name,
            ", ".join(f"{getattr(clock, field) * scale:.4g}" for clock in result.one),
            ", ".join(f"{getattr(clock, field) * scale:.4g}" for clock in result.two),
            f"**{ratio:.2f}**",
            f"≥ {REACH_WORKERS}: {verdict(ratio >= REACH_WORKERS)}" if field == "pace" else "",
        )
        for name, field, scale, ratio in (
            ("whole command, s", "whole", 1, result.whole_ratio),
            ("a step of the steady part, ms", "pace", 1000, result.steady_ratio),
        )
    ]
    return table((f"{result.steps} steps", "one worker", "two workers", "times as fast", "reach"), rows)
