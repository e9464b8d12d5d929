from __future__ import annotations

import decimal
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recorder.errors import UsageError
from recorder.selection import StepSelection

HORIZON = 400
numbers = st.integers(0, HORIZON)


@st.composite
def plain_terms(draw: st.DrawFn) -> tuple[str, set[int]]:
    start = draw(st.none() | numbers)
    first = start or 0
    stop = draw(st.none() | st.integers(first + 1, first + HORIZON))
    stride = draw(st.none() | st.integers(1, 60))
    text = f"{'' if start is None else start}:{'' if stop is None else stop}{'' if stride is None else f':{stride}'}"
    return text, set(range(first, 3 * HORIZON if stop is None else stop, stride or 1))


@st.composite
def log_terms(draw: st.DrawFn) -> tuple[str, set[int]]:
    start, width, room = draw(st.integers(1, HORIZON)), draw(st.integers(1, 20)), draw(st.integers(0, HORIZON))
    stop = start + width + room
    windows = draw(st.integers(2, max(2, min(30, stop - start))))
    if windows > stop - start:
        stop = start + windows
    starts = exact_starts(start, stop - width, windows)
    return f"log:{start}:{stop}:{windows}:{width}", {step for first in starts for step in range(first, first + width)}


def exact_starts(first: int, last: int, windows: int) -> list[int]:
    """The nearest whole numbers to first * (last / first) ** (i / n), found by whole-number arithmetic alone."""
    n = windows - 1
    starts = []
    for i in range(windows):
        power = first ** (n - i) * last**i
        low, high = first, last
        while low < high:  # the least s with power < (s + 1/2) ** n
            middle = (low + high) // 2
            if power * 2**n < (2 * middle + 1) ** n:
                high = middle
            else:
                low = middle + 1
        starts.append(low)
    return starts


terms = plain_terms() | log_terms() | st.just(("all", set(range(3 * HORIZON))))
spaced = st.lists(terms, min_size=1, max_size=4).flatmap(
    lambda chosen: st.tuples(
        st.just(" , ".join(text.replace(":", " : ") for text, _ in chosen)) | st.just(",".join(t for t, _ in chosen)),
        st.just(set().union(*(steps for _, steps in chosen))),
    )
)


@settings(max_examples=300, deadline=None)
@given(case=spaced, ends=st.tuples(numbers, numbers))
def test_a_selection_keeps_the_union_of_its_terms_and_nothing_else(
    case: tuple[str, set[int]], ends: tuple[int, int]
) -> None:
    text, kept = case
    selection = StepSelection.parse(text)
    assert {step for step in range(3 * HORIZON) if selection.keeps(step)} == {s for s in kept if s < 3 * HORIZON}
    expected = sorted(step for step in kept if ends[0] <= step < ends[1])
    assert selection.between(*ends) == expected
    assert selection.count(*ends) == len(expected)


@settings(max_examples=200, deadline=None)
@given(case=spaced)
def test_the_canonical_text_parses_to_the_same_selection_and_is_its_own(case: tuple[str, set[int]]) -> None:
    selection = StepSelection.parse(case[0])
    again = StepSelection.parse(selection.text)
    assert again == selection
    assert again.text == selection.text
    assert " " not in selection.text
    assert again.between(0, 3 * HORIZON) == selection.between(0, 3 * HORIZON)


@settings(max_examples=200, deadline=None)
@given(case=spaced)
def test_no_step_after_the_last_one_is_kept(case: tuple[str, set[int]]) -> None:
    selection = StepSelection.parse(case[0])
    if selection.last is None:
        assert selection.count(10**9, 10**9 + 60) > 0
    else:
        assert selection.last == max(case[1])


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("all", "all"),
        (" all ", "all"),
        (":", "all"),
        ("0:", "all"),
        ("::1", "all"),
        ("0:10, 5:", "all"),
        ("10:20:2, all", "all"),
        (":1000", "0:1000"),
        ("5000:", "5000:"),
        ("007:9", "7:9"),
        ("10:20:1", "10:20"),
        ("::100", "0::100"),
        (" 0 : 1000 ,0:1000,\t1000 :: 100", "0:1000,1000::100"),
        ("log: 1: 125000: 40: 16", "log:1:125000:40:16"),
    ],
)
def test_the_canonical_text_is_short_and_without_spaces(text: str, canonical: str) -> None:
    assert StepSelection.parse(text).text == canonical


def test_selections_of_the_same_text_are_equal_and_made_without_parse() -> None:
    assert StepSelection(":5 ") == StepSelection.parse("0:5")
    assert StepSelection("0:5") != StepSelection("0:6")
    assert repr(StepSelection(":5")) == "StepSelection(text='0:5')"


@settings(max_examples=200, deadline=None)
@given(
    start=st.integers(1, 10**6),
    room=st.integers(0, 10**15),
    windows=st.integers(2, 50),
    width=st.integers(1, 1000),
)
def test_the_first_log_window_starts_at_start_and_the_last_ends_at_stop(
    start: int, room: int, windows: int, width: int
) -> None:
    stop = start + max(width + room, windows)
    selection = StepSelection.parse(f"log:{start}:{stop}:{windows}:{width}")
    assert not selection.keeps(start - 1)
    assert all(selection.keeps(step) for step in (start, start + width - 1, stop - width, stop - 1))
    assert not selection.keeps(stop)
    assert selection.last == stop - 1
    assert selection.count(0, 2 * stop) <= windows * width


