"""The shard format: what is written is read back, what is not ours or not whole is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recorder.errors import DamagedFileError, FormatError, UsageError
from replay import shards
from replay.shards import PER_PARAMETER, PER_STEP, PER_UNIT, Parameter, Settings, Shard, ShardFolder, Status

SETTINGS = Settings(
    run_id="0123456789abcdef0123456789abcdef",
    parameter_table="89abcdef0123",
    path="recorded",
    loss_data="probe",
    loss_data_settings={"split": "train", "examples": 16, "seed": 0, "micro_batch": 8, "crc32": 7},
    rule="simpson",
    rtol=1e-2,
    atol=1e-5,
    dropout="off",
    chunk=8,
    recipe={"device": "cpu", "threads": 1},
)
CANONICAL = (
    '{"atol": 1e-05, "check_every": 1, "chunk": 8, "dropout": "off", "loss_data": "probe", "loss_data_settings": '
    '{"crc32": 7, "examples": 16, "micro_batch": 8, "seed": 0, "split": "train"}, "parameter_table": "89abcdef0123", '
    '"path": "recorded", "recipe": {"device": "cpu", "threads": 1}, "rtol": 0.01, "rule": "simpson", '
    '"run_id": "0123456789abcdef0123456789abcdef", "version": 1}'
)
PARAMETERS = (
    Parameter(name="out.weight", shape=(2, 5), dtype="float32", unit_axis=1),
    Parameter(name="scale", shape=(), dtype="float32"),
    Parameter(name="dead", shape=(3,), dtype="float32", status="untrained"),
)
PROVENANCE = {"run": {"created": "now"}}


def _shard(start: int, stop: int) -> Shard:
    generator, steps = np.random.default_rng(start), stop - start
    return Shard(
        per_step={
            name: np.arange(start, stop) if name == "step" else generator.integers(0, 3, steps).astype(dtype)
            for name, dtype in PER_STEP.items()
        },
        per_unit={
            quantity: {
                name: (generator.normal(size=(steps, units)) * 9).astype(dtype)
                for name, units in (("out.weight", 5), ("scale", 1))
            }
            for quantity, dtype in PER_UNIT.items()
        },
        per_parameter={
            quantity: {name: generator.normal(size=steps).astype(dtype) for name in ("out.weight", "scale")}
            for quantity, dtype in PER_PARAMETER.items()
        },
        pieces={9: 4} if start <= 9 < stop else {},
    )


@pytest.fixture
def made(tmp_path: Path) -> ShardFolder:
    folder = ShardFolder.create(tmp_path, SETTINGS, PARAMETERS, PROVENANCE)
    folder.write(0, 8, _shard(0, 8))
    folder.write(8, 11, _shard(8, 11), [(1, 8, 10), (2, 10, 11)])
    return folder


def test_what_is_written_is_read_back(made: ShardFolder, tmp_path: Path) -> None:
    (opened,) = shards.folders(tmp_path)
    assert opened.path == tmp_path / "shards" / SETTINGS.hash
    assert (opened.settings, opened.parameters, opened.provenance) == (SETTINGS, PARAMETERS, PROVENANCE)
    assert [parameter.name for parameter in opened.trained] == ["out.weight", "scale"]
    assert opened.finished() == [(0, 8), (8, 11)]
    for start, stop in opened.finished():
        found, expected = opened.read(start, stop), _shard(start, stop)
        assert found.pieces == expected.pieces
        for name, dtype in PER_STEP.items():
            assert found.per_step[name].dtype == dtype
            np.testing.assert_array_equal(found.per_step[name], expected.per_step[name])
        for quantity, dtype in (PER_UNIT | PER_PARAMETER).items():
            arrays = ({**found.per_unit, **found.per_parameter})[quantity]
            assert arrays.keys() == {"out.weight", "scale"}
            for name, array in ({**expected.per_unit, **expected.per_parameter})[quantity].items():
                assert arrays[name].dtype == dtype
                np.testing.assert_array_equal(arrays[name], array)


def test_a_reader_that_knows_only_the_format_page_reads_a_shard(made: ShardFolder) -> None:
    data = made.file(8, 11).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    metadata = header.pop("__metadata__")
    assert json.loads(metadata["facts"]) == {
        "format": "lossledger-shards",
        "version": 1,
        "settings": SETTINGS.hash,
        "start": 8,
        "stop": 11,
        "attempts": [[1, 8, 10], [2, 10, 11]],
        "pieces": [[9, 4]],
    }
    kinds = {"F64": "<f8", "I64": "<i8", "U8": "u1"}
    arrays = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        assert json.loads(metadata["crc32"])[name] == zlib.crc32(body[start:stop])
        arrays[name] = np.frombuffer(body[start:stop], kinds[entry["dtype"]]).reshape(entry["shape"])
    expected = _shard(8, 11)
    assert arrays.keys() == {
        *PER_STEP,
        *(f"{quantity}/{name}" for quantity in PER_UNIT | PER_PARAMETER for name in ("out.weight", "scale")),
    }
    np.testing.assert_array_equal(arrays["step"], [8, 9, 10])
    np.testing.assert_array_equal(arrays["sum/out.weight"], expected.per_unit["sum"]["out.weight"])
    assert arrays["status"].dtype == np.uint8
    assert arrays["positive_count/scale"].shape == (3, 1)
    assert arrays["cosine/scale"].shape == (3,)
    assert [status.name for status in Status] == ["CONVERGED", "TOLERANCE_NOT_MET", "NOT_FINITE", "NOT_CHECKED"]
    assert [int(status) for status in Status] == [0, 1, 2, 3]


def _with(mapping: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    return {**mapping, name: value}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda shard: dataclasses.replace(
                shard, per_step=_with(shard.per_step, "residual", np.zeros(8, np.float32))
            ),
            r"residual: expected float64 of shape \(8,\), got float32 of shape \(8,\)",
        ),
        (
            lambda shard: dataclasses.replace(shard, per_step=_with(shard.per_step, "status", np.zeros(7, np.uint8))),
            r"status: expected uint8 of shape \(8,\), got uint8 of shape \(7,\)",
        ),
        (
            lambda shard: dataclasses.replace(
                shard,
                per_unit=_with(shard.per_unit, "sum", _with(shard.per_unit["sum"], "out.weight", np.zeros((8, 2)))),
            ),
            r"sum/out\.weight: expected float64 of shape \(8, 5\), got float64 of shape \(8, 2\)",
        ),
    ],
)
def test_arrays_of_a_wrong_shape_or_dtype_are_not_written(
    made: ShardFolder, change: Callable[[Shard], Shard], complaint: str
) -> None:
    before = made.file(0, 8).read_bytes()
    with pytest.raises(ValueError, match=complaint):
        made.write(0, 8, change(_shard(0, 8)))
    assert made.file(0, 8).read_bytes() == before


def test_a_shard_moved_from_other_settings_is_refused(made: ShardFolder, tmp_path: Path) -> None:
    other = ShardFolder.create(tmp_path, dataclasses.replace(SETTINGS, chunk=4), PARAMETERS, PROVENANCE)
    shutil.copy(made.file(0, 8), other.file(0, 8))
    with pytest.raises(FormatError, match=rf"expected a shard of settings {other.path.name}, found '{SETTINGS.hash}'"):
        other.read(0, 8)


def test_a_shard_under_the_name_of_other_steps_is_refused(made: ShardFolder) -> None:
    made.file(0, 8).rename(made.file(16, 24))
    with pytest.raises(FormatError, match=r"expected the steps of its name, found steps 0 to 8 \(not included\)"):
        made.read(16, 24)


def test_overlapping_shards_are_refused(made: ShardFolder) -> None:
    shutil.copy(made.file(8, 11), made.file(7, 9))
    with pytest.raises(FormatError, match="two shards both hold step 7; remove one of them"):
        made.finished()


def test_a_shard_of_more_steps_takes_the_place_of_those_it_contains(made: ShardFolder) -> None:
    before = made.file(8, 11).read_bytes()
    made.write(8, 16, _shard(8, 16))
    assert made.finished() == [(0, 8), (8, 16)]
    assert not made.file(8, 11).exists()
    # A kill between the two leaves both.
    made.file(8, 11).write_bytes(before)
    assert made.finished() == [(0, 8), (8, 16)]


def test_flipped_bits_are_noticed(made: ShardFolder) -> None:
    data = bytearray(made.file(0, 8).read_bytes())
    data[-1] ^= 1
    made.file(0, 8).write_bytes(data)
    with pytest.raises(DamagedFileError, match=r"cosine/scale' is damaged: expected CRC-32 \d+, found \d+"):
        made.read(0, 8)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            {"version": 2},
            "expected format lossledger-shards version 1, found 'lossledger-shards' version 2.*Run python",
        ),
        ({"format": "lossledger-run"}, "expected format lossledger-shards version 1, found 'lossledger-run' version 1"),
        ({"settings": {"run_id": "x"}}, "a field of the settings is missing or unknown .*missing 10 required"),
        ({"settings": {**dataclasses.asdict(SETTINGS), "new": 1}}, "missing or unknown .*unexpected keyword.*'new'"),
        ({"parameters": [{"name": "w", "shape": [1]}]}, "row 'w': missing fields .*dtype"),
        (None, "expected a JSON object, found list"),
    ],
)
def test_settings_of_another_version_or_with_unknown_fields_are_refused(
    made: ShardFolder, change: dict[str, Any] | None, complaint: str
) -> None:
    file = made.path / "settings.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps([document] if change is None else {**document, **change}))
    with pytest.raises(FormatError, match=complaint):
        ShardFolder.open(made.path)


def test_settings_that_are_no_json_are_refused(made: ShardFolder) -> None:
    (made.path / "settings.json").write_text("{")
    with pytest.raises(FormatError, match=r"settings\.json: cannot be read as the settings of a folder of shards"):
        ShardFolder.open(made.path)


def test_the_hash_of_fixed_settings_never_changes() -> None:
    assert hashlib.sha256(CANONICAL.encode()).hexdigest()[:12] == SETTINGS.hash == "9ea980712dae"


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Settings)])
def test_the_hash_changes_with_every_setting(field: str) -> None:
    value = getattr(SETTINGS, field)
    other: Any = {**value, "more": 1} if isinstance(value, dict) else value * 2
    assert dataclasses.replace(SETTINGS, **{field: other}).hash != SETTINGS.hash


def test_the_hash_does_not_depend_on_the_order_of_entries() -> None:
    turned = dict(reversed(list(SETTINGS.loss_data_settings.items())))
    assert dataclasses.replace(SETTINGS, loss_data_settings=turned).hash == SETTINGS.hash


def test_making_a_folder_again_touches_nothing_and_sweeps_only_what_a_killed_writer_left(
    made: ShardFolder, tmp_path: Path
) -> None:
    file = made.path / "settings.json"
    before = (file.stat().st_ino, file.stat().st_mtime_ns)
    stale, young = (made.path / f".{name}.partial" for name in ("stale", "young"))
    stale.touch()
    young.touch()
    os.utime(stale, (time.time() - 7200,) * 2)
    again = ShardFolder.create(tmp_path, SETTINGS, PARAMETERS, PROVENANCE)
    assert again.finished() == [(0, 8), (8, 11)]
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == before
    # The young one is another process's, at work in the same folder.
    assert [entry.name for entry in made.path.glob(".*")] == [".young.partial"]


def test_a_run_without_shards_is_told_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"{tmp_path}: holds no shards; run first: python -m replay --run {tmp_path}"):
        shards.folders(tmp_path)
    ShardFolder.create(tmp_path, SETTINGS, PARAMETERS, PROVENANCE)
    with pytest.raises(UsageError, match="holds no shards"):
        shards.folders(tmp_path)
    with pytest.raises(UsageError, match=f"no such run folder: {tmp_path / 'none'}"):
        shards.folders(tmp_path / "none")


def test_shards_are_read_without_torch(made: ShardFolder, tmp_path: Path) -> None:
    program = (
        "import pathlib, sys\n"
        "from replay import shards\n"
        f"(folder,) = shards.folders(pathlib.Path({str(tmp_path)!r}))\n"
        "folder.read(0, 8)\n"
        "print(sorted({'torch', 'dask', 'distributed'} & set(sys.modules)))\n"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout == "[]\n"
