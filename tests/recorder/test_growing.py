from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from recorder import growing
from recorder.growing import GrowingTensorFile, header_bytes
from recorder.tensorfile import TensorFile

Tensors = dict[str, Any]

APPENDS: list[tuple[Tensors, dict[str, Any]]] = [
    ({"a": np.arange(5, dtype=np.float32), "b": np.zeros((0, 3))}, {"first": True}),
    ({"c": np.array(7, np.int64)}, {"loss": "nan"}),
    ({}, {"no": "tensors"}),
    ({"d": np.array([True, False])}, {"größe": 'quotes " and \\'}),
]
ROOM = sum(header_bytes(*append) for append in APPENDS)


def grown(folder: Path, appends: list[tuple[Tensors, dict[str, Any]]] = APPENDS) -> GrowingTensorFile:
    file = GrowingTensorFile(folder, "x", ROOM)
    for tensors, row in appends:
        assert file.append(tensors, row)
    return file


def killed(folder: Path, appends: list[tuple[Tensors, dict[str, Any]]] = APPENDS) -> tuple[Path, Path]:
    """A file in the making whose process is gone: its data and its journal."""
    grown(folder, appends).close()
    return folder / ".x.growing", folder / ".x.journal"


def recovered(folder: Path) -> list[dict[str, Any]]:
    file = GrowingTensorFile.recover(folder, "x")
    if file is None:
        return []
    rows = [dict(append.row) for append in file.appends]
    file.seal(folder / "sealed.safetensors", {"rows": rows})
    assert_holds(folder / "sealed.safetensors", APPENDS[: len(rows)])
    return rows


def assert_holds(path: Path, appends: list[tuple[Tensors, dict[str, Any]]]) -> None:
    file = TensorFile(path)
    expected = {name: array for tensors, _ in appends for name, array in tensors.items()}
    assert set(file.names) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(file.array(name), array, strict=True)
    assert file.facts["rows"] == [row for _, row in appends]


def test_a_sealed_file_is_a_tensor_file_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    file = grown(tmp_path)
    path = tmp_path / "sealed.safetensors"
    file.seal(path, {"rows": [append.row for append in file.appends]})
    assert_holds(path, APPENDS)
    assert list(tmp_path.iterdir()) == [path]
    assert set(safetensors.numpy.load_file(path)) == {"a", "b", "c", "d"}
    assert path.stat().st_size == file.bytes


def test_the_final_name_appears_only_once_the_file_is_whole_and_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = grown(tmp_path)
    path = tmp_path / "sealed.safetensors"
    synced: list[tuple[str, bool]] = []
    fsync = os.fsync

    def spy(descriptor: int) -> None:
        synced.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, path.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    file.seal(path, {})
    assert synced == [(".x.growing", False), (tmp_path.name, True)]


