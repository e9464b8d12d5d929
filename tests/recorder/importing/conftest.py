from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from recorder.__main__ import main
from tests import checkpoints


@pytest.fixture(scope="session")
def training(tmp_path_factory: pytest.TempPathFactory) -> checkpoints.Training:
    """Six updates, four checkpoints; not to be changed."""
    return checkpoints.train(tmp_path_factory.mktemp("training") / "run", updates=6, every=2)


@pytest.fixture(scope="session")
def states(training: checkpoints.Training) -> Mapping[int, checkpoints.State]:
    return training.states


@pytest.fixture
def importing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """The command line into the run ``tmp_path / "run"``: its exit code, and what it says."""

    def command(*arguments: object, workload: str = checkpoints.WORKLOAD) -> tuple[int, str]:
        capsys.readouterr()
        code = main(["import", "--run", str(tmp_path / "run"), "--workload", workload, *map(str, arguments)])
        return code, capsys.readouterr().err

    return command
