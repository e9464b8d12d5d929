from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recorder import growing, segments
from recorder.errors import DamagedFileError, FormatError, UsageError
from recorder.growing import GrowingTensorFile
from recorder.layout import BUFFERS, PARAMETERS, Layout, Slot
from recorder.segments import SEGMENTS_FOLDER, Segment, SegmentName, list_segments
from recorder.segmentwriter import SegmentWriter, State, recover_segments
from recorder.steps import MicroBatch, Step
from recorder.tensorfile import TensorFile, content

RUN_ID = "f" * 32
SLOTS = (
    Slot(PARAMETERS, "weight", "float32", (3, 5)),
    Slot(PARAMETERS, "half", "bfloat16", (7,)),
    Slot(PARAMETERS, "scale", "float32", ()),
    Slot(PARAMETERS, "double", "float64", (2, 2)),
    Slot(PARAMETERS, "nothing", "float32", (0, 4)),
    Slot(PARAMETERS, "small", "float16", (3,)),
    Slot(BUFFERS, "count", "int64", ()),
    Slot(BUFFERS, "mask", "bool", (6,)),
    Slot(BUFFERS, "byte", "uint8", (2,)),
)
LAYOUT = Layout(SLOTS)


class Theta:
    """Random tensors of a layout, and how often the writer gave their memory back."""

    def __init__(self, number: int, layout: Layout = LAYOUT, *, seed: int | None = None) -> None:
        generator = torch.Generator().manual_seed(number if seed is None else seed)
        vectors = {}
        for dtype, size in layout.sizes.items():
            kind = getattr(torch, dtype)
            drawn = torch.rand(size, generator=generator)
            vectors[dtype] = drawn < 0.5 if kind is torch.bool else (100 * drawn).to(kind)
        self.released = 0
        self.number = number
        self.state = State(number, layout, vectors, self._release)

    def _release(self) -> None:
        self.released += 1

    def tensors(self, kind: str) -> dict[str, torch.Tensor]:
        slots = self.state.layout.slots
        views = self.state.layout.views(self.state.vectors)
        return {slot.name: view.clone() for slot, view in zip(slots, views, strict=True) if slot.kind == kind}


def step(number: int, **micro_batch: Any) -> Step:
    micro_batches = (MicroBatch(indices=torch.tensor([number]), **micro_batch),)
    return Step(step=number, epoch=1, seed=0, learning_rates=(0.1,), micro_batches=micro_batches)


def write(run: Path, states: Sequence[State], *, steps_per_segment: int = 64) -> None:
    """Write states; between two neighbours stands the step that leads from one to the other."""
    writer = SegmentWriter(run, RUN_ID, 1, 0, steps_per_segment)
    last = None
    for state in states:
        follows = last is not None and state.number == last.number + 1 and state.layout == last.layout
        writer.add(state, step(state.number - 1) if follows else None)
        last = state
    writer.seal()


def states(thetas: Sequence[Theta]) -> list[State]:
    return [theta.state for theta in thetas]


def opened(run: Path) -> list[Segment]:
    return [Segment(run / SEGMENTS_FOLDER / name.file) for name in list_segments(run)]


def spans(run: Path) -> list[tuple[int, int]]:
    return [(name.start, name.stop) for name in list_segments(run)]


def assert_holds(segment: Segment, theta: Theta) -> None:
    for read, kind in ((segment.parameters, PARAMETERS), (segment.buffers, BUFFERS)):
        found, expected = read(theta.number), theta.tensors(kind)
        assert list(found) == list(expected)
        for name, tensor in expected.items():
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
            assert content(found[name]) == content(tensor)


# --- Round trips ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps_per_segment", [1, 3, 64])
def test_every_theta_comes_back_with_its_dtypes_shapes_and_very_bits(tmp_path: Path, steps_per_segment: int) -> None:
    thetas = [Theta(number) for number in range(9)]
    write(tmp_path, states(thetas), steps_per_segment=steps_per_segment)
    read = set()
    for segment in opened(tmp_path):
        assert segment.states == tuple(range(segment.name.start, segment.name.stop + 1))
        for number in segment.states:
            assert_holds(segment, thetas[number])
            read.add(number)
        segment.verify()
    assert read == set(range(9))


