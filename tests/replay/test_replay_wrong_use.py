"""A user's mistake is answered in one line, with an exit code, and without a trace on the disk."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recorder.manifest import Manifest
from recorder.segments import segment_file
from replay.__main__ import main
from tests.replay.variants import HERE

Captured = pytest.CaptureFixture[str]
Stamps = Callable[[Path], dict[str, Any]]

WORKLOAD = ["--workload", "recorded"]


@pytest.fixture
def complain(tmp_path: Path, stamps: Stamps, capsys: Captured) -> Callable[..., str]:
    """Run the command, which must fail and write nothing; return its one line without the program's name."""

    def run_and_fail(*arguments: str, code: int = 2) -> str:
        before = stamps(tmp_path), sorted(tmp_path.rglob("*"))
        assert main([*arguments, "--workers", "1"]) == code
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        assert (stamps(tmp_path), sorted(tmp_path.rglob("*"))) == before
        program, _, complaint = line.partition("error: ")
        assert program == "python -m replay: "
        return complaint

    return run_and_fail


def test_a_missing_run(tmp_path: Path, complain: Callable[..., str]) -> None:
    assert complain("--run", str(tmp_path / "none")) == f"no such run folder: {tmp_path / 'none'}"


def test_a_folder_that_is_no_run(tmp_path: Path, complain: Callable[..., str]) -> None:
    assert complain("--run", str(tmp_path)).startswith(f"{tmp_path} is no run: it holds no manifest.json.")


def test_a_run_without_any_step_yet(run: Path, complain: Callable[..., str]) -> None:
    for start, stop in ((0, 3), (3, 6)):
        segment_file(run, start, stop).unlink()
    assert complain("--run", str(run), *WORKLOAD) == f"{run} holds no recorded step yet (state: complete)"


@pytest.mark.parametrize("text", ["prob:8", "probe", "probe:0", "probe:-1", "probe:1e3", "batch:8", "probe:²", ""])
def test_an_unknown_loss_data(run: Path, text: str, complain: Callable[..., str]) -> None:
    assert complain("--run", str(run), *WORKLOAD, "--loss-data", text) == (
        f"unknown loss data {text!r}; expected batch, probe:N, valid:N, fresh:N or file:PATH, with N the number of "
        "examples; NAME= may stand before it"
    )


def test_a_loss_data_asked_for_twice(run: Path, complain: Callable[..., str]) -> None:
    arguments = ("--loss-data", "probe:8", "--loss-data", "batch", "--loss-data", "probe:9")
    assert complain("--run", str(run), *WORKLOAD, *arguments) == (
        "--loss-data: 'probe' is asked for twice; replay them one after the other"
    )


@pytest.mark.parametrize(("name", "split", "examples"), [("probe", "train", 48), ("valid", "valid", 16)])
def test_more_examples_than_there_are(
    run: Path, name: str, split: str, examples: int, complain: Callable[..., str]
) -> None:
    assert complain("--run", str(run), *WORKLOAD, "--loss-data", f"{name}:{examples + 1}") == (
        f"--loss-data {name}:{examples + 1}: the split {split!r} has {examples} examples; ask for at most {examples}"
    )


def test_no_workload_is_answered_with_the_very_flag_that_then_works(run: Path, complain: Callable[..., str]) -> None:
    complaint = complain("--run", str(run), "--loss-data", "batch")
    flag = "--workload tests.cases:workload"
    assert f"pass {flag} (or --workload recorded)" in complaint
    assert main(["--run", str(run), "--loss-data", "batch", "--workers", "1", *flag.split()]) == 0


@pytest.mark.parametrize(
    ("workload", "complaint"),
    [
        ("tests.cases", "--workload expects module:function, got 'tests.cases'"),
        ("tests.nowhere:f", "--workload tests.nowhere:f: No module named 'tests.nowhere'. Run from the folder"),
        ("tests.cases:nothing", "--workload tests.cases:nothing: module 'tests.cases' has no function 'nothing'"),
        (f"{HERE}:no_workload", f"{HERE}:no_workload returned object, which lacks one of the methods model, indices"),
    ],
)
def test_a_workload_that_is_none(run: Path, workload: str, complaint: str, complain: Callable[..., str]) -> None:
    assert complain("--run", str(run), "--workload", workload).startswith(complaint)


def test_a_truncated_segment_is_named(run: Path, complain: Callable[..., str]) -> None:
    file = segment_file(run, 0, 3)
    size = file.stat().st_size - 100
    with file.open("r+b") as stream:
        stream.truncate(size)
    complaint = complain("--run", str(run), *WORKLOAD, "--loss-data", "batch", code=1)
    assert complaint.startswith(f"{file}: not a whole safetensors file ({size} bytes on disk;")


def test_cuda_where_there_is_none(run: Path, monkeypatch: pytest.MonkeyPatch, complain: Callable[..., str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert complain("--run", str(run), *WORKLOAD, "--device", "cuda") == (
        "--device cuda: torch finds no CUDA device here; pass --device cpu"
    )


def test_a_run_with_unrecorded_changes(run: Path, complain: Callable[..., str]) -> None:
    dataclasses.replace(Manifest.read(run), unrecorded_changes=("norm.running_mean",)).write(run)
    complaint = complain("--run", str(run), *WORKLOAD)
    assert complaint.startswith(f"{run}: norm.running_mean changed in training although no step records them: buffers")


@pytest.mark.parametrize("flag", ["--chunk", "--threads"])
def test_counts_below_one(run: Path, flag: str, complain: Callable[..., str]) -> None:
    assert complain("--run", str(run), *WORKLOAD, flag, "0") == f"{flag} is at least 1, not 0"


@pytest.mark.parametrize(("flag", "value"), [("--rtol", "nan"), ("--atol", "-1"), ("--rtol", "inf")])
def test_tolerances_that_are_none(run: Path, flag: str, value: str, complain: Callable[..., str]) -> None:
    complaint = complain("--run", str(run), *WORKLOAD, flag, value)
    assert complaint == f"{flag} is a number from 0 up, not {float(value)}"


@pytest.mark.parametrize("text", ["3", "a:b", "1:2:3", "-1:2", "²:3"])
def test_steps_that_are_no_range(run: Path, text: str, capsys: Captured) -> None:
    # Said only once the run is open, so the folder with its settings exists already.
    assert main(["--run", str(run), *WORKLOAD, "--loss-data", "batch", "--steps=" + text]) == 2
    assert capsys.readouterr().err == f"python -m replay: error: --steps expects START:STOP, got {text!r}\n"
    assert not list(run.rglob("shards/*/*.safetensors"))


def test_the_command_as_a_user_starts_it(run: Path) -> None:
    command = [sys.executable, "-m", "replay", "--run", str(run), "--loss-data", "batch", "--workers", "1"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert answer.stderr.startswith("python -m replay: error: a run is data,")
    assert answer.stderr.count("\n") == 1
    answer = subprocess.run([*command, *WORKLOAD], capture_output=True, text=True, check=False)
    assert answer.returncode == 0
    assert Path(answer.stdout.strip()).parent == run / "shards"
