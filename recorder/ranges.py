"""Half-open ranges of steps, joined and said in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def joined_ranges(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join the neighbours of a list of half-open ranges.

    Parameters
    ----------
    ranges
        Start and stop of each range, in order.

    Returns
    -------
    list of (int, int)
        Start and stop of each joined range.

    Examples
    --------
    >>> joined_ranges([(0, 16), (16, 64), (80, 96)])
    [(0, 64), (80, 96)]
    """
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def overlap(ranges: Iterable[tuple[int, int]], start: int, stop: int) -> bool:
    """Tell whether any half-open range has a step of another one.

    Parameters
    ----------
    ranges
        Start and stop of each range.
    start, stop
        The other one.

    Returns
    -------
    bool
        False where it is empty.

    Examples
    --------
    >>> overlap([(0, 16), (20, 24)], 15, 20), overlap([(0, 16), (20, 24)], 16, 20), overlap([(0, 16)], 8, 8)
    (True, False, False)
    """
    return any(max(first, start) < min(last, stop) for first, last in ranges)


def describe_ranges(ranges: Sequence[tuple[int, int]]) -> str:
    """Say in words which steps a list of half-open ranges covers, neighbours joined.

    Parameters
    ----------
    ranges
        Start and stop of each range, in order.

    Returns
    -------
    str
        Such as ``steps 0-63, 80-95``.

    Examples
    --------
    >>> describe_ranges([(0, 16), (16, 64), (80, 96)])
    'steps 0-63, 80-95'
    >>> describe_ranges([])
    'no steps'
    """
    joined = joined_ranges(ranges)
    return "steps " + ", ".join(f"{start}-{stop - 1}" for start, stop in joined) if joined else "no steps"
