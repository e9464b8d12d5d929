from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import chord


def test_the_paths_agree_in_their_totals_and_not_in_their_split(tmp_path: Path) -> None:
    recorded, near, far = chord.measure(updates=12, apart=[3, 12], probe=32, scratch=tmp_path)
    assert (recorded.steps, near.steps, far.steps) == (12, 4, 1)
    for split in (near, far):
        assert split.total == pytest.approx(recorded.total, abs=12 * recorded.worst + split.steps * split.worst)
        assert sum(split.components.values()) == pytest.approx(split.total, abs=1e-12)
        assert list(split.components) == list(recorded.components)
        assert split.components != recorded.components
    lines = chord.tabulate([recorded, near, far]).splitlines()
    assert next(line for line in lines if "components moved" in line).split("|")[2].strip() == "0.0 %"
    assert any(line.startswith("| W1 |") for line in lines)
