from __future__ import annotations

import subprocess
import sys

import pytest

GROUND_FLOOR = (
    "",
    ".errors",
    ".commandline",
    ".durable",
    ".table",
    ".manifest",
    ".tensorfile",
    ".ranges",
    ".selection",
    ".patterns",
    ".prediction",
    ".codec",
    ".lock",
    ".growing",
)


@pytest.mark.parametrize("module", ["torch", "fairseq"])
def test_the_ground_floor_imports_neither_torch_nor_a_trainer(module: str) -> None:
    names = ", ".join(f"recorder{room}" for room in GROUND_FLOOR)
    program = f"import sys, {names}; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_package_itself_has_no_other_names_than_those_of_a_training_loop() -> None:
    import recorder
    from recorder import announcing, session

    assert recorder.__all__ == ["RecordedBatchSampler", "announced", "watch"]
    assert recorder.watch is session.watch
    assert (recorder.announced, recorder.RecordedBatchSampler) == (
        announcing.announced,
        announcing.RecordedBatchSampler,
    )
    with pytest.raises(AttributeError, match="module 'recorder' has no attribute 'wach'"):
        recorder.wach  # noqa: B018
