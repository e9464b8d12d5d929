from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from replay.shards import ShardFolder
from tests.reliability import replays
from tests.reliability.conftest import Promise
from tests.reliability.counts import KILLED_REPLAYS, SEED
from tests.reliability.replays import SECONDS, SIDE_LOG, STEPS, Recorded, hashes, here, shard_files, start, workers
from tests.reliability.warm import wait_until

Stamps = dict[str, tuple[int, int]]


def _stamps(run: Path) -> Stamps:
    return {str(file): (file.stat().st_ino, file.stat().st_mtime_ns) for file in shard_files(run)}


@pytest.mark.cluster
def test_a_killed_replay_loses_only_the_chunks_in_the_making(
    tmp_path: Path, promise: Promise, replayed: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = random.Random(SEED)
    with promise("P3", SEED) as tally:
        for number in range(KILLED_REPLAYS):
            run, begun = replayed.copy(tmp_path / str(number)), tmp_path / f"{number}.begun"
            with tally.case(f"kill {number}"):
                process = start(run, "--workers", "2", **{SECONDS: "0.03", SIDE_LOG: str(begun)})
                wait_until(lambda process=process: workers(process.pid))  # type: ignore[misc]
                if number % 2 == 0:  # half of the kills while it surely computes, half at any moment from its start
                    wait_until(lambda run=run: shard_files(run))  # type: ignore[misc]
                time.sleep(moments.uniform(0, 1 if number % 2 == 0 else 5))
                orphans = workers(process.pid)
                process.kill()
                process.communicate()
                wait_until(lambda orphans=orphans: not any(map(replays.alive, orphans)))  # type: ignore[misc]
                finished = _stamps(run)
                told = begun.read_text().split() if begun.exists() else []
                steps_begun = {step for step in told if not step.startswith("-")}  # else a batch of the probe
                assert len(steps_begun) - len(finished) // 2 <= 2, "more was lost than two workers were at"
                assert here(run, "--workers", "1") == 0
                assert finished.items() <= _stamps(run).items()
                assert hashes(run) == replayed.hashes


def _argument(*arguments: str) -> Callable[[Path, pytest.MonkeyPatch], list[str]]:
    return lambda run, patch: list(arguments)


def _another_version(run: Path, patch: pytest.MonkeyPatch) -> list[str]:
    patch.setattr(torch, "__version__", "2.99.0")
    return []


def _another_processor(run: Path, patch: pytest.MonkeyPatch) -> list[str]:
    patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "other")
    return []


def _other_data(run: Path, patch: pytest.MonkeyPatch) -> list[str]:
    draw = replays.Small.batch

    def other(self: replays.Small, indices: list[int], *, split: str, epoch: int) -> dict[str, torch.Tensor]:
        batch = draw(self, indices, split=split, epoch=epoch)
        return batch if indices[0] >= 1000 else {**batch, "x": batch["x"] + 1}

    patch.setattr(replays.Small, "batch", other)
    return ["--loss-data", "probe:6"]


def _another_run(run: Path, patch: pytest.MonkeyPatch) -> list[str]:
    for file in (run / "manifest.json", *run.glob("segments/*")):
        file.unlink()
    for file in run.glob("*.safetensors"):
        file.unlink()
    shards = run.with_name("shards")
    (run / "shards").rename(shards)
    replays.record(run)
    shards.rename(run / "shards")
    return []


CHANGE: dict[str, Callable[[Path, pytest.MonkeyPatch], list[str]]] = {
    "rule": _argument("--rule", "trapezoid"),
    "relative tolerance": _argument("--rtol", "0.5"),
    "absolute tolerance": _argument("--atol", "2"),
    "dtype": _argument("--dtype", "float64"),
    "chunk": _argument("--chunk", "3"),
    "threads": _argument("--threads", "2"),
    "examples": _argument("--loss-data", "probe:7"),
    "data": _other_data,
    "version": _another_version,
    "processor": _another_processor,
    "run": _another_run,
}


@pytest.mark.filterwarnings("ignore::recorder.parameters.UnmappedParameterWarning")
def test_no_shard_of_other_settings_or_data_or_versions_or_runs_is_used_again(
    tmp_path: Path, promise: Promise, replayed: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    with promise("P4") as tally:
        for name, change in CHANGE.items():
            run = replayed.copy(tmp_path / name.replace(" ", "-"))
            with tally.case(name), monkeypatch.context() as patch:
                patch.setattr(replays, "LOSS_DATA", ("probe:6",) if name in {"data", "examples"} else ("batch",))
                assert here(run, "--workers", "1", "--steps", ":8") == 0
                before = _stamps(run)
                assert len(before) == 8
                patch.setattr(replays, "LOSS_DATA", () if name in {"data", "examples"} else ("batch",))
                assert here(run, "--workers", "1", *change(run, patch)) == 0
                after = _stamps(run)
                assert before.items() <= after.items()
                old, *new = sorted({Path(file).parent for file in after}, key=lambda path: path != _folder(before))
                assert old == _folder(before)
                (folder,) = new
                steps = [step for start, stop in ShardFolder.open(folder).finished() for step in range(start, stop)]
                assert steps == list(range(STEPS))
                torch.set_num_threads(1)


def _folder(stamps: Stamps) -> Path:
    (folder,) = {Path(file).parent for file in stamps}
    return folder
