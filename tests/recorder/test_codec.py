from __future__ import annotations

import os
import re
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zstandard
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from recorder.codec import BLOCK_SIZE, StepCoder, bit_dtype
from recorder.errors import DamagedFileError, UsageError

Bits = npt.NDArray[np.unsignedinteger[Any]]

EXAMPLES = settings(max_examples=int(os.environ.get("LOSSLEDGER_EXAMPLES", "300")), deadline=None)
PAGE = Path(__file__).parents[2] / "docs" / "formats" / "step-coding.md"

FLOATS = ["float64", "float32", "float16", "bfloat16"]
INTEGERS = ["int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"]
DTYPES = FLOATS + INTEGERS
# Sign, infinities, quiet and signalling NaNs with payloads, zeros, subnormals, the ends of the range.
SPECIAL_FLOAT32 = [
    0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000,
    0xFFC12345, 0x7F800001, 0xFFFFFFFF, 0x7FFFFFFF, 0x7F7FFFFF, 0xFF7FFFFF, 0x3F800000, 0xBF800000,
]  # fmt: skip


@st.composite
def trainings(draw: st.DrawFn) -> tuple[str, list[Bits]]:
    """Bit patterns of up to five steps: anything at all, or moving on by anything from nothing to jumps."""
    dtype = draw(st.sampled_from(DTYPES))
    width = bit_dtype(dtype).itemsize
    size = draw(st.integers(0, 40))
    raw = st.binary(min_size=size * width, max_size=size * width)
    steps = [np.frombuffer(draw(raw), bit_dtype(dtype))]
    change = draw(st.sampled_from(["any", "none", "small", "steady"]))
    pace = np.frombuffer(draw(raw), bit_dtype(dtype)) & np.array(0x3F, bit_dtype(dtype))
    for _ in range(draw(st.integers(1, 4))):
        if change == "any":
            steps.append(np.frombuffer(draw(raw), bit_dtype(dtype)))
        elif change == "none":
            steps.append(steps[-1].copy())
        elif change == "small":
            steps.append(steps[-1] ^ (np.frombuffer(draw(raw), bit_dtype(dtype)) & np.array(0x0F, bit_dtype(dtype))))
        else:
            steps.append(steps[-1] + pace)
    return dtype, steps


def like_training(dtype: str, size: int, steps: int, seed: int = 0) -> list[Bits]:
    """Parameters that move with momentum, as an optimizer moves them."""
    generator = np.random.default_rng(seed)
    values = generator.normal(0, 0.05, size)
    velocity = generator.normal(0, 2e-4, size)
    taken = []
    for _ in range(steps):
        values = values + velocity
        velocity = 0.9 * velocity + generator.normal(0, 2e-5, size)
        taken.append(values.copy())
    if dtype == "bfloat16":
        return [(value.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16) for value in taken]
    if dtype in FLOATS:
        return [value.astype(dtype).view(bit_dtype(dtype)) for value in taken]
    return [(value * 1000).astype(np.int64).astype(bit_dtype(dtype)) for value in taken]


def chain_of(steps: list[Bits]) -> list[tuple[Bits, Bits, Bits | None]]:
    """Current, previous and one before for every step after the first."""
    return [(steps[i], steps[i - 1], steps[i - 2] if i > 1 else None) for i in range(1, len(steps))]


def decoded(
    coder: StepCoder, coded: bytes | memoryview | npt.NDArray[np.uint8], previous: Bits, before: Bits | None
) -> Bits:
    out = np.full_like(previous, 0xA5)
    coder.decode(coded, previous, before, out)
    return out


