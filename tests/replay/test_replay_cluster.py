"""Worker processes give what one process gives, fail as plainly, and listen to nobody outside."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from recorder.segments import segment_file
from tests.cases import train
from tests.replay.variants import HERE

pytestmark = pytest.mark.cluster

LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def _command(run: Path, workload: str = "recorded") -> list[str]:
    arguments = ["--workload", workload, "--loss-data", "batch", "--loss-data", "probe:16", "--chunk", "1"]
    return [sys.executable, "-m", "replay", "--run", str(run), *arguments, "--workers", "2"]


def _listening(session: int) -> Iterator[str]:
    """Yield the addresses, in hexadecimal, on which processes of a session listen."""
    inodes = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if int((process / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                inodes |= {str(entry.readlink()).strip("socket:[]") for entry in (process / "fd").iterdir()}
        except OSError:
            continue  # the process, or its file, has just gone
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                yield fields[1].partition(":")[0]


def _hashes(run: Path) -> dict[str, str]:
    return {
        str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(run.rglob("shards/*/*"))
    }


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="sockets are counted in /proc")
def test_two_processes_give_the_bytes_of_one_and_listen_only_on_loopback(run: Path, replay: Callable[..., int]) -> None:
    with subprocess.Popen(
        _command(run), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        addresses: set[str] = set()
        while process.poll() is None:
            addresses |= set(_listening(process.pid))
            time.sleep(0.1)
        assert process.stdout is not None
        assert process.stderr is not None
        complaints = process.stderr.read()
        assert process.returncode == 0, complaints
        folders = process.stdout.read().split()
    assert addresses
    assert addresses <= LOOPBACK
    assert "replay: 6 of 6 steps" in complaints
    assert [Path(path).parent for path in folders] == [run / "shards"] * 2
    assert not list(run.rglob(".*.partial"))
    by_two = _hashes(run)
    for path in run.rglob("shards/*/*.safetensors"):
        path.unlink()
    assert replay(run, "--chunk", "1", loss_data=("batch", "probe:16")) == 0
    assert _hashes(run) == by_two
    assert len(by_two) == 2 * (6 + 1)


def test_an_error_in_a_worker_is_one_line_and_keeps_what_others_finished(run: Path) -> None:
    file = segment_file(run, 3, 6)
    with file.open("r+b") as stream:
        stream.truncate(1000)
    # dask's usual port is taken, as by another replay at the same time: nothing is said about it.
    with socket.socket() as taken:
        with contextlib.suppress(OSError):  # somebody else has taken it already
            taken.bind(("127.0.0.1", 8787))
            taken.listen()
        answer = subprocess.run(_command(run), capture_output=True, text=True, check=False)
    assert answer.returncode == 1
    assert answer.stdout == ""
    lines = answer.stderr.splitlines()
    assert lines[-1].startswith(f"python -m replay: error: {file}: not a whole safetensors file (1000 bytes on disk;")
    assert "Traceback" not in answer.stderr
    assert [line.partition(":")[0] for line in lines] == [str(run), "self-check", "python -m replay"]


def test_an_interrupt_at_the_terminal_is_one_line_and_keeps_what_is_finished(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run, steps=60)
    unhurried = _command(run, f"{HERE}:unhurried")
    # Tests started in the background have it ignored, and so would all their children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(
        unhurried, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        signal.signal(signal.SIGINT, before)
        while process.poll() is None and len(list(run.glob("shards/*/*.safetensors"))) < 4:
            time.sleep(0.02)
        # As a terminal does: every process of the group gets it, the workers too.
        os.killpg(process.pid, signal.SIGINT)
        out, complaints = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert complaints.splitlines()[-1] == "python -m replay: interrupted; everything finished so far is kept"
    assert "Traceback" not in complaints
    kept = {file: file.read_bytes() for file in run.glob("shards/*/*.safetensors")}
    assert 4 <= len(kept) < 120
    again = subprocess.run(_command(run), capture_output=True, text=True, check=False)
    assert again.returncode in {0, 3}, again.stderr  # so late in so small a training some steps miss the tolerance
    assert len(list(run.glob("shards/*/*.safetensors"))) == 120
    assert all(file.read_bytes() == content for file, content in kept.items())
