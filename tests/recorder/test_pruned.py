"""Segments deleted on purpose are told from segments lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD

import recorder
from recorder.__main__ import main
from recorder.errors import DamagedFileError, FormatError, UsageError
from recorder.pruned import PRUNED_FILE, prune, pruned_segments
from recorder.runformat import Run
from recorder.segments import SEGMENTS_FOLDER, SegmentName, list_segments
from recorder.verify import verify

pytestmark = pytest.mark.filterwarnings("ignore::recorder.parameters.UnmappedParameterWarning")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = SGD(model.parameters(), lr=0.1)
    for first, stop in ((0, 6), (4, 8)):
        if first:
            model.load_state_dict(Run(tmp_path / "run").parameters(first))
        with recorder.watch(model, optimizer, run=tmp_path / "run", first_step=first, segment_steps=2) as rec:
            for step in range(first, stop):
                rec.batch([step])
                model(torch.full((1, 3), float(step))).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
    return tmp_path / "run"


def test_pruned_steps_are_gone_and_the_attempts_are_told_as_before(run: Path) -> None:
    before = Run(run)
    theta = before.parameters(4)
    names = before.files_of(2, 6)
    assert names == [SegmentName(1, 2, 4), SegmentName(2, 4, 6)]
    prune(run, names)
    after = Run(run)
    assert after.consecutive == [(0, 2), (6, 8)]
    assert after.pruned == [(2, 6)]
    assert after.attempts == before.attempts == [(1, 0, 4), (2, 4, 8)]
    assert after.attempts_within(3, 5) == [(1, 3, 4), (2, 4, 5)]
    with pytest.raises(UsageError, match="step 4 is not recorded; recorded are steps 0-1, 6-7"):
        after.parameters(4)
    assert theta.keys() == after.parameters(6).keys()


def test_only_segments_of_nothing_but_the_asked_steps_are_named(run: Path) -> None:
    opened = Run(run)
    assert opened.files_of(0, 3) == [SegmentName(1, 0, 2)]
    assert opened.files_of(3, 4) == []
    # Steps 4 and 5 of the first attempt were replaced; their segment goes with nobody's steps.
    assert SegmentName(1, 4, 6) not in opened.files_of(0, 8)


def test_verify_misses_lost_segments_and_not_pruned_ones(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prune(run, Run(run).files_of(2, 4))
    verdict = verify(run)
    assert (verdict.damages, verdict.pruned, verdict.usable) == ((), ((2, 4),), ((0, 2), (4, 8)))
    assert main(["verify", str(run)]) == 0
    assert capsys.readouterr().out.endswith("0 damaged; usable: steps 0-1, 4-7; pruned: steps 2-3\n")
    assert main(["info", str(run)]) == 0
    assert "\npruned steps             steps 2-3\n" in capsys.readouterr().out
    (run / SEGMENTS_FOLDER / SegmentName(1, 0, 2).file).unlink()
    assert [damage.lost for damage in verify(run).damages] == [((0, 2),)]


def test_a_segment_that_is_there_counts_although_it_was_to_be_pruned(run: Path) -> None:
    (name,) = Run(run).files_of(2, 4)
    file = run / SEGMENTS_FOLDER / name.file
    content = file.read_bytes()
    prune(run, [name])
    file.write_bytes(content)  # as after a kill between both
    assert pruned_segments(run) == []
    assert Run(run).steps == list(range(8))
    prune(run, Run(run).files_of(6, 8))
    file.unlink()
    assert pruned_segments(run) == [name, SegmentName(2, 6, 8)]
    assert len(list_segments(run)) == 3


@pytest.mark.parametrize("bit", range(0, 8 * 40, 7))
def test_no_flipped_bit_of_the_list_passes_unnoticed(run: Path, bit: int) -> None:
    prune(run, Run(run).files_of(2, 4))
    file = run / PRUNED_FILE
    data = bytearray(file.read_bytes())
    data[-1 - bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)
    with pytest.raises((FormatError, DamagedFileError)):
        Run(run)
