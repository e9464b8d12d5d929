"""The sentences under figures and tables: on which examples the loss was measured, along which path, how well.

Both decide what a number means, so no figure and no table goes without them.
"""

from __future__ import annotations

from collections.abc import Iterable

from viz.select import COUNTED, Totals

MEANINGS = {
    "batch": "measured on each update's own batch; summed over steps it overstates the fall of the training loss",
    "probe": "measured on a fixed probe set, the same for every step",
    "valid": "measured on a fixed set of validation examples, the same for every step",
}
PATHS = {
    "recorded": "path recorded",
    "chord": "path chord (straight between checkpoints)",
}
CHORD = "chord"
INTERVALS = "Of a run of path chord a step is the interval between two checkpoints, at the update where it begins."
SIDE_BY_SIDE = (
    "Runs of path recorded and of path chord stand side by side: their totals compare, for on the same loss data they "
    "do not depend on the path; how a total is split over components does."
)
SIGN = "Negative: this part lowered the loss."


def of_paths(paths: Iterable[str]) -> tuple[str, ...]:
    """Say what a reader must know where runs are shown that are not recorded ones, or not all of one path.

    Parameters
    ----------
    paths
        Of all runs that are shown.

    Returns
    -------
    tuple of str
        Sentences; none where all runs are recorded.
    """
    different = set(paths)
    chord = (INTERVALS,) if CHORD in different else ()
    return (*chord, SIDE_BY_SIDE) if len(different) > 1 else chord


def meaning(data: str) -> str:
    """Say what a loss data is.

    Parameters
    ----------
    data
        Its name.

    Returns
    -------
    str
        A clause that follows the words "the loss".
    """
    return MEANINGS.get(data, f"measured on the examples that the user named {data}")


def path(totals: Totals) -> str:
    """Say along which path the loss change was split.

    Parameters
    ----------
    totals
        Of the run.

    Returns
    -------
    str
        A clause.
    """
    return PATHS.get(totals.path, f"path {totals.path}")


def steps(totals: Totals) -> str:
    """Say how many steps there are and, if not all converged, what became of them.

    Parameters
    ----------
    totals
        Of the run.

    Returns
    -------
    str
        Such as ``200 steps, all converged`` or ``200 steps: 197 converged, 3 tolerance not met``; of checkpoints
        such as ``20 intervals, all converged``.
    """
    noun = "interval" if totals.path == CHORD else "step"
    number = f"{totals.steps:,} {noun}" + ("" if totals.steps == 1 else "s")
    if totals.statuses["converged"] == totals.steps:
        return f"{number}, all converged"
    parts = [
        f"{count:,} {name.replace('_', ' ')}" + ("" if name in COUNTED else " (left out)")
        for name, count in totals.statuses.items()
        if count
    ]
    return f"{number}: {', '.join(parts)}"


def number(amount: float, digits: int = 4) -> str:
    """Write an amount for reading.

    Parameters
    ----------
    amount
        In any units.
    digits
        Significant digits.

    Returns
    -------
    str
        With a sign and a typographic minus.
    """
    return f"{amount:+.{digits}g}".replace("-", "\N{MINUS SIGN}")


def power(amount: float) -> str:
    """Write a small setting for reading, without the zeros that Python pads exponents with.

    Parameters
    ----------
    amount
        Such as a tolerance.

    Returns
    -------
    str
        Such as ``0.01`` or ``1e-5``.

    Examples
    --------
    >>> power(1e-5)
    '1e-5'
    """
    return f"{amount:g}".replace("e-0", "e-")
