from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recorder import tensorfile
from recorder.errors import DamagedFileError, FormatError
from recorder.tensorfile import TensorFile

FEW = settings(max_examples=60, deadline=None)

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
    torch.bool,
]

SMALL: dict[str, torch.Tensor] = {
    "parameters/00000000/a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(3),
    "mask": torch.tensor([True, False, True]),
}
SMALL_FACTS = {"steps": [1, 2], "loss": "nan", "name": "größe"}


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any dtype, any bytes (so every NaN payload), any shape of up to 3 axes with 0, sometimes not contiguous."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    size = int(np.prod(shape, dtype=int)) * dtype.itemsize
    raw = draw(st.binary(min_size=size, max_size=size))
    if dtype is torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.zeros(0, dtype=torch.uint8)
    tensor = flat.view(dtype).reshape(shape)
    if draw(st.booleans()) and tensor.dim() > 1:
        return tensor.transpose(0, -1)
    return tensor


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def contents(path: Path) -> tuple[dict[str, Any], dict[str, tuple[torch.dtype, torch.Size, bytes]]]:
    file = TensorFile(path)
    read = {name: file.tensor(name) for name in file.names}
    return file.facts, {name: (tensor.dtype, tensor.shape, raw_bytes(tensor)) for name, tensor in read.items()}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.safetensors"
    tensorfile.write(path, SMALL, SMALL_FACTS)
    return path


@FEW
@given(written=st.dictionaries(st.text("abc/.0é", min_size=1), tensors(), max_size=4))
def test_every_tensor_comes_back_with_its_dtype_shape_and_very_bits(
    written: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("roundtrip") / "file.safetensors"
    tensorfile.write(path, written, {"n": len(written)})
    facts, read = contents(path)
    assert facts == {"n": len(written)}
    assert read == {name: (tensor.dtype, tensor.shape, raw_bytes(tensor)) for name, tensor in written.items()}


@FEW
@given(tensor=tensors().filter(lambda tensor: tensor.dtype is not torch.bfloat16))
def test_numpy_arrays_are_written_and_read_like_tensors(
    tensor: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("numpy") / "file.safetensors"
    array = tensor.numpy()
    tensorfile.write(path, {"x": array}, {})
    read = TensorFile(path).array("x")
    assert (read.dtype, read.shape, read.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert tensorfile.checksum(array) == tensorfile.checksum(tensor)


def test_stock_safetensors_readers_open_the_file(small: Path) -> None:
    loaded = safetensors.torch.load_file(small)
    assert set(loaded) == set(SMALL)
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in SMALL.items()
    )
    numpy_path = small.with_name("numpy.safetensors")
    tensorfile.write(numpy_path, {"x": np.arange(4).reshape(2, 2)}, {})
    np.testing.assert_array_equal(safetensors.numpy.load_file(numpy_path)["x"], [[0, 1], [2, 3]])


def test_the_data_starts_at_a_multiple_of_eight_bytes_whatever_the_facts(tmp_path: Path) -> None:
    for length in range(9):
        path = tmp_path / f"{length}.safetensors"
        tensorfile.write(path, {"x": torch.ones(2, dtype=torch.float64)}, {"text": "x" * length})
        (header_length,) = struct.unpack("<Q", path.read_bytes()[:8])
        assert header_length % 8 == 0
        assert TensorFile(path).tensor("x").tolist() == [1.0, 1.0]


def test_a_file_cut_at_any_length_is_damaged_never_a_wrong_tensor(small: Path) -> None:
    whole = small.read_bytes()
    for length in range(len(whole)):
        small.write_bytes(whole[:length])
        with pytest.raises(DamagedFileError, match=f"small.safetensors.*{length} bytes on disk"):
            TensorFile(small)


def test_a_file_with_bytes_added_is_damaged(small: Path) -> None:
    small.write_bytes(small.read_bytes() + b"\0" * 8)
    with pytest.raises(DamagedFileError, match="not a whole safetensors file"):
        TensorFile(small)


def test_a_flipped_bit_anywhere_in_the_file_is_noticed(small: Path) -> None:
    whole = small.read_bytes()
    undamaged = contents(small)
    unnoticed = []
    for position in range(len(whole)):
        for bit in (1 << (position % 8), 0x20, 0x80):  # 0x20 turns a letter's case, 0x80 leaves ASCII
            damaged = bytearray(whole)
            damaged[position] ^= bit
            small.write_bytes(damaged)
            try:
                found = contents(small)
            except DamagedFileError:
                continue
            unnoticed.append((position, bit, found == undamaged))
    assert unnoticed == []


def test_two_tensors_of_one_size_exchanged_in_the_header_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    tensorfile.write(path, {"a": torch.zeros(2), "b": torch.zeros(2)}, {})
    path.write_bytes(path.read_bytes().replace(b'"a":{"dtype":"F32"', b'"a":{"dtype":"I32"'))
    with pytest.raises(DamagedFileError, match="header is damaged"):
        TensorFile(path)


def test_the_message_for_a_damaged_tensor_names_file_tensor_and_both_checksums(small: Path) -> None:
    whole = bytearray(small.read_bytes())
    whole[-1] ^= 1  # the last tensor is `mask`
    small.write_bytes(whole)
    file = TensorFile(small)
    assert torch.equal(file.tensor("scalar"), SMALL["scalar"])
    expected = tensorfile.checksum(SMALL["mask"])
    with pytest.raises(DamagedFileError, match=rf"small\.safetensors: tensor 'mask'.*{expected}, found \d+.*copy"):
        file.tensor("mask")


def test_a_file_of_somebody_else_is_refused_and_a_missing_tensor_named(small: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(1)}, foreign, metadata={"facts": "{}"})
    with pytest.raises(DamagedFileError, match=r"its header lacks crc32, header_crc32"):
        TensorFile(foreign)
    with pytest.raises(DamagedFileError, match="holds no tensor named 'absent'"):
        TensorFile(small).tensor("absent")
    with pytest.raises(DamagedFileError, match="0 bytes on disk"):
        TensorFile(tmp_path / "nowhere.safetensors")


def test_what_safetensors_or_json_cannot_hold_is_refused_before_a_file_appears(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    with pytest.raises(FormatError, match="tensor 'z' has dtype complex64"):
        tensorfile.write(path, {"z": torch.zeros(1, dtype=torch.complex64)}, {})
    with pytest.raises(FormatError, match="tensor 'big' has dtype >f4"):
        tensorfile.write(path, {"big": np.zeros(1, dtype=">f4")}, {})
    with pytest.raises(ValueError, match="JSON"):
        tensorfile.write(path, {}, {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_numpy_says_that_it_has_no_bfloat16(small: Path) -> None:
    with pytest.raises(FormatError, match=r"tensor 'half'.*read it as a torch tensor"):
        TensorFile(small).array("half")


def test_facts_keep_their_order(tmp_path: Path) -> None:
    facts = {"z": 1, "a": {"y": 2, "b": 3}}
    tensorfile.write(tmp_path / "file.safetensors", {}, facts)
    found = TensorFile(tmp_path / "file.safetensors").facts
    assert (list(found), list(found["a"])) == (["z", "a"], ["y", "b"])


def test_the_header_is_plain_json_with_facts_and_checksums_as_text(small: Path) -> None:
    raw = small.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    metadata = json.loads(raw[8 : 8 + length])["__metadata__"]
    assert json.loads(metadata["facts"]) == SMALL_FACTS
    assert json.loads(metadata["crc32"]) == {name: tensorfile.checksum(tensor) for name, tensor in SMALL.items()}
