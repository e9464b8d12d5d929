"""Chunks and windows of steps: every step once, and windows that cannot be summed whole are refused."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recorder.errors import UsageError
from replay.chunks import chunks, parse_windows, pieces

ranges = st.sets(st.integers(0, 60), min_size=2).map(
    lambda edges: [(low, high) for low, high in itertools.pairwise(sorted(edges)) if low % 2]
)


@given(recorded=ranges, length=st.integers(1, 9), window=st.tuples(st.integers(0, 60), st.integers(0, 60)))
def test_a_window_holds_every_recorded_step_of_it_once_and_is_cut_where_chunks_are(
    recorded: list[tuple[int, int]], length: int, window: tuple[int, int]
) -> None:
    steps = [t for start, stop in recorded for t in range(start, stop)]
    cut = list(chunks(recorded, length))
    assert [t for start, stop in cut for t in range(start, stop)] == steps
    own = pieces(window, recorded, length)
    assert [t for start, stop in own for t in range(start, stop)] == [t for t in steps if window[0] <= t < window[1]]
    assert all(any(first <= start and stop <= last for first, last in cut) for start, stop in own)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("0-4", "--per-parameter expects all or START:STOP[,START:STOP...], got '0-4' in '0-4'"),
        ("0:4,", "--per-parameter expects all or START:STOP[,START:STOP...], got '' in '0:4,'"),
        (":4", "got ':4' in ':4'"),
        ("٣:4", "got '٣:4' in '٣:4'"),
        ("4:4", "--per-parameter 4:4: expected a window of recorded steps, START before STOP"),
        ("0:21", "recorded are steps 2-9, 15-19, so ask for a part of 2:20, or for all"),
        ("1:9", "--per-parameter 1:9: expected a window of recorded steps"),
        ("10:15", "--per-parameter 10:15: expected a window of recorded steps"),
        ("2:6,5:9", "the windows 2:6 and 5:9 overlap; let them touch at most"),
    ],
)
def test_a_window_that_cannot_be_summed_whole_is_refused_with_what_there_is(text: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=re.escape(complaint)):
        parse_windows(text, [(2, 10), (15, 20)])


def test_windows_may_touch_and_come_in_the_order_of_steps() -> None:
    assert parse_windows("5:16, 2:5", [(2, 10), (15, 20)]) == ((2, 5), (5, 16))