def decoded_by_the_page(coded: bytes, dtype: str, previous: Bits, before: Bits | None) -> list[int]:
    """A second decoder, in plain Python integers, that follows docs/formats/step-coding.md and nothing else."""
    w = 8 * previous.itemsize
    wrap, sign = (1 << w) - 1, 1 << (w - 1)

    def signed(x: int) -> int:
        x &= wrap
        return x - 2 * sign if x & sign else x

    def ordered(x: int) -> int:
        return signed(x ^ ((signed(x) >> (w - 1)) & (sign - 1))) if dtype in FLOATS else signed(x)

    def take(n: int) -> bytes:
        nonlocal coded
        assert len(coded) >= n
        taken, coded = coded[:n], coded[n:]
        return taken

    assert struct.unpack("<QBB", take(10)) == (len(previous), w, dtype in FLOATS)
    values: list[int] = []
    while len(values) < len(previous):
        n = min(2**18, len(previous) - len(values))
        s, fields = take(2)
        residuals, low = [0] * n, 0
        for _ in range(fields):
            bits, storage, length = struct.unpack("<BBI", take(6))
            content = take(length)
            if storage == 1:
                content = zstandard.ZstdDecompressor().decompress(content)
            if bits == 4:
                halves = [byte & 15 for byte in content] + [byte >> 4 for byte in content]
                content = bytes(halves[:n])
            assert len(content) == n
            residuals = [z | byte << low for z, byte in zip(residuals, content, strict=True)]
            low += bits
        assert low <= w
        for z in residuals:
            r = (z >> 1) ^ -(z & 1)
            p = ordered(int(previous[len(values)]))
            if s:
                assert before is not None
                d = signed(p - ordered(int(before[len(values)])))
                p = p + d - (d >> s)
            values.append(ordered(p + r) & wrap)
    assert not coded
    return values


@EXAMPLES
@given(trainings())
def test_every_bit_pattern_comes_back(training: tuple[str, list[Bits]]) -> None:
    dtype, steps = training
    coder = StepCoder(dtype, len(steps[0]))
    reader = StepCoder(dtype, len(steps[0]))
    for current, previous, before in chain_of(steps):
        coded = coder.encode(current, previous, before)
        np.testing.assert_array_equal(decoded(reader, coded, previous, before), current)


