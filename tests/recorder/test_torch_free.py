from __future__ import annotations

import subprocess
import sys

import pytest

GROUND_FLOOR = ("", ".errors", ".commandline", ".durable", ".table", ".manifest", ".tensorfile")


@pytest.mark.parametrize("module", ["torch", "fairseq"])
def test_the_ground_floor_imports_neither_torch_nor_a_trainer(module: str) -> None:
    names = ", ".join(f"recorder{room}" for room in GROUND_FLOOR)
    program = f"import sys, {names}; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_package_itself_has_no_other_name_than_watch() -> None:
    import recorder

    assert recorder.__all__ == ["watch"]
    with pytest.raises(AttributeError, match="module 'recorder' has no attribute 'wach'"):
        recorder.wach  # noqa: B018
