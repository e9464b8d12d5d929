from __future__ import annotations

from benchmarks import rounding
from benchmarks.replayruns import LanguageModelling
from replay.precision import PRECISIONS


def test_rounding_is_found_in_every_precision_and_lies_below_its_floor() -> None:
    task = LanguageModelling(vocabulary=1000, layers=1, width=64, length=15)
    found = rounding.measure(task, steps=3, sequences=4)
    for name, precision in PRECISIONS.items():
        worst = (abs(found[name]) / found["loss"]).max()
        assert 0.001 * precision.epsilon < worst < precision.rounding.over(4 * 15)
