"""Counting the cases of each promise, the table at the end, and processes that can be killed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from recorder.parameters import UnmappedParameterWarning
from tests.reliability import replays
from tests.reliability.counts import FULL, SEED, STEPS
from tests.reliability.promises import PROMISES, Tally
from tests.reliability.replays import Recorded
from tests.reliability.warm import WarmProcess

_PACKAGES = ("lossledger", "torch", "safetensors", "numpy", "zstandard", "filelock", "distributed")
_ELSEWHERE = {"test_codec.py::": "R8", "test_golden.py::": "F5", "::test_the_estimated_size_is_within_": "R4"}
"""Part of a test's name to the promise of which that test is a case."""

Promise = Callable[..., AbstractContextManager[Tally]]


@pytest.fixture
def promise(record_property: Callable[[str, Any], None]) -> Promise:
    """Count the cases of a promise: ``with promise("R1", seed=0) as tally: with tally.case("kill 1"): ...``."""

    def begin(row: str, seed: int | None = None) -> AbstractContextManager[Tally]:
        assert row in PROMISES
        return Tally(row, seed).counted(record_property)

    return begin


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Compute as the forked trainings do: the number of threads decides the last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmProcess]:
    """A process to fork trainings from."""
    process = WarmProcess(tmp_path_factory.mktemp("warm") / "log")
    yield process
    process.close()


@pytest.fixture(scope="session")
def warm_in_own_mounts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmProcess]:
    """The same, but its trainings may mount disks of their own, which nobody else sees."""
    prefix = ["unshare", "--user", "--map-root-user", "--mount"]
    possible = shutil.which("unshare") and subprocess.run(
        [*prefix, "mount", "-t", "tmpfs", "none", str(tmp_path_factory.mktemp("mount"))],
        check=False,
        capture_output=True,
    )
    if not possible or possible.returncode:
        pytest.skip("no disk of its own: unshare --user --mount is not allowed here")
    process = WarmProcess(tmp_path_factory.mktemp("warm-mounts") / "log", prefix)
    yield process
    process.close()


@pytest.fixture(scope="session")
def replayed(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """A small run and the hashes of its shards, made by one undisturbed process."""
    run = tmp_path_factory.mktemp("replayed") / "run"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnmappedParameterWarning)
        replays.record(run)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert replays.here(run, "--workers", "1") == 0
    torch.set_num_threads(threads)
    return Recorded(run, replays.hashes(run))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the table: promise, kept of tried, seed; below it the versions."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for report in [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]:
        if report.when != "call":
            continue
        told = [value for key, value in report.user_properties if key == "promise"]
        row = next((row for part, row in _ELSEWHERE.items() if part in report.nodeid), None)
        if FULL and row and not told:
            told = [{"row": row, "kept": int(report.passed), "tried": 1, "seed": None}]
        for entry in told:
            rows.setdefault(entry["row"], []).append(entry)
    if not rows:
        return
    table = _table(rows)
    skipped = sorted(
        {f"{Path(report.nodeid).name}: {report.longrepr[2]}" for report in terminalreporter.getreports("skipped")}
    )
    terminalreporter.section("reliability")
    for line in [*table, "", *(f"- {text}" for text in skipped)]:
        terminalreporter.line(line)
    target = os.environ.get("LOSSLEDGER_RELIABILITY_TABLE")
    if target:
        head = ["# Reliability", "", f"Written by `make reliability`, {datetime.now(UTC):%Y-%m-%d}.", ""]
        Path(target).write_text(
            "\n".join([*head, *table, "", *(f"- {text}" for text in skipped)]).rstrip() + "\n", encoding="utf-8"
        )


def _table(rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = ["| | promise | kept | seed |", "|---|---|---|---|"]
    for name, text in PROMISES.items():
        entries = rows.get(name)
        if entries is None:
            continue
        kept, tried = (sum(entry[key] for entry in entries) for key in ("kept", "tried"))
        seeds = {entry["seed"] for entry in entries} - {None}
        lines.append(f"| {name} | {text} | {kept:,} of {tried:,}{_unit(name)} | {', '.join(map(str, sorted(seeds)))} |")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)
    kernel = platform.release().partition("-")[0]
    system = f"Python {platform.python_version()}, {platform.system()} {kernel}, {os.cpu_count()} cores"
    return [*lines, "", f"{'Full' if FULL else 'Reduced'} counts, seed {SEED}; {versions}; {system}."]


def _unit(row: str) -> str:
    if row == "R8":
        return f" tests of up to {int(os.environ.get('LOSSLEDGER_EXAMPLES', '300')):,} examples"
    return {"F5": " tests", "R11": f" checks of {STEPS:,} steps"}.get(row, "")
