"""Tensors in one safetensors file, written whole, with a checksum for every tensor.

Segments of a run and shards of a replay are both such files. Any safetensors reader opens them. Facts that are no
tensors travel as JSON text in the header's ``__metadata__`` (safetensors allows text only):

    {"facts": "<JSON object>", "crc32": "<JSON object: tensor name -> CRC-32 of its bytes>",
     "header_crc32": "<8 hexadecimal digits>"}

The last entry ends the header and covers every byte of it before its own digits, so that a flipped bit in a shape,
a dtype or a fact is noticed too.

The bytes are written here and not by ``safetensors.save_file``, which never syncs to disk, ignores the umask and
leaves hidden full-size files behind when killed. Ground floor: torch is imported only by `TensorFile.tensor`.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from recorder import durable
from recorder.errors import DamagedFileError, FormatError

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    Array = npt.NDArray[Any] | torch.Tensor

_DTYPE_CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
_HEADER_ALIGNMENT = 8
_SMALL = 1 << 24
"""Bytes of a file that may stay mapped: mapping it again would cost more than it gives back."""

_METADATA_ENTRIES = ("facts", "crc32", "header_crc32")
_HEADER_END = '00000000"}}'  # the digits of header_crc32, and what closes the JSON


def _name_of_dtype(array: Array) -> str:
    return str(array.dtype).removeprefix("torch.")


def content(array: Array) -> memoryview:
    """Return the bytes of an array or a CPU tensor, in C order.

    Parameters
    ----------
    array
        A NumPy array, or a torch tensor of any dtype (bfloat16 too) in host memory.

    Returns
    -------
    memoryview
        Unsigned bytes; a view of the array's own memory where that is contiguous.
    """
    if isinstance(array, np.ndarray):
        flat: Any = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    else:
        import torch

        flat = array.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def checksum(array: Array) -> int:
    """Return the CRC-32 (zlib) of the bytes of an array or tensor.

    Parameters
    ----------
    array
        As for `content`.

    Returns
    -------
    int
        An unsigned 32-bit number.
    """
    return zlib.crc32(content(array))


def write(path: Path, tensors: Mapping[str, Array], facts: Mapping[str, Any]) -> None:
    """Write tensors and facts to `path`, durably and all at once.

    Parameters
    ----------
    path
        The final path.
    tensors
        Name to NumPy array or CPU torch tensor.
    facts
        A JSON object.
    """
    bodies = {name: content(array) for name, array in tensors.items()}
    entries, _ = header_entries(path, tensors)
    text = header_text(entries, {name: zlib.crc32(body) for name, body in bodies.items()}, facts)

    def body_of_file(stream: BinaryIO) -> None:
        stream.write(text)
        for body in bodies.values():
            stream.write(body)

    durable.write(path, body_of_file)


def header_entries(path: Path, tensors: Mapping[str, Array], offset: int = 0) -> tuple[dict[str, dict[str, Any]], int]:
    """Describe tensors as a safetensors header does, one behind the other.

    Parameters
    ----------
    path
        The file they are for, named in errors.
    tensors
        Name to array or tensor.
    offset
        Where the first one starts, in bytes after the header.

    Returns
    -------
    entries : dict
        Name to ``{"dtype", "shape", "data_offsets"}``.
    end : int
        Where the last one ends.

    Raises
    ------
    FormatError
        If a tensor's dtype has no safetensors code.
    """
    entries: dict[str, dict[str, Any]] = {}
    for name, array in tensors.items():
        dtype = _name_of_dtype(array)
        if dtype not in _DTYPE_CODES:
            message = f"{path}: tensor {name!r} has dtype {dtype}, which a safetensors file cannot hold"
            raise FormatError(message)
        end = offset + array.nbytes
        entries[name] = {"dtype": _DTYPE_CODES[dtype], "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    return entries, offset


def header_text(
    entries: Mapping[str, Mapping[str, Any]],
    checksums: Mapping[str, int],
    facts: Mapping[str, Any],
    length: int | None = None,
) -> bytes:
    """Put together what stands before the tensors' bytes: the header's length, the header, its padding.

    Parameters
    ----------
    entries
        As `header_entries` gives them.
    checksums
        Tensor name to CRC-32.
    facts
        A JSON object.
    length
        Bytes to pad the header to; a multiple of 8 by default.

    Returns
    -------
    bytes
        Eight bytes of length, then as many bytes of JSON and spaces.

    Raises
    ------
    FormatError
        If the header is longer than `length`.
    """
    values = (json.dumps(facts, allow_nan=False), json.dumps(dict(checksums)), _HEADER_END[:8])
    document = {**entries, "__metadata__": dict(zip(_METADATA_ENTRIES, values, strict=True))}
    text = json.dumps(document, separators=(",", ":")).encode()
    text = _sealed(text[: -len(_HEADER_END)])
    if length is None:
        length = len(text) + (-len(text)) % _HEADER_ALIGNMENT
    if len(text) > length:
        message = f"a header of {len(text)} bytes does not fit in the {length} bytes kept for it"
        raise FormatError(message)
    return struct.pack("<Q", length) + text.ljust(length)


def _sealed(covered: bytes) -> bytes:
    return covered + f"{zlib.crc32(covered):08x}{_HEADER_END[8:]}".encode()


def _header(path: Path) -> bytes:
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        return stream.read(length).rstrip(b" ")


def _expected_bytes(path: Path) -> int | None:
    # Where the header is still there to tell.
    try:
        header = _header(path)
        offsets = [entry["data_offsets"][1] for name, entry in json.loads(header).items() if name != "__metadata__"]
        with path.open("rb") as stream:
            return 8 + int.from_bytes(stream.read(8), "little") + max(offsets, default=0)
    except Exception:  # whatever damage does to a header
        return None


class TensorFile:
    """A file that `write` made, opened for reading tensor by tensor.

    Parameters
    ----------
    path
        The file.

    Attributes
    ----------
    facts : dict
        The JSON object given to `write`.

    Raises
    ------
    DamagedFileError
        If the file is truncated, is no safetensors file, lacks our header entries, or its header is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        metadata: dict[str, str] = {}
        try:
            handle: Any = safe_open(self.path, framework="numpy")
            metadata = handle.metadata() or {}
            self._names = dict.fromkeys(handle.keys())
            header = _header(self.path)
        except (SafetensorError, OSError) as error:
            size = self.path.stat().st_size if self.path.exists() else 0
            expected = _expected_bytes(self.path)
            told = "" if expected is None else f"By its header it has {expected} bytes. "
            message = (
                f"{self.path}: not a whole safetensors file ({size} bytes on disk; {error}). "
                f"{told}It was truncated or damaged after it was written; restore it from a copy, or leave its steps "
                "out."
            )
            raise DamagedFileError(message) from error
        missing = [entry for entry in _METADATA_ENTRIES if entry not in metadata]
        if missing:
            message = (
                f"{self.path}: a safetensors file, but not one that this version of lossledger wrote "
                f"(its header lacks {', '.join(missing)})"
            )
            raise DamagedFileError(message)
        sealed = _sealed(header[: -len(_HEADER_END)])
        if header != sealed:
            expected_end, found_end = (
                text[-len(_HEADER_END) :][:8].decode(errors="replace") for text in (header, sealed)
            )
            message = (
                f"{self.path}: the header is damaged: expected CRC-32 {expected_end}, found {found_end}. "
                "Restore the file from a copy, or leave its steps out."
            )
            raise DamagedFileError(message)
        self.facts: dict[str, Any] = json.loads(metadata["facts"])
        self._checksums: dict[str, int] = json.loads(metadata["crc32"])
        self._handles: dict[str, Any] = {"numpy": handle}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors in the file."""
        return tuple(self._names)

    def sizes(self) -> dict[str, int]:
        """Count the bytes of every tensor in the file; none of them is read.

        Returns
        -------
        dict of str to int
            Name to bytes.
        """
        entries = json.loads(_header(self.path))
        return {name: entries[name]["data_offsets"][1] - entries[name]["data_offsets"][0] for name in self._names}

    def _read(self, name: str, framework: str) -> Any:
        if name not in self._names:
            message = f"{self.path}: holds no tensor named {name!r}"
            raise DamagedFileError(message)
        try:
            if framework not in self._handles:
                self._handles[framework] = safe_open(self.path, framework=framework)
            array = self._handles[framework].get_tensor(name)
        except (SafetensorError, OSError) as error:
            message = f"{self.path}: tensor {name!r} cannot be read ({error})"
            raise DamagedFileError(message) from error
        except TypeError as error:
            message = f"{self.path}: NumPy has no dtype for tensor {name!r} ({error}); read it as a torch tensor"
            raise FormatError(message) from error
        found = checksum(array)
        if found != self._checksums.get(name):
            nbytes = memoryview(content(array)).nbytes
            message = (
                f"{self.path}: tensor {name!r} is damaged: expected CRC-32 {self._checksums.get(name)}, found {found} "
                f"in its {nbytes:,} bytes. Restore the file from a copy, or leave its steps out."
            )
            raise DamagedFileError(message)
        return array

    def let_go(self) -> None:
        """Unmap the file, unless it is small; the next read maps it again.

        What has been read through a mapping counts as memory of the process for as long as it lasts: of a segment of
        many steps, many times the memory of one.
        """
        if self.path.stat().st_size > _SMALL:
            self._handles.clear()

    def array(self, name: str) -> npt.NDArray[Any]:
        """Read one tensor as a NumPy array; a `DamagedFileError` tells if its bytes fail their checksum.

        Parameters
        ----------
        name
            One of `names`.

        Returns
        -------
        numpy.ndarray
            A fresh array in the stored dtype and shape.
        """
        array: npt.NDArray[Any] = self._read(name, "numpy")
        return array

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor as a torch tensor in host memory; checked as by `array`.

        Parameters
        ----------
        name
            One of `names`.

        Returns
        -------
        torch.Tensor
            A fresh tensor in the stored dtype and shape.
        """
        tensor: torch.Tensor = self._read(name, "pt")
        return tensor
