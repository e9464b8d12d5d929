from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import recorder
from recorder.__main__ import main
from recorder.errors import LossledgerError
from recorder.runformat import Run
from recorder.segments import SEGMENTS_FOLDER, Segment, SegmentName, list_segments
from recorder.verify import DAMAGED_FOLDER, set_aside, verify
from tests.reliability.conftest import Promise
from tests.reliability.counts import SEED, SEGMENTS
from tests.reliability.trainings import build, expected_states, fingerprint, update

pytestmark = pytest.mark.filterwarnings("ignore::recorder.parameters.UnmappedParameterWarning")

_LENGTH = 2


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("recorded") / "run"
    model, optimizer = build("adam")
    with recorder.watch(model, optimizer, run=run, segment_steps=_LENGTH) as rec:
        for step in range(_LENGTH * SEGMENTS):
            update(model, optimizer, step, rec)
    assert len(list_segments(run)) == SEGMENTS
    return run


def _flip(file: Path, chance: random.Random) -> str:
    content = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[chance.randrange(header, len(content))] ^= 1 << chance.randrange(8)  # in a tensor
    file.write_bytes(content)
    return r"tensor '[^']+' is damaged: expected CRC-32 \d+, found \d+"


def _cut(file: Path, chance: random.Random) -> str:
    whole = file.read_bytes()
    size = chance.randrange(len(whole))
    with file.open("rb+") as stream:
        stream.truncate(size)
    header = 8 + int.from_bytes(whole[:8], "little")
    expected = rf"By its header it has {len(whole)} bytes\." if size >= header else ""  # if the header is left
    return rf"not a whole safetensors file \({size} bytes on disk; .*{expected}"


def _zero(file: Path, chance: random.Random) -> str:
    file.write_bytes(bytes(file.stat().st_size))
    return "not a whole safetensors file"


def _exchange(file: Path, chance: random.Random) -> str:
    other = chance.choice([entry for entry in sorted(file.parent.iterdir()) if entry != file])
    shutil.copyfile(other, file)
    return r"expected the steps of its name, found attempt 1, steps \d+ to \d+"


def test_damage_to_one_segment_costs_its_steps_alone_and_is_named(
    tmp_path: Path, promise: Promise, recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    states = expected_states("adam", "float32", _LENGTH * SEGMENTS)
    chance = random.Random(SEED)
    with promise("F2", SEED) as tally:
        for number, name in enumerate(list_segments(recorded)):
            harm = (_flip, _cut, _zero, _exchange)[number % 4]
            with tally.case(f"{name.file}, {harm.__name__}"):
                run = tmp_path / "run"
                shutil.copytree(recorded, run)
                file = run / SEGMENTS_FOLDER / name.file
                found = harm(file, chance)
                _assert_named(run, file, name, found)
                _assert_command_says_so(run, file, capsys)
                (moved,) = set_aside(verify(run))
                assert moved == run / DAMAGED_FOLDER / name.file
                _assert_rest_reads(run, name, states)
            shutil.rmtree(run, ignore_errors=True)


def _assert_named(run: Path, file: Path, name: SegmentName, found: str) -> None:
    verdict = verify(run)
    (damage,) = verdict.damages
    assert damage.file == str(file)
    assert re.search(found, damage.found), damage.found
    assert damage.lost == ((name.start, name.stop),)
    rest = [(0, name.start), (name.stop, _LENGTH * SEGMENTS)]
    assert verdict.usable == tuple((start, stop) for start, stop in rest if start < stop)
    with pytest.raises(LossledgerError):
        Segment(file).verify()


def _assert_command_says_so(run: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["verify", str(run), "--json"]) == 1
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert told["whole"] is False
    assert [damage["file"] for damage in told["damages"]] == [str(file)]


def _assert_rest_reads(run: Path, lost: SegmentName, states: list[str]) -> None:
    opened = Run(run)
    assert opened.steps == [t for t in range(_LENGTH * SEGMENTS) if not lost.start <= t < lost.stop]
    for t in opened.steps:
        assert opened.step(t).step == t
        assert fingerprint(opened.parameters(t)) == states[t]
        assert fingerprint(opened.parameters(t + 1)) == states[t + 1]
    verdict = verify(run)
    (damage,) = verdict.damages  # what is lost stays told
    assert damage.lost == ((lost.start, lost.stop),)
    assert [(start, stop) for start, stop in verdict.usable] == opened.consecutive


def test_verify_ends_with_0_for_a_whole_run_1_for_a_damaged_one_2_for_none(
    tmp_path: Path, promise: Promise, recorded: Path
) -> None:
    with promise("F2") as tally, tally.case("exit codes"):
        shutil.copytree(recorded, tmp_path / "run")
        assert main(["verify", str(tmp_path / "run")]) == 0
        next((tmp_path / "run" / SEGMENTS_FOLDER).glob("*.safetensors")).unlink()
        assert main(["verify", str(tmp_path / "run")]) == 1
        assert main(["verify", str(tmp_path / "none")]) == 2
