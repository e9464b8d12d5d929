"""Which steps to record, said in one line: windows, strides, log-spaced windows, and any union of them.

| term                           | keeps                                                                          |
|--------------------------------|--------------------------------------------------------------------------------|
| ``all``                        | every step                                                                     |
| ``START:STOP``                 | START and the steps after it, up to STOP - 1; without STOP there is no end     |
| ``START:STOP:STRIDE``          | the single steps START, START + STRIDE, ... below STOP                         |
| ``log:START:STOP:WINDOWS:WIDTH`` | WINDOWS windows of WIDTH steps within START:STOP, their starts log-spaced    |

Terms are joined by commas. Ground floor: imports no torch.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import ROUND_HALF_EVEN, Context, Decimal, localcontext
from itertools import pairwise

from recorder.errors import UsageError

GRAMMAR = "all, START:STOP, START:STOP:STRIDE or log:START:STOP:WINDOWS:WIDTH"

_FOREVER = 2**63 - 1  # the stop of a term without end; steps are stored as int64

# Decimal's ln and exp are correctly rounded on every machine, which those of the C library are not. At 50 digits no
# start of a window can come to lie on the wrong side of a half: there are less than 10**19 steps.
_EXACT = Context(prec=50, rounding=ROUND_HALF_EVEN, traps=[])


@dataclass(frozen=True)
class StepSelection:
    """The steps to record.

    Parameters
    ----------
    text
        What to keep, in the grammar above. Afterwards in its canonical form: ``all`` if every step is kept, else the
        terms without spaces, with their START, and each one once. It parses to the same selection.

    Raises
    ------
    UsageError
        If a term is not of the grammar or keeps no step.

    Examples
    --------
    >>> selection = StepSelection.parse(":3, 10:20:5")
    >>> selection.text
    '0:3,10:20:5'
    >>> selection.between(0, 100)
    [0, 1, 2, 10, 15]
    >>> StepSelection.parse("log:1:1000:4:2").between(0, 1000)
    [1, 2, 10, 11, 100, 101, 998, 999]
    """

    text: str
    _windows: tuple[range, ...] = field(init=False, repr=False, compare=False)
    _strides: tuple[range, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        texts, windows, strides = [], [], []
        for term in self.text.split(","):
            text, parts = _parsed(term.strip())
            texts.append(text)
            windows += [part for part in parts if part.step == 1]
            strides += [part for part in parts if part.step > 1]
        joined = _joined(windows)
        canonical = "all" if joined == (range(_FOREVER),) else ",".join(dict.fromkeys(texts))
        object.__setattr__(self, "text", canonical)
        object.__setattr__(self, "_windows", joined)
        object.__setattr__(self, "_strides", tuple(dict.fromkeys(strides)))

    @classmethod
    def parse(cls, text: str) -> StepSelection:
        """Read a selection from its text.

        Parameters
        ----------
        text
            Such as ``0:1000, 1000::100`` or ``log:1:125000:40:16``.

        Returns
        -------
        StepSelection
            The selection, its text canonical.
        """
        return cls(text)

    @property
    def last(self) -> int | None:
        """Last step that can ever be kept; None if there is no end."""
        terms = (*self._windows, *self._strides)
        if any(term.stop == _FOREVER for term in terms):
            return None
        return max(term[-1] for term in terms)

    def keeps(self, step: int) -> bool:
        """Say whether a step is kept.

        Parameters
        ----------
        step
            Number of the step, from 0.

        Returns
        -------
        bool
            True if it is to be recorded.
        """
        return self._in_windows(step) or any(step in stride for stride in self._strides)

    def between(self, start: int, stop: int) -> list[int]:
        """List the kept steps of a range.

        Parameters
        ----------
        start, stop
            The half-open range of steps.

        Returns
        -------
        list of int
            The steps, ascending.
        """
        return sorted(set().union(*(_clipped(term, start, stop) for term in (*self._windows, *self._strides))))

    def count(self, start: int, stop: int) -> int:
        """Count the kept steps of a range; they are not listed, however many they are.

        Parameters
        ----------
        start, stop
            The half-open range of steps.

        Returns
        -------
        int
            How many.
        """
        windows = [_clipped(window, start, stop) for window in self._windows]
        strides = [_clipped(stride, start, stop) for stride in self._strides]
        total = sum(map(len, windows))
        if strides:
            first, *others = strides
            total += len(first) - sum(len(_clipped(first, window.start, window.stop)) for window in windows)
            for position, stride in enumerate(others, start=1):
                before = strides[:position]
                total += sum(
                    not self._in_windows(step) and not any(step in earlier for earlier in before) for step in stride
                )
        return total

    def _in_windows(self, step: int) -> bool:
        position = bisect_right(self._windows, step, key=lambda window: window.start)
        return position > 0 and step in self._windows[position - 1]


def _parsed(term: str) -> tuple[str, list[range]]:
    if term == "all":
        return "all", [range(_FOREVER)]
    kind, *parts = [part.strip() for part in term.split(":")]
    if kind == "log":
        _expect(len(parts) == 4, GRAMMAR, term)
        start, stop, windows, width = (_number(part, term) for part in parts)
        return f"log:{start}:{stop}:{windows}:{width}", _log_windows(start, stop, windows, width, term)
    _expect(len(parts) in {1, 2}, GRAMMAR, term)
    start = _number(kind, term) if kind else 0
    stop = _number(parts[0], term) if parts[0] else _FOREVER
    stride = _number(parts[1], term) if len(parts) == 2 else 1
    _expect(stride >= 1, "a STRIDE of at least 1", term)
    _expect(start < stop, "STOP above START, or no step is kept", term)
    ends = f"{start}:{'' if stop == _FOREVER else stop}"
    return ends if stride == 1 else f"{ends}:{stride}", [range(start, stop, stride)]


def _log_windows(start: int, stop: int, windows: int, width: int, term: str) -> list[range]:
    last = stop - width
    _expect(start >= 1, "START of at least 1, for 0 has no logarithm", term)
    _expect(width >= 1, "a WIDTH of at least 1", term)
    _expect(start <= last, f"START:STOP with room for a window of {width} steps", term)
    _expect(2 <= windows <= stop - start, "at least 2 WINDOWS, and no more than there are steps", term)
    with localcontext(_EXACT):
        log_first, log_last = Decimal(start).ln(), Decimal(last).ln()
        spacing = (log_last - log_first) / (windows - 1)
        inner = [int((log_first + i * spacing).exp().to_integral_value()) for i in range(1, windows - 1)]
    return [range(first, first + width) for first in (start, *inner, last)]


def _number(part: str, term: str) -> int:
    whole = re.fullmatch(r"[0-9]{1,19}", part) is not None and int(part) < _FOREVER
    _expect(whole, f"{GRAMMAR}, in whole numbers from 0", term)
    return int(part)


def _expect(holds: bool, expected: str, term: str) -> None:
    if not holds:
        message = f"wrong choice of steps: expected {expected}; found {term!r}"
        raise UsageError(message)


def _joined(windows: Iterable[range]) -> tuple[range, ...]:
    joined: list[range] = []
    for window in sorted(windows, key=lambda window: window.start):
        if joined and window.start <= joined[-1].stop:
            joined[-1] = range(joined[-1].start, max(joined[-1].stop, window.stop))
        else:
            joined.append(window)
    assert all(one.stop < other.start for one, other in pairwise(joined))
    return tuple(joined)


def _clipped(term: range, start: int, stop: int) -> range:
    skipped = max(0, -((term.start - start) // term.step))
    return range(term.start + skipped * term.step, min(term.stop, stop), term.step)
