from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest

from recorder import durable


def whole(stream: BinaryIO) -> None:
    stream.write(b"whole")


def failing(stream: BinaryIO) -> None:
    stream.write(b"half of it")
    stream.flush()
    raise OSError(28, "No space left on device")


def interrupted(stream: BinaryIO) -> None:
    stream.write(b"new")
    raise KeyboardInterrupt


def test_an_error_while_writing_leaves_neither_a_file_nor_a_temporary(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        durable.write(tmp_path / "file", failing)
    assert list(tmp_path.iterdir()) == []


def test_an_error_or_interrupt_while_replacing_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="No space left"):
        durable.write(path, failing)
    with pytest.raises(KeyboardInterrupt):
        durable.write(path, interrupted)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_nobody_sees_the_name_before_the_content_is_whole_and_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    synced: list[tuple[str, bytes | None]] = []
    fsync = os.fsync

    def spy(descriptor: int) -> None:
        what = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced.append((what.name, path.read_bytes() if path.exists() else None))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    durable.write(path, whole)
    (temporary, before), (folder, after) = synced
    assert temporary.startswith(".file.")
    assert temporary.endswith(durable.TEMPORARY_SUFFIX)
    assert before is None
    assert folder == tmp_path.name
    assert after == b"whole"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_the_file_has_the_mode_that_the_umask_asks_for(tmp_path: Path, umask: int, mode: int) -> None:
    path = tmp_path / "file"
    before = os.umask(umask)
    try:
        durable.write(path, lambda stream: None)
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_what_a_killed_writer_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    killed = "import os, sys, recorder.durable as d\nwith d.replacing(sys.argv[1]): os._exit(9)"
    assert subprocess.run([sys.executable, "-c", killed, tmp_path / "file"], check=False).returncode == 9
    others = [tmp_path / "file", tmp_path / "notes.partial", tmp_path / ".hidden"]
    for other in others:
        other.write_text("mine")
    (leftover,) = durable.sweep(tmp_path)
    assert leftover.name.startswith(".file.")
    assert sorted(tmp_path.iterdir()) == sorted(others)
    assert durable.sweep(tmp_path) == []
