"""Recorded steps cut into chunks, and windows of steps cut where chunks are.

Chunks start at multiples of their length, so that they are the same whatever was done before.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

from recorder.errors import UsageError
from recorder.ranges import describe_ranges

Range = tuple[int, int]
ALL = "all"


def chunks(recorded: Sequence[Range], length: int) -> Iterator[Range]:
    """Cut consecutive recorded steps into chunks.

    Parameters
    ----------
    recorded
        Start and stop of consecutive recorded steps.
    length
        Steps to a chunk.

    Yields
    ------
    (int, int)
        Start and stop of each chunk, in the order of steps.

    Examples
    --------
    >>> list(chunks([(0, 5), (6, 9)], 4))
    [(0, 4), (4, 5), (6, 8), (8, 9)]
    """
    for start, stop in recorded:
        first = start
        while first < stop:
            last = min(stop, (first // length + 1) * length)
            yield first, last
            first = last


def pieces(window: Range, recorded: Sequence[Range], length: int) -> list[Range]:
    """Cut a window of steps where chunks begin and end.

    Parameters
    ----------
    window
        Its start and stop; they need not be a chunk's.
    recorded, length
        As for `chunks`.

    Returns
    -------
    list of (int, int)
        Start and stop of what the window has of each chunk, in the order of steps.

    Examples
    --------
    >>> pieces((3, 7), [(0, 5), (6, 9)], 4)
    [(3, 4), (4, 5), (6, 7)]
    """
    start, stop = window
    cut = ((max(first, start), min(last, stop)) for first, last in chunks(recorded, length))
    return [(first, last) for first, last in cut if first < last]


def parse_windows(
    text: str,
    recorded: Sequence[Range],
    *,
    growing: bool = False,
    position: Callable[[int, str], int] = lambda update, what: update,
) -> tuple[Range, ...]:
    """Parse the value of ``--per-parameter``.

    Parameters
    ----------
    text
        ``all``, or windows such as ``0:100,100:1000``.
    recorded
        Start and stop of consecutive recorded steps.
    growing
        Whether further steps are to come, and the windows may reach beyond the recorded ones.
    position
        Finds the step that begins after a number of updates; the second argument names the number in errors.

    Returns
    -------
    tuple of (int, int)
        Start and stop of each window, in the order of steps.

    Raises
    ------
    UsageError
        If it is neither; if windows overlap; if one reaches beyond the recorded steps or holds none of them. What is
        not recorded yet would make a sum that looks whole and is not.

    Examples
    --------
    >>> parse_windows("4:8,0:4", [(0, 8)])
    ((0, 4), (4, 8))
    >>> parse_windows("all", [(0, 3), (5, 8)])
    ((0, 8),)
    """
    first, last = recorded[0][0], recorded[-1][1]
    if text == ALL and growing:
        message = f"--per-parameter {ALL}: with --follow nobody knows yet where the training ends; name windows"
        raise UsageError(message)
    if text == ALL:
        return ((first, last),)
    windows = []
    asked: dict[Range, str] = {}
    for part in text.split(","):
        start, separator, stop = part.strip().partition(":")
        if not separator or not all(number.isascii() and number.isdigit() for number in (start, stop)):
            message = f"--per-parameter expects {ALL} or START:STOP[,START:STOP...], got {part.strip()!r} in {text!r}"
            raise UsageError(message)
        window = (position(int(start), "--per-parameter"), position(int(stop), "--per-parameter"))
        asked[window] = part.strip()
        windows.append(window)
    windows.sort()
    for window in windows:
        there = growing or (window[1] <= last and bool(pieces(window, recorded, 1)))
        if not (first <= window[0] < window[1] and there):
            message = (
                f"--per-parameter {asked[window]}: expected a window of recorded steps, START before STOP; "
                f"recorded are {describe_ranges(recorded)}, so ask for a part of {first}:{last}, or for {ALL}"
            )
            raise UsageError(message)
    for before, after in itertools.pairwise(windows):
        if after[0] < before[1]:
            message = (
                f"--per-parameter {text}: the windows {asked[before]} and {asked[after]} overlap; let "
                "them touch at most, and add their entries for a longer one"
            )
            raise UsageError(message)
    return tuple(windows)