@pytest.mark.parametrize(("start", "last", "windows"), [(1, 1000, 4), (3, 3 * 2**40, 41), (1, 10**18, 19), (7, 7, 2)])
def test_log_windows_start_where_whole_number_arithmetic_puts_them(start: int, last: int, windows: int) -> None:
    stop = max(last + 1, start + windows)
    selection = StepSelection.parse(f"log:{start}:{stop}:{windows}:1")
    starts = sorted(set(exact_starts(start, stop - 1, windows)))
    assert selection.between(0, stop) == starts


def test_log_windows_over_powers_are_those_powers() -> None:
    assert StepSelection.parse("log:1:1001:4:1").between(0, 2000) == [1, 10, 100, 1000]
    powers = [2**i for i in range(31)]
    assert StepSelection.parse(f"log:1:{2**30 + 1}:31:1").between(0, 2**31) == powers


def test_overlapping_log_windows_are_joined_and_each_step_counted_once() -> None:
    selection = StepSelection.parse("log:1:20:10:5")
    assert selection.between(0, 100) == list(range(1, 20))
    assert selection.count(0, 100) == 19


def test_a_selection_without_end_is_counted_without_listing_it() -> None:
    selection = StepSelection.parse("10:20, ::7")
    assert selection.last is None
    assert selection.count(0, 7 * 10**17) == 10**17 + 10 - 1
    assert StepSelection.parse("all").count(5, 10**18) == 10**18 - 5


@settings(max_examples=100, deadline=None)
@given(
    strides=st.lists(st.tuples(st.integers(0, 20), st.integers(2, 9)), min_size=2, max_size=4),
    stop=st.integers(0, 200),
)
def test_a_step_of_several_strides_and_windows_is_counted_once(strides: list[tuple[int, int]], stop: int) -> None:
    selection = StepSelection.parse(",".join(["30:40", *(f"{start}::{stride}" for start, stride in strides)]))
    kept = set(range(30, 40)).union(*(range(start, 200, stride) for start, stride in strides))
    assert selection.count(5, stop) == len([step for step in kept if 5 <= step < stop])


def test_a_range_that_ends_before_it_starts_holds_no_step() -> None:
    selection = StepSelection.parse("all, 3::5")
    assert selection.between(9, 4) == []
    assert selection.count(9, 4) == 0
    assert not selection.keeps(-1)


@pytest.mark.parametrize("text", ["", " ", "7", "1:2:3:4", "ALL", "all,", "log", "log:1:100:5", "log:1:9:2:1:1", "x:y"])
def test_what_is_not_of_the_grammar_is_refused_with_the_grammar_and_the_term(text: str) -> None:
    term = text.split(",")[-1].strip()
    with pytest.raises(UsageError) as refused:
        StepSelection.parse(text)
    assert "all, START:STOP, START:STOP:STRIDE or log:START:STOP:WINDOWS:WIDTH" in str(refused.value)
    assert str(refused.value).endswith(f"found {term!r}")


@pytest.mark.parametrize("number", ["-1", "1_000", "1.5", "1e3", "٣", "²", str(2**63 - 1), "9" * 5000])
def test_only_whole_numbers_that_a_step_can_have_are_numbers(number: str) -> None:
    with pytest.raises(UsageError, match="in whole numbers from 0"):
        StepSelection.parse(f"0:10, {number}:")


@pytest.mark.parametrize(
    ("term", "expected"),
    [
        ("5:5", "STOP above START, or no step is kept"),
        ("10:5:2", "STOP above START, or no step is kept"),
        (":0", "STOP above START, or no step is kept"),
        ("0:10:0", "a STRIDE of at least 1"),
        ("log:0:100:5:3", "START of at least 1, for 0 has no logarithm"),
        ("log:1:100:5:0", "a WIDTH of at least 1"),
        ("log:90:100:5:11", "START:STOP with room for a window of 11 steps"),
        ("log:1:100:1:10", "at least 2 WINDOWS"),
        ("log:1:100:100:10", "no more than there are steps"),
    ],
)
def test_a_term_that_makes_no_sense_is_refused_with_what_was_expected(term: str, expected: str) -> None:
    with pytest.raises(UsageError) as refused:
        StepSelection.parse(f"0:3, {term}, 5:7")
    assert expected in str(refused.value)
    assert str(refused.value).endswith(f"found {term!r}")


@pytest.mark.parametrize("module", ["torch", "numpy"])
def test_choosing_steps_and_parameters_needs_neither_torch_nor_numpy(module: str) -> None:
    program = f"import sys, recorder.selection, recorder.patterns; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_program_with_its_own_decimal_context_chooses_the_same_steps() -> None:
    expected = StepSelection.parse("log:3:99991:37:4").between(0, 10**5)
    with decimal.localcontext(decimal.Context(prec=3, rounding=decimal.ROUND_UP, traps=[decimal.Inexact])) as own:
        assert StepSelection.parse("log:3:99991:37:4").between(0, 10**5) == expected
        assert own.prec == 3
