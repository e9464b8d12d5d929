"""What version 1 of the format made of checkpoints opens for ever, and the page names all that it holds."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from recorder.checkpoints import CheckpointReader, File, Record, Stored
from recorder.chordrun import ChordRun, open_run
from recorder.errors import FormatError, UsageError
from recorder.runformat import Run
from recorder.sealedjson import write as write_sealed
from recorder.verify import verify
from tests.golden import make_chord_v1

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden" / "run-v1-chord"
VALUES: dict[str, dict[str, list[float]]] = json.loads((GOLDEN / make_chord_v1.VALUES_FILE).read_text())


def read(run: ChordRun) -> dict[str, dict[str, list[float]]]:
    found = {}
    for k, t in enumerate(run.manifest.checkpoints):
        names = run.record(k).tensors
        tensors = CheckpointReader(run.path, run.record(k)).tensors(names)
        found[str(t)] = {name: tensor.double().flatten().tolist() for name, tensor in tensors.items()}
    return found


def test_a_run_of_checkpoints_of_version_1_reads_as_it_was_written() -> None:
    run = open_run(GOLDEN / "run")
    assert isinstance(run, ChordRun)
    assert run.manifest.checkpoints == make_chord_v1.STEPS
    assert read(run) == VALUES
    assert run.manifest.buffers == ("norm.running_mean",)
    assert [row.name for row in run.manifest.parameters if not row.trained] == ["inner.weight"]
    assert torch.equal(run.buffers(2)["norm.running_mean"], torch.full((3,), 35.0))
    assert verify(GOLDEN / "run").damages == ()


def test_the_program_that_made_it_still_makes_runs_that_read_the_same(tmp_path: Path) -> None:
    assert make_chord_v1.make(tmp_path) == VALUES
    run = open_run(tmp_path / "run")
    assert isinstance(run, ChordRun)
    assert read(run) == VALUES


def test_the_page_names_every_field_of_a_checkpoints_record() -> None:
    page = (ROOT / "docs" / "formats" / "run.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"`([a-z_0-9]+)`", page))
    assert {field.name for kind in (Record, File, Stored) for field in dataclasses.fields(kind)} <= documented


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "expected format lossledger-checkpoint version 1, found 'lossledger-checkpoint' version 2"),
        ({"colour": "red"}, "a field is missing, unknown or not understood"),
        ({"step": 11}, "expected the checkpoint of its folder, found that after 11 updates"),
    ],
)
def test_a_record_of_another_version_or_with_unknown_fields_is_refused(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    file = GOLDEN / "run" / "checkpoints" / "00000010" / "checkpoint.json"
    document = json.loads(file.read_text())
    del document["crc32"]
    target = tmp_path / "checkpoints" / "00000010" / "checkpoint.json"
    target.parent.mkdir(parents=True)
    write_sealed(target, document)
    assert Record.read(tmp_path, 10).step == 10
    write_sealed(target, document | changes)
    with pytest.raises(FormatError, match=re.escape(message)):
        Record.read(tmp_path, 10)


def test_neither_path_is_taken_for_the_other() -> None:
    with pytest.raises(UsageError, match="expected a recorded run, found one of path chord"):
        Run(GOLDEN / "run")