@EXAMPLES
@given(trainings())
def test_a_decoder_written_after_the_page_reads_the_same(training: tuple[str, list[Bits]]) -> None:
    dtype, steps = training
    coder = StepCoder(dtype, len(steps[0]))
    for current, previous, before in chain_of(steps):
        coded = bytes(coder.encode(current, previous, before))
        assert decoded_by_the_page(coded, dtype, previous, before) == current.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_decoder_written_after_the_page_reads_a_long_training_too(dtype: str) -> None:
    steps = like_training(dtype, BLOCK_SIZE // 16 + 3, 4)
    coder = StepCoder(dtype, len(steps[0]))
    for current, previous, before in chain_of(steps)[::2]:
        coded = bytes(coder.encode(current, previous, before))
        assert decoded_by_the_page(coded, dtype, previous, before) == current.tolist()


def test_the_example_of_the_page_is_what_is_written() -> None:
    block = PAGE.read_text(encoding="utf-8").split("## Example")[1].split("```")[1]
    on_page = bytes.fromhex("".join(re.match(r"([0-9a-f]{2} +)*", line + " ")[0] for line in block.splitlines()))  # type: ignore[index]
    previous = np.array([1, -0.5, 3, 0.0], np.float32)
    current = np.array([np.nextafter(np.float32(1), 2), np.nextafter(np.float32(-0.5), -1), 3, -0.0], np.float32)
    assert bytes(StepCoder("float32", 4).encode(current.view(np.uint32), previous.view(np.uint32))) == on_page


@pytest.mark.parametrize("size", [0, 1, 2, 3, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64", "bool"])
def test_blocks_begin_and_end_where_they_should(dtype: str, size: int) -> None:
    steps = like_training(dtype, size, 4)
    coder = StepCoder(dtype, size)
    for current, previous, before in chain_of(steps):
        coded = bytes(coder.encode(current, previous, before))
        np.testing.assert_array_equal(decoded(coder, coded, previous, before), current)


def test_zeros_infinities_nans_and_subnormals_change_into_each_other() -> None:
    special = np.array(SPECIAL_FLOAT32, np.uint32)
    previous, current = (axis.ravel() for axis in np.meshgrid(special, special))
    before = np.roll(previous, 7)
    coder = StepCoder("float32", len(current))
    for one_before in (None, before):
        coded = coder.encode(current, previous, one_before)
        np.testing.assert_array_equal(decoded(coder, coded, previous, one_before), current)


def test_noise_takes_hardly_more_than_its_own_bytes() -> None:
    generator = np.random.default_rng(3)
    for dtype in DTYPES:
        steps = [
            generator.integers(0, 256, 4001 * bit_dtype(dtype).itemsize, np.uint8).view(bit_dtype(dtype)) for _ in "123"
        ]
        coder = StepCoder(dtype, 4001)
        coded = coder.encode(*steps)
        assert len(coded) <= steps[0].nbytes + 10 + 2 + 6 * 2 * bit_dtype(dtype).itemsize + 16
        np.testing.assert_array_equal(decoded(coder, coded, steps[1], steps[2]), steps[0])


def test_a_step_that_changed_nothing_costs_two_bytes_a_block() -> None:
    parameters = like_training("float32", 3 * BLOCK_SIZE, 2)
    coder = StepCoder("float32", 3 * BLOCK_SIZE)
    for before in (None, parameters[1], parameters[0]):
        assert len(coder.encode(parameters[1], parameters[1], before)) == 10 + 3 * 2


@pytest.mark.parametrize(
    ("dtype", "plain", "predicted"), [("float32", 0.70, 0.57), ("float16", 0.45, 0.25), ("bfloat16", 0.25, 0.16)]
)
def test_prediction_makes_steps_with_momentum_smaller(dtype: str, plain: float, predicted: float) -> None:
    before, previous, current = like_training(dtype, BLOCK_SIZE, 3)
    coder = StepCoder(dtype, BLOCK_SIZE)
    assert len(coder.encode(current, previous)) < plain * current.nbytes
    assert len(coder.encode(current, previous, before)) < predicted * current.nbytes


def test_each_block_is_predicted_as_suits_it_best() -> None:
    jitter = np.random.default_rng(1).integers(0, 1 << 12, 2 * BLOCK_SIZE).astype(np.uint32)
    current = np.full(2 * BLOCK_SIZE, 0x3F000000, np.uint32)
    previous, before = current.copy(), current + (jitter << 8)
    ahead = slice(BLOCK_SIZE, None)
    # The first block stands still after its jump; the second goes on just as it went.
    previous[ahead] = current[ahead] + jitter[ahead]
    before[ahead] = current[ahead] + 2 * jitter[ahead]
    coded = bytes(StepCoder("float32", 2 * BLOCK_SIZE).encode(current, previous, before))
    assert coded[10:12] == b"\0\0"
    assert coded[12] > 0


def test_the_same_arrays_give_the_same_bytes_whatever_was_coded_before() -> None:
    steps = like_training("float32", BLOCK_SIZE + 77, 4)
    noise = np.random.default_rng(5).integers(0, 2**32, BLOCK_SIZE + 77, np.uint32)
    used, fresh = StepCoder("float32", BLOCK_SIZE + 77), StepCoder("float32", BLOCK_SIZE + 77)
    used.encode(noise, steps[0], noise[::-1])
    decoded(used, bytes(used.encode(steps[0], noise)), noise, None)
    for current, previous, before in chain_of(steps):
        coded = bytes(used.encode(current, previous, before))
        assert coded == bytes(fresh.encode(current, previous, before))
        np.testing.assert_array_equal(decoded(used, coded, previous, before), current)


def test_coding_leaves_its_arguments_as_they_are() -> None:
    steps = like_training("bfloat16", 1000, 3)
    for step in steps:
        step.flags.writeable = False
    coder = StepCoder("bfloat16", 1000)
    coded = coder.encode(steps[2], steps[1], steps[0])
    assert coded.readonly
    np.testing.assert_array_equal(decoded(coder, coded, steps[1], steps[0]), steps[2])


@pytest.mark.parametrize("over", ["previous", "before"])
def test_a_step_may_be_decoded_over_one_that_it_was_coded_against(over: str) -> None:
    steps = like_training("float32", BLOCK_SIZE + 5, 3)
    coder = StepCoder("float32", BLOCK_SIZE + 5)
    coded = bytes(coder.encode(steps[2], steps[1], steps[0]))
    previous, before = steps[1].copy(), steps[0].copy()
    out = previous if over == "previous" else before
    coder.decode(coded, previous, before, out)
    np.testing.assert_array_equal(out, steps[2])


def test_bytes_views_and_arrays_of_bytes_are_all_decoded() -> None:
    before, previous, current = like_training("float16", 500, 3)
    coder = StepCoder("float16", 500)
    coded = bytes(coder.encode(current, previous, before))
    for form in (coded, memoryview(coded), np.frombuffer(coded, np.uint8)):
        np.testing.assert_array_equal(decoded(coder, form, previous, before), current)


def small_coding() -> tuple[StepCoder, bytes, Bits, Bits]:
    """A coding with raw and compressed fields of both widths."""
    before, previous, current = like_training("float32", 700, 3)
    coder = StepCoder("float32", 700)
    coded = bytes(coder.encode(current, previous, before))
    assert coded[10] > 0
    return coder, coded, previous, before


def test_a_coding_cut_short_anywhere_is_refused() -> None:
    coder, coded, previous, before = small_coding()
    for end in range(len(coded)):
        with pytest.raises(DamagedFileError, match="a coded step is damaged"):
            decoded(coder, coded[:end], previous, before)


def test_bytes_after_the_end_are_refused() -> None:
    coder, coded, previous, before = small_coding()
    with pytest.raises(DamagedFileError, match="1 bytes follow its end"):
        decoded(coder, coded + b"\0", previous, before)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 701), ("int32", 700), ("float64", 700), ("float16", 1400)])