def test_what_a_killed_process_appended_is_recovered(tmp_path: Path) -> None:
    program = """
import os, sys
from pathlib import Path
import numpy as np
from recorder.growing import GrowingTensorFile
file = GrowingTensorFile(Path(sys.argv[1]), "x", 4096)
for n in range(3):
    file.append({f"tensor{n}": np.full(1000, n)}, {"n": n})
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", program, tmp_path], check=False).returncode == -9
    assert growing.unfinished(tmp_path) == ["x"]
    file = GrowingTensorFile.recover(tmp_path, "x")
    assert file is not None
    file.seal(tmp_path / "sealed.safetensors", {"rows": [dict(append.row) for append in file.appends]})
    assert_holds(tmp_path / "sealed.safetensors", [({f"tensor{n}": np.full(1000, n)}, {"n": n}) for n in range(3)])
    assert growing.unfinished(tmp_path) == []


def test_a_journal_torn_anywhere_gives_its_whole_lines(tmp_path: Path) -> None:
    _, journal = killed(tmp_path)
    whole = journal.read_bytes()
    ends = [position + 1 for position, byte in enumerate(whole) if byte == ord("\n")]
    growing.remove(tmp_path, "x")
    for length in range(len(whole) + 1):
        _, journal = killed(tmp_path)
        journal.write_bytes(whole[:length])
        expected = [row for (_, row), end in zip(APPENDS, ends[1:], strict=True) if end <= length]
        assert recovered(tmp_path) == expected
        growing.remove(tmp_path, "x")


def test_data_torn_anywhere_gives_the_appends_before(tmp_path: Path) -> None:
    data, _ = killed(tmp_path)
    whole = data.stat().st_size
    start = whole - sum(np.asarray(array).nbytes for tensors, _ in APPENDS for array in tensors.values())
    growing.remove(tmp_path, "x")
    for length in range(start, whole + 1):
        data, _ = killed(tmp_path)
        os.truncate(data, length)
        missing = whole - length
        # From the end: two bytes of d, an append without tensors, eight bytes of c, twenty of a.
        expected = 4 if missing == 0 else 3 if missing <= 2 else 1 if missing <= 10 else 0
        assert recovered(tmp_path) == [row for _, row in APPENDS[:expected]]
        growing.remove(tmp_path, "x")


@pytest.mark.parametrize(("tensor", "kept"), [("a", 0), ("c", 1), ("d", 3)])
def test_bytes_that_are_not_those_of_the_journal_end_what_is_recovered(tmp_path: Path, tensor: str, kept: int) -> None:
    data, journal = killed(tmp_path)
    lines = [json.loads(line.split(b" ", 1)[1]) for line in journal.read_bytes().splitlines()]
    (offset,) = (line["tensors"][tensor]["data_offsets"][0] for line in lines[1:] if tensor in line["tensors"])
    damaged = bytearray(data.read_bytes())
    damaged[lines[0]["data_start"] + offset] ^= 1
    data.write_bytes(damaged)
    assert recovered(tmp_path) == [row for _, row in APPENDS[:kept]]


def test_a_line_that_fails_its_checksum_and_all_after_it_do_not_count(tmp_path: Path) -> None:
    _, journal = killed(tmp_path)
    lines = journal.read_bytes().splitlines(keepends=True)
    for line in lines:
        digits, _, text = line[:-1].partition(b" ")
        assert int(digits, 16) == zlib.crc32(text)
    journal.write_bytes(b"".join([*lines[:2], lines[2].replace(b"nan", b"inf"), *lines[3:]]))
    assert recovered(tmp_path) == [APPENDS[0][1]]


@pytest.mark.parametrize("missing", [".x.growing", ".x.journal"])
def test_half_of_a_pair_is_nothing_to_recover_and_can_be_removed(tmp_path: Path, missing: str) -> None:
    killed(tmp_path)
    (tmp_path / missing).unlink()
    assert growing.unfinished(tmp_path) == ["x"]
    assert GrowingTensorFile.recover(tmp_path, "x") is None
    growing.remove(tmp_path, "x")
    assert list(tmp_path.iterdir()) == []


def test_a_recovered_file_can_grow_on(tmp_path: Path) -> None:
    killed(tmp_path, APPENDS[:2])
    file = GrowingTensorFile.recover(tmp_path, "x")
    assert file is not None
    for tensors, row in APPENDS[2:]:
        assert file.append(tensors, row)
    file.seal(tmp_path / "sealed.safetensors", {"rows": [dict(append.row) for append in file.appends]})
    assert_holds(tmp_path / "sealed.safetensors", APPENDS)


def test_bytes_written_before_a_kill_and_not_in_the_journal_are_cut_off(tmp_path: Path) -> None:
    _, journal = killed(tmp_path)
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:2]))
    assert recovered(tmp_path) == [APPENDS[0][1]]
    raw = (tmp_path / "sealed.safetensors").read_bytes()
    assert len(raw) == 8 + struct.unpack_from("<Q", raw)[0] + 20


def test_an_append_that_the_header_has_no_room_for_adds_nothing(tmp_path: Path) -> None:
    file = GrowingTensorFile(tmp_path, "x", 0)  # the smallest room
    row = {"text": "x" * 400}
    number = 0
    while file.append({f"t{number}": np.zeros(3)}, row):
        number += 1
    assert number > 1
    data, journal = tmp_path / ".x.growing", tmp_path / ".x.journal"
    size, lines = data.stat().st_size, journal.read_bytes()
    assert not file.append({"one more": np.zeros(3)}, row)
    assert (data.stat().st_size, journal.read_bytes(), file.bytes) == (size, lines, size)
    file.seal(tmp_path / "sealed.safetensors", {"rows": [append.row for append in file.appends]})
    assert_holds(tmp_path / "sealed.safetensors", [({f"t{n}": np.zeros(3)}, row) for n in range(number)])


names = st.text(min_size=1, max_size=12)
arrays = st.lists(st.integers(0, 255), max_size=6).map(lambda entries: np.array(entries, np.uint8))
values = st.recursive(
    st.none() | st.integers() | st.text(max_size=9), lambda inner: st.lists(inner, max_size=3), max_leaves=5
)
rows = st.dictionaries(st.text(max_size=5), values, max_size=3)


@settings(max_examples=60, deadline=None)
@given(appends=st.lists(st.tuples(st.dictionaries(names, arrays, max_size=3), rows), max_size=5))
def test_the_room_asked_for_is_enough_whatever_is_appended(
    appends: list[tuple[Tensors, dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    appends = [
        ({f"{number}{name}": array for name, array in tensors.items()}, row)
        for number, (tensors, row) in enumerate(appends)
    ]
    folder = tmp_path_factory.mktemp("room")
    file = GrowingTensorFile(folder, "x", sum(header_bytes(*append) for append in appends))
    for append in appends:
        assert file.append(*append)
    file.seal(folder / "sealed.safetensors", {"rows": [append.row for append in file.appends]})
    assert_holds(folder / "sealed.safetensors", appends)


def test_a_name_in_use_is_not_taken_over(tmp_path: Path) -> None:
    file = grown(tmp_path)
    with pytest.raises(FileExistsError):
        GrowingTensorFile(tmp_path, "x", 0)
    file.seal(tmp_path / "sealed.safetensors", {"rows": [append.row for append in file.appends]})
    assert_holds(tmp_path / "sealed.safetensors", APPENDS)


def test_a_discarded_file_leaves_nothing(tmp_path: Path) -> None:
    grown(tmp_path).discard()
    assert list(tmp_path.iterdir()) == []
