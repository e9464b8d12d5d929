"""Promises kept, counted: each case of a promise by itself, so that one broken case hides no other."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

PROMISES = {
    "R1": "a training killed at any moment leaves whole steps, and every step that was safe",
    "R2": "so does one killed at any system call of a commit",
    "R4": "a disk that fails or is full never harms the training; the run reads back and says why it ended",
    "R6": "a training with the recorder on is the same to the bit",
    "R7": "a training restarted from its checkpoint goes on with its run; one from a wrong checkpoint is refused",
    "R8": "the coding of steps is lossless for every bit pattern",
    "R10": "a run has one recorder at a time, and no clock decides its order",
    "R11": "a long recording takes few files, few handles, flat memory",
    "P1": "a replay whose workers die, crash, stop or run out of memory ends with the bytes of an undisturbed one",
    "P2": "a replay never hangs: without progress it ends, and says what is missing",
    "P3": "a replay killed at any moment loses the chunks in the making and touches no finished one",
    "P4": "results of other settings, data, versions or runs are never taken for one another",
    "P5": "a chunk that fails, crashes or hangs is named, and all others are finished",
    "P6": "the bytes are the same for any number of workers, any order and any interruption",
    "F1": "no damage to any file of a run passes unnoticed",
    "F2": "a damaged segment costs its own steps, and is named",
    "F3": "a run may be copied, packed, moved; a file that stays behind is missed",
    "F5": "runs of earlier versions stay readable",
    "P7": "replay takes the memory that was foretold, however long the run",
}
_ENOUGH = 10
"""Broken cases after which no more are tried."""


@dataclasses.dataclass
class Tally:
    """How many cases of a promise were tried, and which were not kept."""

    row: str
    seed: int | None
    tried: int = 0
    broken: list[str] = dataclasses.field(default_factory=list)

    @contextmanager
    def case(self, name: str) -> Iterator[None]:
        """Try one case: whatever is raised within breaks the promise."""
        self.tried += 1
        try:
            yield
        except (Exception, pytest.fail.Exception):
            self.broken.append(f"{name}: {traceback.format_exc()}")
            if len(self.broken) >= _ENOUGH:
                self._tell()

    def _tell(self) -> None:
        assert not self.broken, f"{self.row}: {len(self.broken)} of {self.tried} cases broken\n" + "\n".join(
            self.broken
        )

    @contextmanager
    def counted(self, record: Callable[[str, Any], None]) -> Iterator[Tally]:
        """Record the numbers at the end, also after a failure."""
        try:
            yield self
        finally:
            kept = self.tried - len(self.broken)
            record("promise", {"row": self.row, "kept": kept, "tried": self.tried, "seed": self.seed})
        assert self.tried
        self._tell()
