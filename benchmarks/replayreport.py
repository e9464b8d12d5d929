"""What replay costs, as a page of Markdown: beside its gradients, and where the rest of the time goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.replaycost import Cost
from benchmarks.report import machine, table, verdict


def text(results: Mapping[str, Sequence[Cost] | None], titles: Mapping[str, str], threads: int) -> str:
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
    parts = ["# What replay costs beside its gradients", f"{machine()}, {unit} of torch."]
    for case, costs in results.items():
        parts.append(f"## {case}: {titles[case]}")
        if costs is None:
            parts.append("no GPU here: not measured")
            continue
        parts.append(_costs(costs))
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
