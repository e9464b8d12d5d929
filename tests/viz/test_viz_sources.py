"""Which cube is meant, and under which label."""

from __future__ import annotations

from pathlib import Path

import pytest

from recorder.errors import UsageError
from viz.sources import sources


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a/run", "b/run", "c/lr=0.1"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "lca.nc").touch()
    (tmp_path / "a/run/other.nc").touch()
    return tmp_path


def _labels(*arguments: object) -> list[str]:
    return [source.label for source in sources([str(argument) for argument in arguments])]


def test_a_run_is_called_by_its_folder_and_a_cube_by_its_name(root: Path) -> None:
    assert _labels(root / "a/run") == ["run"]
    assert _labels(root / "a/run/lca.nc") == ["run"]
    assert _labels(root / "a/run/other.nc") == ["other"]
    assert sources([str(root / "a/run")])[0].cube == root / "a/run/lca.nc"


def test_a_run_here_is_called_by_the_folder_it_is_in(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root / "a/run")
    assert _labels(".") == ["run"]
    assert _labels("lca.nc") == ["run"]


def test_a_label_of_ones_own(root: Path) -> None:
    assert _labels(f"translation={root / 'a/run'}") == ["translation"]


def test_a_path_with_an_equals_sign_is_a_path(root: Path) -> None:
    assert _labels(root / "c/lr=0.1") == ["lr=0.1"]
    assert _labels(f"x={root / 'c/lr=0.1'}") == ["x"]


def test_ties_are_told_apart(root: Path) -> None:
    assert _labels(root / "a/run", root / "b/run", root / "c/lr=0.1") == ["a/run", "b/run", "lr=0.1"]
    assert _labels(root / "a/run", root / "a/run") == ["a/run", "a/run (2)"]
    assert _labels(root / "a/run", f"run={root / 'b/run'}") == ["a/run", "run"]


def test_half_a_label(root: Path) -> None:
    with pytest.raises(UsageError, match="expected PATH or LABEL=PATH, found '=x'"):
        sources(["=x"])