def test_bits_that_are_no_numbers_come_back_too(tmp_path: Path) -> None:
    layout = Layout((Slot(PARAMETERS, "w", "float32", (4,)),))
    patterns = [[0x7FC00001, 0xFFC12345, 0x80000000, 0], [0x7F800000, 0xFF800000, 0, 0x80000000], [1, 2, 3, 4]]
    write(
        tmp_path,
        [
            State(number, layout, {"float32": torch.tensor(bits, dtype=torch.uint32).view(torch.float32)})
            for number, bits in enumerate(patterns)
        ],
    )
    (segment,) = opened(tmp_path)
    assert [segment.parameters(t)["w"].view(torch.uint32).tolist() for t in range(3)] == patterns


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.integers(0, 40), dtype=st.sampled_from(["float32", "bfloat16", "float64"]))
def test_any_three_thetas_come_back(seed: int, size: int, dtype: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    layout = Layout((Slot(PARAMETERS, "w", dtype, (size,)), Slot(BUFFERS, "n", "int64", (size,))))
    thetas = [Theta(number, layout, seed=seed + number) for number in range(3)]
    run = tmp_path_factory.mktemp("run")
    write(run, states(thetas))
    (segment,) = opened(run)
    for theta in thetas:
        assert_holds(segment, theta)


def test_thetas_are_read_in_any_order_and_what_was_read_stays_as_it_was(tmp_path: Path) -> None:
    thetas = [Theta(number) for number in range(12)]
    write(tmp_path, states(thetas))
    (segment,) = opened(tmp_path)
    order = [*range(12)] * 3
    random.Random(0).shuffle(order)
    kept = [(number, segment.parameters(number)) for number in order]
    for number, found in kept:
        expected = thetas[number].tensors(PARAMETERS)
        assert all(content(found[name]) == content(tensor) for name, tensor in expected.items())


def test_the_steps_come_back_with_their_micro_batches(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path, RUN_ID, 1, 0, 64)
    writer.add(Theta(0).state, None)
    tensors = {"batch.x": torch.randn(2, 3)}
    recorded = step(0, nest={"tensor": "batch.x"}, tensors=tensors, checksums={"batch.x": 1}, predictions=2.0)
    writer.add(Theta(1).state, recorded)
    writer.seal()
    (segment,) = opened(tmp_path)
    found = segment.step(0)
    assert (found.epoch, found.learning_rates, found.predictions) == (1, (0.1,), 2.0)
    (micro_batch,) = found.micro_batches
    assert (micro_batch.indices.tolist(), micro_batch.rank) == ([0], 0)
    assert torch.equal(micro_batch.batch(), tensors["batch.x"])


def test_only_the_first_theta_of_a_segment_is_stored_whole(tmp_path: Path) -> None:
    write(tmp_path, states([Theta(number) for number in range(3, 6)]))
    (name,) = list_segments(tmp_path)
    names = TensorFile(tmp_path / SEGMENTS_FOLDER / name.file).names
    of_states = {entry for entry in names if not entry.startswith("indices/")}
    expected = {f"{slot.kind}/00000003/{slot.name}" for slot in SLOTS}
    assert of_states == expected | {f"coded/{t:08d}/{dtype}" for t in (4, 5) for dtype in LAYOUT.sizes}


# --- Where segments begin and end -----------------------------------------------------------------------------------


def test_a_new_layout_begins_a_new_segment_and_the_old_one_keeps_its_end(tmp_path: Path) -> None:
    wider = Layout((*SLOTS, Slot(PARAMETERS, "late", "float32", (2,))))
    thetas = [Theta(0), Theta(1), Theta(2), Theta(2, wider), Theta(3, wider), Theta(4, wider)]
    write(tmp_path, states(thetas))
    assert spans(tmp_path) == [(0, 2), (2, 4)]
    narrow, wide = opened(tmp_path)
    for segment, own in ((narrow, thetas[:3]), (wide, thetas[3:])):
        for theta in own:
            assert_holds(segment, theta)


def test_a_kept_step_has_both_its_ends_wherever_the_selection_jumps(tmp_path: Path) -> None:
    # Steps 0, 1, 5, 9 and 10: where one follows the last, its start is the other's end.
    thetas = [Theta(number) for number in (0, 1, 2, 5, 6, 9, 10, 11)]
    write(tmp_path, states(thetas))
    (segment,) = opened(tmp_path)
    assert (segment.name.start, segment.name.stop) == (0, 11)
    assert segment.steps == [0, 1, 5, 9, 10]
    for theta in reversed(thetas):
        assert_holds(segment, theta)
    for absent in (3, 4, 7, 12):
        with pytest.raises(UsageError, match=f"holds no parameters of step {absent}"):
            segment.parameters(absent)


def test_a_segment_is_full_after_so_many_steps_wherever_the_selection_jumps(tmp_path: Path) -> None:
    thetas = [Theta(number) for first in range(0, 25, 5) for number in (first, first + 1)]  # steps 0, 5, 10, 15, 20
    write(tmp_path, states(thetas), steps_per_segment=2)
    assert spans(tmp_path) == [(0, 6), (10, 16), (20, 21)]
    by_number = {theta.number: theta for theta in thetas}
    for segment in opened(tmp_path):
        for number in segment.states:
            assert_holds(segment, by_number[number])


def test_a_header_that_is_full_ends_its_segment_early(tmp_path: Path) -> None:
    # The first step is the smallest by far: its room, for four of its like, is too little for the next.
    writer = SegmentWriter(tmp_path, RUN_ID, 1, 0, 4)
    thetas = [Theta(number) for number in range(5)]
    writer.add(thetas[0].state, None)
    for number in range(4):
        leaves = {f"batch.{n}": torch.zeros(1) for n in range(1 if number == 0 else 60)}
        writer.add(thetas[number + 1].state, step(number, tensors=leaves, checksums=dict.fromkeys(leaves, 0)))
    writer.seal()
    assert spans(tmp_path)[0][1] < 4
    assert spans(tmp_path)[-1][1] == 4
    for segment in opened(tmp_path):
        for number in segment.states:
            assert_holds(segment, thetas[number])
        assert all(len(segment.step(t).micro_batches[0].tensors) == (1 if t == 0 else 60) for t in segment.steps)


def test_a_step_that_no_header_can_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "_LARGEST_ROOM", 8192)
    writer = SegmentWriter(tmp_path, RUN_ID, 1, 0, 4)
    writer.add(Theta(0).state, None)
    leaves = {f"batch.{n}": torch.zeros(1) for n in range(500)}
    with pytest.raises(FormatError, match="more than a file's header can name"):
        writer.add(Theta(1).state, step(0, tensors=leaves))