def test_a_coding_of_another_dtype_or_size_is_refused(dtype: str, size: int) -> None:
    _, coded, _, _ = small_coding()
    with pytest.raises(DamagedFileError, match="does not begin as a step of this dtype and size does"):
        decoded(StepCoder(dtype, size), coded, np.zeros(size, bit_dtype(dtype)), np.zeros(size, bit_dtype(dtype)))


def test_a_predicted_step_is_refused_without_the_step_that_it_needs() -> None:
    coder, coded, previous, _ = small_coding()
    with pytest.raises(DamagedFileError, match="needs two steps before it"):
        decoded(coder, coded, previous, None)


@EXAMPLES
@given(st.data())
def test_flipped_bytes_are_refused_or_give_other_bits_and_nothing_else(data: st.DataObject) -> None:
    coder, coded, previous, before = small_coding()
    flipped = bytearray(coded)
    # Half of the flips among the first bytes: there the headers are.
    places = st.one_of(st.integers(0, 40), st.integers(0, len(coded) - 1))
    for place, byte in data.draw(st.dictionaries(places, st.integers(0, 255), min_size=1, max_size=5)).items():
        flipped[place] = byte
    assume(bytes(flipped) != coded)
    try:
        values = decoded(coder, bytes(flipped), previous, before)
    except DamagedFileError:
        return
    assert decoded_by_the_page(bytes(flipped), "float32", previous, before) == values.tolist()


