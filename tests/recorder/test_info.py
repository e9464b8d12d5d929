from __future__ import annotations

import json
from pathlib import Path

import pytest

from recorder.__main__ import main
from recorder.manifest import MANIFEST_FILE, Manifest
from recorder.runformat import Run
from recorder.segments import segment_file
from tests.cases import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("info") / "run"
    train(folder, steps=5, segment_steps=2)
    return folder


def test_info_for_a_machine_is_one_json_object_on_standard_output(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = train(run.with_name("again"), steps=1)
    assert main(["info", str(run), "--json"]) == 0
    output, errors = capsys.readouterr()
    assert errors == ""
    facts = json.loads(output)
    manifest = Manifest.read(run)
    assert facts == {
        "run": str(run),
        "run_id": manifest.run_id,
        "state": "complete",
        "path": "recorded",
        "trainer": f"torch {manifest.trainer.version}",
        "steps": "steps 0-4",
        "selected_steps": "all",
        "pruned_steps": "no steps",
        "segments": 3,
        "bytes": sum(file.stat().st_size for file in run.rglob("*") if file.is_file()),
        "trained_parameters": sum(tensor.numel() for tensor in model.parameters()),
        "untrained_parameters": 0,
        "not_recorded_parameters": 0,
        "buffers": 0,
        "batches": "store",
        "map": "as recorded",
        "created": manifest.provenance["created"],
        "attempts": [
            {
                "number": 1,
                "first_step": 0,
                "joined": "first",
                "state": "complete",
                "processes": 1,
                "created": manifest.attempt.created,
                "stop": 5,
                "recorded": "steps 0-4",
                "in_use": "steps 0-4",
            }
        ],
    }
    assert len(manifest.run_id) == 32


def test_info_for_a_person_says_the_same_in_lines(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(run)]) == 0
    output = capsys.readouterr().out
    lines = dict(line.split(maxsplit=1) for line in output.splitlines() if line.startswith("st"))
    assert lines == {"state": "complete", "steps": "steps 0-4"}
    size = sum(parameter.size for parameter in Run(run).manifest.trained)
    assert f"trained parameters       {size:,}\n" in output
    (attempt,) = (line for line in output.splitlines() if line.startswith("attempt"))
    assert attempt.split(maxsplit=2)[1:] == [
        "1",
        "from step 0, complete; joined: first; recorded steps 0-4, of which count steps 0-4",
    ]


def test_a_gap_in_the_steps_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "run", steps=5, segment_steps=2)
    segment_file(tmp_path / "run", 2, 4).unlink()
    assert main(["info", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == "steps 0-1, 4-4"


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (None, 2, "is no run: it holds no manifest.json"),
        ("{", 1, "cannot be read as JSON"),
        ('{"format": "lossledger-run", "version": 7}', 1, "expected format lossledger-run version 1, found"),
    ],
)
def test_an_error_is_one_line_on_standard_error_and_an_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, code: int, message: str
) -> None:
    if content is not None:
        (tmp_path / MANIFEST_FILE).write_text(content)
    assert main(["info", str(tmp_path)]) == code
    output, errors = capsys.readouterr()
    assert output == ""
    (line,) = errors.splitlines()
    assert line.startswith("python -m recorder: error: ")
    assert message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["info"], "required: RUN"),
        (["info", "run", "--colour"], "unknown arguments: --colour"),
        (["record", "run"], "invalid choice: 'record'"),
        (["fairseq-train", "data"], "required: --record-dir"),
        (["fairseq-train", "--record-dir", "x", "--record-batches", "all"], "invalid choice: 'all'"),
    ],
)
def test_a_wrong_command_line_exits_with_2_and_the_reason(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
