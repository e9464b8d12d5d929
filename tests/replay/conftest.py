"""Runs to replay, recorded once and copied for every test, and the command line as a function."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from recorder.runformat import Run
from replay import log, shards
from replay.__main__ import main
from replay.job import Job
from replay.shards import ShardFolder
from replay.work import replayer
from tests import cases
from tests.replay.variants import one_thread

Files = dict[str, Any]


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """Undo what a replay leaves behind in its process: the replayer, torch's threads, kernels, random state."""
    state, fastpath = torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    replayer.cache_clear()
    with one_thread():
        yield
    replayer.cache_clear()
    torch.set_rng_state(state)
    torch.backends.mha.set_fastpath_enabled(fastpath)


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps in float32, in segments of three; not to be changed."""
    run = tmp_path_factory.mktemp("recorded") / "run"
    with one_thread():
        cases.train(run, segment_steps=3)
    return run


@pytest.fixture
def run(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / "run"))


@pytest.fixture
def replay() -> Callable[..., int]:
    """The command line with the run's own workload, on its batches, in this process."""

    def command(run: Path, *arguments: str, workload: str = "recorded", loss_data: tuple[str, ...] = ("batch",)) -> int:
        chosen = [text for name in loss_data for text in ("--loss-data", name)]
        return main(["--run", str(run), "--workload", workload, "--workers", "1", *chosen, *arguments])

    return command


@pytest.fixture
def job() -> Callable[..., Job]:
    """A job on a run, as the command line would make it."""

    def of(run: Path, **settings: Any) -> Job:
        chosen = {"rule": "simpson", "loss_data": ("batch", "probe:16"), "chunk": 4, "workload": "recorded", **settings}
        plain: Files = {"rtol": 1e-3, "atol": 0.0, "device": "cpu", "dtype": None, "threads": 1, "data": None}
        return Job(run=str(run), run_id=Run(run).manifest.run_id, **plain, **chosen)

    return of


@pytest.fixture
def folder() -> Callable[[Path, str], ShardFolder]:
    """The only folder of shards of a loss data."""

    def find(run: Path, loss_data: str) -> ShardFolder:
        (found,) = (folder for folder in shards.folders(run) if folder.settings.loss_data == loss_data)
        return found

    return find


@pytest.fixture
def stamps() -> Callable[[Path], Files]:
    """Every file below a folder but the log, with what changes when it is written again, even with the same bytes."""

    def look(folder: Path) -> Files:
        return {
            str(file.relative_to(folder)): (file.stat().st_ino, file.stat().st_mtime_ns, file.read_bytes())
            for file in sorted(folder.rglob("*"))
            if file.is_file() and file.name != log.FILE
        }

    return look
