"""One training step's parameters, coded without loss against the one or two steps before.

The residuals that `recorder.prediction` leaves are cut into fields of 4 or 8 bits: low ones that are pure noise and
are stored as they are, and higher ones that nearly repeat and are compressed by zstd. Blocks of entries are coded each
on its own, so that the scratch memory stays in the processor's cache. NumPy and zstd release the interpreter lock, so
a thread can code beside a training loop. The format page is ``docs/formats/step-coding.md``. Ground floor: no torch.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import zstandard

from recorder.errors import DamagedFileError, UsageError
from recorder.prediction import LARGEST_SHIFT, Bits, Predictor

Coded: TypeAlias = bytes | bytearray | memoryview | npt.NDArray[np.uint8]

BLOCK_SIZE: Final = 1 << 18  # entries in every block but the last

_FLOATS = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
_INTEGERS = {
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint64": 8,
    "uint32": 4,
    "uint16": 2,
    "uint8": 1,
    "bool": 1,
}

_HEADER = struct.Struct("<QBB")  # entries, bits in an entry, whether they are floats
_BLOCK_HEADER = struct.Struct("<BB")  # shift of the prediction, number of fields
_FIELD_HEADER = struct.Struct("<BBI")  # bits, storage, bytes
_RAW, _ZSTD = 0, 1

# Residuals have no repetitions to find, only frequent values: the smallest table and the longest match make zstd a
# fast Huffman coder. Above 97 % of its size in a trial, a field is noise and not worth the time; short fields, whose
# trial would be all header, are compressed at once.
_ZSTD_PARAMETERS: Final = zstandard.ZstdCompressionParameters(
    window_log=18,
    hash_log=6,
    chain_log=6,
    search_log=1,
    min_match=7,
    target_length=0,
    strategy=zstandard.STRATEGY_FAST,
)
_TRIAL_FROM = 1 << 15
_TRIAL_STRIDE = 15
_NOISE = 0.97

_PAIRED_BELOW = 1.3  # bits of magnitude below which the lowest field has 4 bits


class _MalformedError(Exception):
    pass


def bit_dtype(dtype: str) -> np.dtype[Any]:
    """Return the unsigned dtype that holds the bit patterns of a dtype.

    Parameters
    ----------
    dtype
        As torch prints it without the prefix: ``float32``, ``bfloat16``, ``int64``, ``bool``, ...

    Returns
    -------
    numpy.dtype
        ``uint8``, ``uint16``, ``uint32`` or ``uint64``.

    Raises
    ------
    UsageError
        If no step of this dtype can be coded.

    Examples
    --------
    >>> bit_dtype("bfloat16")
    dtype('uint16')
    """
    itemsize = _FLOATS.get(dtype) or _INTEGERS.get(dtype)
    if itemsize is None:
        known = ", ".join((*_FLOATS, *_INTEGERS))
        message = f"cannot code a tensor of dtype {dtype}: expected one of {known}. Leave the tensor out or convert it."
        raise UsageError(message)
    return np.dtype(f"u{itemsize}")


class StepCoder:
    """Codes flat arrays of one dtype and size against the steps before them.

    All scratch memory is allocated once and reused. An object serves one thread at a time.

    Parameters
    ----------
    dtype
        As torch prints it without the prefix. ``float64``, ``float32``, ``float16`` and ``bfloat16`` are coded as
        floats, all others as plain integers of their size.
    size
        Entries in every array that is coded.

    Examples
    --------
    >>> coder = StepCoder("float32", 3)
    >>> old, new = (np.array(values, np.float32).view(np.uint32) for values in ([1, 2, 3], [1, 2.5, -3]))
    >>> coded = bytes(coder.encode(new, old))
    >>> decoded = np.empty(3, np.uint32)
    >>> coder.decode(coded, old, None, decoded)
    >>> decoded.view(np.float32)
    array([ 1. ,  2.5, -3. ], dtype=float32)
    """

    def __init__(self, dtype: str, size: int) -> None:
        self._dtype = bit_dtype(dtype)
        self._bits = 8 * self._dtype.itemsize
        self._size = size
        self._header = _HEADER.pack(size, self._bits, dtype in _FLOATS)
        block_size = min(size, BLOCK_SIZE)
        self._predictor = Predictor(self._dtype, dtype in _FLOATS, block_size)
        self._folded = np.empty(block_size, self._dtype)
        self._part = np.empty(block_size, self._dtype)
        self._bytes = np.empty(block_size, np.uint8)
        self._compressor = zstandard.ZstdCompressor(compression_params=_ZSTD_PARAMETERS)
        self._decompressor = zstandard.ZstdDecompressor()
        # No field is stored in more bytes than its bits fill; one of 4 bits may fill half a byte more.
        largest_headers = _BLOCK_HEADER.size + self._bits // 4 * (_FIELD_HEADER.size + 1)
        blocks = -(-size // BLOCK_SIZE)
        self._largest = _HEADER.size + blocks * largest_headers + size * self._dtype.itemsize

    @cached_property
    def _coded(self) -> memoryview:
        # Not before the first step is coded: whoever reads a run decodes only, and has no memory to spare for it.
        return np.empty(self._largest, np.uint8).data

    def encode(self, current: Bits, previous: Bits, before_previous: Bits | None = None) -> memoryview:
        """Code a step.

        Parameters
        ----------
        current
            Bit patterns of the step, shape (size,), of the dtype that `bit_dtype` names.
        previous
            Those of the step before, shape (size,).
        before_previous
            Those of the step before that one, shape (size,), or None if there is none.

        Returns
        -------
        memoryview
            Unsigned bytes, read-only: the object's own memory, good until the next call. The same arrays always give
            the same bytes.
        """
        assert all(self._fits(array) for array in (current, previous, before_previous) if array is not None)
        self._coded[: _HEADER.size] = self._header
        end = _HEADER.size
        for block in self._blocks():
            before = None if before_previous is None else before_previous[block]
            end = self._encode_block(current[block], previous[block], before, end)
        return self._coded[:end].toreadonly()

    def decode(self, coded: Coded, previous: Bits, before_previous: Bits | None, out: Bits) -> None:
        """Decode a step.

        Parameters
        ----------
        coded
            What `encode` returned.
        previous
            Bit patterns of the step before the coded one, shape (size,).
        before_previous
            Those of the step before that one, shape (size,), or None if there was none.
        out
            Where the bit patterns go, shape (size,). May be `previous` or `before_previous` itself.

        Raises
        ------
        DamagedFileError
            If `coded` is no whole coding of an array of this dtype and size. `out` may be partly filled then.
        """
        assert all(self._fits(array) for array in (previous, before_previous, out) if array is not None)
        view = coded.data if isinstance(coded, np.ndarray) else memoryview(coded)
        try:
            _check(view[: _HEADER.size] == self._header, "it does not begin as a step of this dtype and size does")
            position = _HEADER.size
            for block in self._blocks():
                before = None if before_previous is None else before_previous[block]
                position = self._decode_block(view, position, previous[block], before, out[block])
            _check(position == len(view), f"{len(view) - position} bytes follow its end")
        except (_MalformedError, zstandard.ZstdError) as error:
            message = f"a coded step is damaged: {error}. Restore the file from a copy or record again."
            raise DamagedFileError(message) from error

    def _encode_block(self, current: Bits, previous: Bits, before_previous: Bits | None, position: int) -> int:
        shift, magnitude = self._predictor.choose(current, previous, before_previous)
        folded = self._predictor.residual(current, previous, before_previous, shift)
        used_bits = int(folded.max()).bit_length()
        block_start, fields, low = position, 0, 0
        position += _BLOCK_HEADER.size
        for width in _widths(self._bits, magnitude):
            if low >= used_bits:
                break
            position = self._encode_field(folded, low, width, position)
            low += width
            fields += 1
        _BLOCK_HEADER.pack_into(self._coded, block_start, shift, fields)
        return position

    def _encode_field(self, folded: Bits, low: int, width: int, position: int) -> int:
        start = position + _FIELD_HEADER.size
        length = _field_length(folded.size, width)
        field = np.frombuffer(self._coded[start : start + length], np.uint8)
        if width == 8:
            np.right_shift(folded, low, out=field, casting="unsafe")
        else:
            nibbles = self._bytes[: folded.size]
            np.right_shift(folded, low, out=nibbles, casting="unsafe")
            np.bitwise_and(nibbles[:length], 15, out=field)
            upper = nibbles[length:]
            np.left_shift(upper, 4, out=upper)
            paired = field[: upper.size]
            np.bitwise_or(paired, upper, out=paired)
        storage = _RAW
        if not self._is_noise(field):
            compressed = self._compressor.compress(field.data)
            if len(compressed) < length:
                storage, length = _ZSTD, len(compressed)
                self._coded[start : start + length] = compressed
        _FIELD_HEADER.pack_into(self._coded, position, width, storage, length)
        return start + length

    def _is_noise(self, field: npt.NDArray[np.uint8]) -> bool:
        if field.size < _TRIAL_FROM:
            return False
        trial = np.ascontiguousarray(field[::_TRIAL_STRIDE])
        return len(self._compressor.compress(trial.data)) > _NOISE * trial.size

    def _decode_block(
        self, coded: memoryview, position: int, previous: Bits, before_previous: Bits | None, out: Bits
    ) -> int:
        _check(len(coded) - position >= _BLOCK_HEADER.size, "it ends within a block")
        shift, fields = _BLOCK_HEADER.unpack_from(coded, position)
        position += _BLOCK_HEADER.size
        _check(shift <= LARGEST_SHIFT, f"a prediction of kind {shift} is unknown")
        _check(shift == 0 or before_previous is not None, "it needs two steps before it, and there is one")
        folded = self._folded[: out.size]
        if fields == 0:
            folded.fill(0)
        low = 0
        for _ in range(fields):
            _check(len(coded) - position >= _FIELD_HEADER.size, "it ends within a field")
            width, storage, length = _FIELD_HEADER.unpack_from(coded, position)
            position += _FIELD_HEADER.size
            _check(width in (4, 8) and low + width <= self._bits, f"a field of {width} bits has no place at {low}")
            _check(length <= len(coded) - position, "it ends within a field")
            field = self._unpacked(coded[position : position + length], storage, _field_length(out.size, width))
            self._join_field(folded, field, low, width)
            position += length
            low += width
        self._predictor.restore(folded, previous, before_previous, shift, out)
        return position

    def _unpacked(self, content: memoryview, storage: int, length: int) -> Bits:
        _check(storage in (_RAW, _ZSTD), f"storage of kind {storage} is unknown")
        if storage == _ZSTD:
            # A frame is given as much memory as it declares, whatever limit the caller sets.
            declared = zstandard.get_frame_parameters(content).content_size
            _check(declared == length, f"a field declares {declared} bytes and not {length}")
            content = memoryview(self._decompressor.decompress(content, allow_extra_data=False))
        _check(len(content) == length, f"a field has {len(content)} bytes and not {length}")
        return np.frombuffer(content, np.uint8)

    def _join_field(self, folded: Bits, field: Bits, low: int, width: int) -> None:
        part = folded if low == 0 else self._part[: folded.size]
        if width == 8:
            np.left_shift(field, low, out=part, dtype=self._dtype)
        else:
            nibbles = self._bytes[: field.size]
            np.bitwise_and(field, 15, out=nibbles)
            np.left_shift(nibbles, low, out=part[: field.size], dtype=self._dtype)
            upper = nibbles[: folded.size - field.size]
            np.right_shift(field[: upper.size], 4, out=upper)
            np.left_shift(upper, low, out=part[field.size :], dtype=self._dtype)
        if part is not folded:
            np.bitwise_or(folded, part, out=folded)

    def _blocks(self) -> Iterator[slice]:
        return (slice(start, start + BLOCK_SIZE) for start in range(0, self._size, BLOCK_SIZE))

    def _fits(self, array: Bits) -> bool:
        return array.shape == (self._size,) and array.dtype == self._dtype


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise _MalformedError(otherwise)


def _widths(bits: int, magnitude: float) -> list[int]:
    # The bits of the fields, lowest first. Residuals of two bits or so pair up to symbols that Huffman codes fill well;
    # larger ones have their magnitude in one field of 8 bits, noise below it and rarely anything above.
    if magnitude < _PAIRED_BELOW:
        widths = [4]
    else:
        noise = min(max(int((magnitude - 0.5) // 4), 0) * 4, bits - 8)
        widths = [8] * (noise // 8) + [4] * (noise % 8 // 4) + [8]
    rest = bits - sum(widths)
    if rest:
        widths += [4] if rest % 8 else [4, 4]
    widths += [8] * ((bits - sum(widths)) // 8)
    return widths


def _field_length(entries: int, width: int) -> int:
    return entries if width == 8 else (entries + 1) // 2
