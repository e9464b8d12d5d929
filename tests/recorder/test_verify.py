from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import recorder
from recorder.__main__ import main
from recorder.manifest import MANIFEST_FILE, Manifest, Trainer
from recorder.runformat import Run
from recorder.segments import segment_file
from recorder.verify import verify
from replay.__main__ import main as replay
from tests.cases import train

# The small models below have names that no naming rule knows.
pytestmark = pytest.mark.filterwarnings("ignore::recorder.parameters.UnmappedParameterWarning")

TRAINER = Trainer(name="torch", version="2", directory="")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three segments with a copied file and the state of a resumed optimizer."""
    folder = tmp_path_factory.mktemp("verify")
    (folder / "dict.txt").write_text("a 1\n")

    def resumed(parameters: Any) -> torch.optim.Optimizer:
        tensors = list(parameters)
        optimizer = torch.optim.Adam(tensors, lr=0.01)
        for tensor in tensors:
            tensor.grad = torch.full_like(tensor, 2.0)
        optimizer.step()
        optimizer.zero_grad()
        return optimizer

    train(
        folder / "run",
        steps=6,
        segment_steps=2,
        make_optimizer=resumed,
        trainer=TRAINER,
        files={"dict.txt": folder / "dict.txt"},
    )
    return folder / "run"


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def judged(run: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(["verify", str(run), "--json", *arguments])
    verdict: dict[str, Any] = json.loads(capsys.readouterr().out)
    return code, verdict


def test_a_whole_run_is_found_whole_and_every_file_is_read(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read: list[Path] = []
    verdict = verify(run, read.append)
    assert (verdict.damages, verdict.usable, verdict.unfinished) == ((), ((0, 6),), 0)
    files = {file for file in run.rglob("*") if file.is_file() and not file.name.startswith(".")}
    assert {run / MANIFEST_FILE, *read} == files
    code, facts = judged(run, capsys)
    assert (code, facts["whole"], facts["damages"]) == (0, True, [])
    assert facts["bytes"] == sum(file.stat().st_size for file in run.rglob("*") if file.is_file())
    assert main(["verify", str(run)]) == 0
    output, errors = capsys.readouterr()
    assert output.endswith("bytes read, 0 damaged; usable: steps 0-5\n")
    assert f"reading {segment_file(run, 2, 4)}" in errors


def middle(run: Path) -> Path:
    return segment_file(run, 2, 4)


def flip_last_byte(run: Path) -> Path:
    flip(middle(run), -1)
    return middle(run)


def flip_header(run: Path) -> Path:
    flip(middle(run), 100)
    return middle(run)


def truncate(run: Path) -> Path:
    middle(run).write_bytes(middle(run).read_bytes()[:-7])
    return middle(run)


def empty(run: Path) -> Path:
    middle(run).write_bytes(b"")
    return middle(run)


def exchange(run: Path) -> Path:
    shutil.copy(segment_file(run, 0, 2), middle(run))
    return middle(run)


def take_from_another_run(run: Path) -> Path:
    train(run.with_name("other"), steps=4, segment_steps=2)
    shutil.copy(segment_file(run.with_name("other"), 2, 4), middle(run))
    return middle(run)


def remove(run: Path) -> Path:
    middle(run).unlink()
    return run / "segments"


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (flip_last_byte, r"is damaged: expected CRC-32 \d+, found \d+"),
        (flip_header, "header"),
        (truncate, r"not a whole safetensors file \(\d+ bytes on disk"),
        (empty, r"not a whole safetensors file \(0 bytes on disk"),
        (exchange, "expected the steps of its name, found attempt 1, steps 0 to 1"),
        (take_from_another_run, "expected a segment of run [0-9a-f]{32}, found one of [0-9a-f]{32}"),
        (remove, r"expected the segments of steps 2-3 \(attempt 1\), found none"),
    ],
)
def test_a_damaged_segment_is_named_with_what_is_lost_and_what_is_usable(
    run: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], Path], found: str
) -> None:
    file = damage(run)
    code, verdict = judged(run, capsys)
    assert (code, verdict["whole"]) == (1, False)
    (damaged,) = verdict["damages"]
    assert damaged["file"] == str(file)
    assert damaged["lost"] == [[2, 4]]
    assert verdict["usable"] == [[0, 2], [4, 6]]
    assert main(["verify", str(run)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"{file}: ")
    assert lines[0].endswith("; lost with it: steps 2-3")
    assert lines[1].endswith("1 damaged; usable: steps 0-1, 4-5")
    assert re.search(found, lines[0])


def test_every_flipped_byte_of_a_run_is_found(run: Path) -> None:
    missed = []
    for file in sorted(run.rglob("*")):
        if not file.is_file() or file.name.startswith("."):
            continue
        content = file.read_bytes()
        for position in range(0, len(content), max(1, len(content) // 40)):
            flip(file, position)
            try:
                found = bool(verify(run).damages)
            except ValueError:
                found = file.name == MANIFEST_FILE
            if not found:
                missed.append((file.name, position))
            file.write_bytes(content)
    assert missed == []


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("untrained.safetensors", "untrained.safetensors"),
        ("optimizer.safetensors", "optimizer.safetensors"),
        ("trainer/dict.txt", r"expected CRC-32 \d+, found \d+"),
    ],
)
@pytest.mark.parametrize("missing", [False, True])
def test_a_damaged_file_that_every_step_needs_leaves_nothing_usable(
    run: Path, capsys: pytest.CaptureFixture[str], name: str, found: str, missing: bool
) -> None:
    if missing:
        (run / name).unlink()
    else:
        flip(run / name, -1)
    code, verdict = judged(run, capsys)
    assert code == 1
    (damaged,) = verdict["damages"]
    assert (damaged["file"], damaged["lost"], verdict["usable"]) == (str(run / name), [], [])
    main(["verify", str(run)])
    assert "; the run cannot be read without it" in capsys.readouterr().out


def test_one_file_under_the_name_of_another_is_found(run: Path) -> None:
    shutil.copy(run / "untrained.safetensors", run / "optimizer.safetensors")
    (damage,) = verify(run).damages
    assert damage.file == str(run / "optimizer.safetensors")
    assert "another file under this name" in damage.found


def test_a_file_that_is_no_segment_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    middle(run).rename(middle(run).with_name("00000002-00000004.safetensors"))
    code, verdict = judged(run, capsys)
    assert code == 1
    assert [Path(damage["file"]).name for damage in verdict["damages"]] == ["00000002-00000004.safetensors", "segments"]
    assert "was it renamed?" in verdict["damages"][0]["found"]


def test_a_segment_missing_at_the_end_is_missed(run: Path) -> None:
    segment_file(run, 4, 6).unlink()
    (damage,) = verify(run).damages
    assert damage.lost == ((4, 6),)
    assert verify(run).usable == ((0, 4),)


def test_steps_that_are_not_selected_are_not_missed(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with recorder.watch(model, optimizer, run=tmp_path, steps="1:3,5::4", segment_steps=2, first_step=1) as rec:
        for step in range(1, 16):
            rec.batch([step])
            model(torch.ones(2, 3)).sum().backward()
            optimizer.step()
    verdict = verify(tmp_path)
    assert (verdict.damages, verdict.usable) == ((), ((1, 3), (5, 6), (9, 10), (13, 14)))
    segment_file(tmp_path, 5, 10).unlink()
    (damage,) = verify(tmp_path).damages
    assert damage.lost == ((5, 6), (9, 10))


def test_the_segments_of_every_attempt_are_checked_and_only_the_timeline_is_usable(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run, steps=6, segment_steps=2)
    train(run, steps=4, segment_steps=2)  # from the start again
    assert Manifest.read(run).attempt.joined == "verified"
    flip(segment_file(run, 4, 6), -1)  # of the first attempt, all of whose steps were redone
    (damage,) = verify(run).damages
    assert (damage.file, damage.lost) == (str(segment_file(run, 4, 6)), ((4, 6),))
    assert verify(run).usable == ((0, 4),)
    flip(segment_file(run, 0, 2, attempt=2), -1)
    assert verify(run).usable == ((2, 4),)


def test_a_recording_that_goes_on_is_whole_as_far_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with recorder.watch(model, optimizer, run=tmp_path, segment_steps=2) as rec:
        for step in range(5):
            rec.batch([step])
            model(torch.ones(2, 3)).sum().backward()
            optimizer.step()
        rec.flush()
        code, verdict = judged(tmp_path, capsys)
        assert (code, verdict["usable"], verdict["unfinished"]) == (0, [[0, 4]], 1)
        main(["verify", str(tmp_path)])
        assert capsys.readouterr().out.endswith("; 1 segments in the making\n")


def test_damaged_segments_set_aside_leave_a_run_whose_rest_replays(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_last_byte(run)
    intact = segment_file(run, 0, 2).read_bytes()
    code, _ = judged(run, capsys, "--set-aside")
    assert code == 1
    assert [file.name for file in (run / "damaged").iterdir()] == [middle(run).name]
    assert not middle(run).exists()
    assert segment_file(run, 0, 2).read_bytes() == intact
    assert Run(run).consecutive == [(0, 2), (4, 6)]
    assert replay(["--run", str(run), "--workload", "recorded", "--loss-data", "batch", "--workers", "1"]) == 0
    assert "steps 0-1, 4-5 recorded" in capsys.readouterr().err
    # What was set aside stays missing; it was told once more, and nothing else is wrong.
    code, verdict = judged(run, capsys)
    assert (code, [damage["lost"] for damage in verdict["damages"]]) == (1, [[[2, 4]]])
    assert verdict["usable"] == [[0, 2], [4, 6]]


def test_nothing_of_a_whole_run_is_set_aside(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    assert judged(run, capsys, "--set-aside")[0] == 0
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_steps_beside_a_damaged_segment_can_be_read_without_setting_it_aside(run: Path) -> None:
    expected = Run(run).parameters(2)
    flip_header(run)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in Run(run).parameters(2).items())


def test_what_is_no_run_is_wrong_usage_and_a_broken_manifest_a_failure(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    assert "is no run" in capsys.readouterr().err
    flip(run / MANIFEST_FILE, 300)
    assert main(["verify", str(run)]) == 1
    assert MANIFEST_FILE in capsys.readouterr().err