def test_every_copy_is_given_back_once(tmp_path: Path) -> None:
    thetas = [Theta(number) for number in (0, 1, 2, 3, 7, 8)]
    write(tmp_path, states(thetas), steps_per_segment=2)
    assert [theta.released for theta in thetas] == [1, 1, 1, 1, 1, 0]  # the last begins the next segment
    write(tmp_path / "other", [Theta(0).state])
    assert list_segments(tmp_path / "other") == []


def test_no_more_than_two_copies_are_held_between_steps(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path, RUN_ID, 1, 0, 3)
    thetas = [Theta(0)]
    writer.add(thetas[0].state, None)
    for number in range(8):
        thetas.append(Theta(number + 1))
        writer.add(thetas[-1].state, step(number))
        assert sum(not theta.released for theta in thetas) <= 2


def test_another_process_records_its_micro_batches_and_no_parameters(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path, RUN_ID, 2, 1, 64)
    for number in (4, 5, 9):
        writer.add(None, step(number))
    writer.seal()
    (name,) = list_segments(tmp_path)
    assert name == SegmentName(2, 4, 10, 1)
    assert name.file == "002-00000004-00000010-rank1.safetensors"
    segment = Segment(tmp_path / SEGMENTS_FOLDER / name.file)
    segment.verify()
    assert (segment.states, segment.steps) == ((), [4, 5, 9])
    assert [micro.rank for t in segment.steps for micro in segment.step(t).micro_batches] == [1, 1, 1]