@EXAMPLES
@given(st.sampled_from(DTYPES), st.integers(1, 9), st.binary(max_size=80))
def test_any_bytes_behind_a_good_header_are_refused_or_decoded(dtype: str, size: int, body: bytes) -> None:
    header = struct.pack("<QBB", size, 8 * bit_dtype(dtype).itemsize, dtype in FLOATS)
    previous = np.zeros(size, bit_dtype(dtype))
    try:
        values = decoded(StepCoder(dtype, size), header + body, previous, previous)
    except DamagedFileError:
        return
    assert decoded_by_the_page(header + body, dtype, previous, previous) == values.tolist()


def coding_with_field(content: bytes, width: int = 8, storage: int = 1, size: int = 100) -> bytes:
    return struct.pack("<QBB BB BBI", size, 8, 0, 0, 1, width, storage, len(content)) + content


def frame(size: int) -> bytes:
    return zstandard.ZstdCompressor().compress(bytes(size))


def test_a_frame_that_declares_too_much_is_refused_before_it_takes_memory() -> None:
    huge = frame(1 << 28)
    assert len(huge) < 1 << 16
    coder, zeros = StepCoder("uint8", 100), np.zeros(100, np.uint8)
    tracemalloc.start()
    try:
        with pytest.raises(DamagedFileError, match="declares 268435456 bytes and not 100"):
            decoded(coder, coding_with_field(huge), zeros, None)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "content",
    [
        frame(99),
        frame(100) + b"\0",
        frame(100) + frame(100),
        frame(100)[:-1],
        frame(100)[:3],
        b"",
        struct.pack("<II", 0x184D2A50, 100) + bytes(100),  # a frame that readers of zstd skip
        zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(write_content_size=0)).compress(
            bytes(100)
        ),
    ],
    ids=["short", "a byte more", "a frame more", "cut", "header cut", "empty", "skippable", "no size declared"],
)
def test_a_compressed_field_must_be_one_whole_frame_that_declares_its_size(content: bytes) -> None:
    zeros = np.zeros(100, np.uint8)
    assert decoded(StepCoder("uint8", 100), coding_with_field(frame(100)), zeros, None).tolist() == [0] * 100
    with pytest.raises(DamagedFileError, match="a coded step is damaged"):
        decoded(StepCoder("uint8", 100), coding_with_field(content), zeros, None)


@pytest.mark.parametrize(
    ("coded", "reason"),
    [
        (coding_with_field(bytes(100), width=5, storage=0), "a field of 5 bits has no place at 0"),
        (coding_with_field(bytes(100), storage=2), "storage of kind 2 is unknown"),
        (coding_with_field(bytes(99), storage=0), "a field has 99 bytes and not 100"),
        (coding_with_field(bytes(100), width=4, storage=0), "a field has 100 bytes and not 50"),
        (struct.pack("<QBB BB", 100, 8, 0, 8, 0), "a prediction of kind 8 is unknown"),
        (struct.pack("<QBB BB BBI 100x", 100, 8, 0, 0, 1, 8, 0, 101), "it ends within a field"),
        (struct.pack("<QBB BB BBI 50x BBI 100x", 100, 8, 0, 0, 2, 4, 0, 50, 8, 0, 100), "no place at 4"),
    ],
    ids=["width", "storage", "raw", "raw half", "prediction", "beyond the end", "too many bits"],
)  # fmt: skip
def test_a_field_out_of_place_is_refused(coded: bytes, reason: str) -> None:
    zeros = np.zeros(100, np.uint8)
    with pytest.raises(DamagedFileError, match=reason):
        decoded(StepCoder("uint8", 100), coded, zeros, zeros)


def test_bit_patterns_have_the_size_of_their_dtype() -> None:
    sizes = {dtype: bit_dtype(dtype).itemsize for dtype in DTYPES}
    assert sizes == {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2} | {
        dtype: 1 if dtype == "bool" else np.dtype(dtype).itemsize for dtype in INTEGERS
    }


def test_a_dtype_without_a_coding_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="cannot code a tensor of dtype complex64"):
        StepCoder("complex64", 3)