# --- Kills, names, damage -------------------------------------------------------------------------------------------


def abandoned(run: Path, steps: int) -> list[Theta]:
    """A segment in the making that its process left."""
    writer = SegmentWriter(run, RUN_ID, 1, 0, 64)
    thetas = [Theta(number) for number in range(steps + 1)]
    for theta in thetas:
        writer.add(theta.state, step(theta.number - 1) if theta.number else None)
    if writer._file is not None:
        writer._file.close()
    return thetas


def test_a_segment_in_the_making_is_recovered_with_every_step_that_was_added(tmp_path: Path) -> None:
    thetas = abandoned(tmp_path, steps=5)
    assert list_segments(tmp_path) == []
    assert recover_segments(tmp_path) == [SegmentName(1, 0, 5)]
    (segment,) = opened(tmp_path)
    for theta in thetas:
        assert_holds(segment, theta)
    assert recover_segments(tmp_path) == []
    assert len(list((tmp_path / SEGMENTS_FOLDER).iterdir())) == 1


def test_a_segment_in_the_making_without_a_step_is_removed(tmp_path: Path) -> None:
    abandoned(tmp_path, steps=1)
    folder = tmp_path / SEGMENTS_FOLDER
    (journal,) = folder.glob(".*.journal")
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:2]))  # the header's room and the keyframe
    assert recover_segments(tmp_path) == []
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("001-00000000-00000064.safetensors", SegmentName(1, 0, 64)),
        ("012-00000007-00000009-rank3.safetensors", SegmentName(12, 7, 9, 3)),
        ("00000000-00000064.safetensors", None),
        ("001-00000000-00000064.safetensors.bak", None),
        ("001-00000000-00000064-rank.safetensors", None),
        (".001-00000000.growing", None),
    ],
)
def test_a_segments_name_is_read_from_its_file(file: str, name: SegmentName | None) -> None:
    assert SegmentName.parse(file) == name
    assert name is None or name.file == file


def test_segments_are_listed_by_attempt_step_and_process(tmp_path: Path) -> None:
    names = [SegmentName(2, 0, 4), SegmentName(1, 64, 70), SegmentName(1, 0, 64), SegmentName(1, 0, 64, 1)]
    (tmp_path / SEGMENTS_FOLDER).mkdir()
    for name in names:
        segments.segment_file(tmp_path, name.start, name.stop, attempt=name.attempt, rank=name.rank).touch()
    (tmp_path / SEGMENTS_FOLDER / "notes.txt").touch()
    assert list_segments(tmp_path) == [names[2], names[3], names[1], names[0]]
    assert list_segments(tmp_path / "nowhere") == []


def test_a_coded_step_that_does_not_decode_is_found_although_its_checksum_is_right(tmp_path: Path) -> None:
    write(tmp_path, states([Theta(number) for number in range(3)]))
    (name,) = list_segments(tmp_path)
    path = tmp_path / SEGMENTS_FOLDER / name.file
    file = TensorFile(path)
    tensors = {entry: file.tensor(entry) for entry in file.names}
    tensors["coded/00000002/float32"] = tensors["coded/00000002/float32"][:-1]
    forged = GrowingTensorFile(tmp_path, "forged", 1 << 16)
    forged.append(tensors, {})
    forged.seal(path, file.facts)
    segment = Segment(path)
    segment.parameters(1)
    with pytest.raises(DamagedFileError, match="coded step is damaged"):
        segment.verify()
