"""What version 1 of the format wrote opens for ever: the runs of tests/golden/run-v1, made by make_run_v1.py."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest

from recorder import tensorfile
from recorder.errors import FormatError
from recorder.manifest import MANIFEST_FILE
from recorder.runformat import Run
from recorder.segments import SEGMENTS_FOLDER, list_segments
from recorder.steps import Step
from recorder.tensorfile import TensorFile
from recorder.verify import verify
from tests.golden.make_run_v1 import HASHES_FILE, describe_micro_batch, describe_step, fingerprint, made_alike

GOLDEN = Path(__file__).parents[1] / "golden" / "run-v1"
EXPECTED: dict[str, dict[str, dict[str, str]]] = json.loads((GOLDEN / HASHES_FILE).read_text())
RUNS = sorted({name.partition("@")[0] for name in EXPECTED})

# Its parameters need no naming rule.
pytestmark = pytest.mark.filterwarnings("ignore::recorder.parameters.UnmappedParameterWarning")


def opened(folder: Path, name: str) -> Run:
    run, _, attempt = name.partition("@")
    return Run(folder / run, int(attempt) if attempt else None)


def fingerprint_of(step: Step) -> str:
    described = [
        describe_micro_batch(
            micro_batch.indices,
            micro_batch.batch() if micro_batch.stored else None,
            micro_batch.loss_sum,
            micro_batch.predictions,
            micro_batch.random_state["rng_cpu"],
        )
        for micro_batch in step.micro_batches
    ]
    return describe_step(step.epoch, step.seed, step.learning_rates, described)


def read(run: Run, expected: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """Read what there should be, in a new order."""
    backwards = {kind: [int(t) for t in reversed(of)] for kind, of in expected.items()}
    return {
        "parameters": {str(t): fingerprint(run.parameters(t)) for t in backwards["parameters"]},
        "buffers": {str(t): fingerprint(run.buffers(t)) for t in backwards["buffers"]},
        "steps": {str(t): fingerprint_of(run.step(t)) for t in backwards["steps"]},
    }


@pytest.mark.parametrize("name", EXPECTED)
def test_a_run_of_version_1_reads_as_it_was_written(name: str) -> None:
    run = opened(GOLDEN, name)
    assert run.steps == [int(t) for t in EXPECTED[name]["steps"]]
    assert read(run, EXPECTED[name]) == EXPECTED[name]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_version_1_is_found_whole(name: str) -> None:
    verdict = verify(GOLDEN / name)
    assert (verdict.damages, verdict.unfinished) == ((), 0)
    assert [t for start, stop in verdict.usable for t in range(start, stop)] == Run(GOLDEN / name).steps


def test_the_runs_hold_what_the_format_has() -> None:
    attempts, selected, half, buffered = (
        Run(GOLDEN / name) for name in ("attempts", "selected", "bfloat16", "buffers")
    )
    assert attempts.attempts == [(1, 0, 4), (2, 4, 8)]
    assert [entry.joined for entry in attempts.manifest.attempts] == ["first", "verified"]
    assert len(attempts.segments) >= 4
    assert "scale" in {row.name for row in attempts.manifest.trained}
    assert set(attempts.untrained()) == {"scale", "never"}
    assert [attempts.step(t).gradient_norm is not None for t in attempts.steps[:5]] == [True, True, True, False, True]
    assert (selected.manifest.steps, selected.steps) == ("1:3,5::3", [1, 2, 5, 8])
    state = selected.optimizer_state()
    assert state is not None
    assert len(state) == len(selected.manifest.trained) - 1  # `scale` had no gradient yet
    assert (half.manifest.batches, {row.dtype for row in half.manifest.parameters}) == ("indices", {"bfloat16"})
    assert {str(tensor.dtype) for tensor in buffered.buffers(3).values()} == {
        "torch.float32",
        "torch.int64",
        "torch.bool",
    }


def test_the_program_that_made_them_still_makes_runs_that_read_the_same(tmp_path: Path) -> None:
    assert made_alike(tmp_path) == EXPECTED
    for name, expected in EXPECTED.items():
        assert read(opened(tmp_path, name), expected) == expected


# --- What is not of version 1 is refused ----------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "attempts", tmp_path / "run"))


def change_manifest(run: Path, changes: dict[str, Any]) -> None:
    """Write the manifest anew, with a right checksum."""
    document = json.loads((run / MANIFEST_FILE).read_text()) | changes
    del document["crc32"]
    text = json.dumps(document, indent=1).removesuffix("\n}")
    (run / MANIFEST_FILE).write_text(f'{text},\n "crc32": "{zlib.crc32(text.encode()):08x}"\n}}\n')


def test_a_manifest_written_anew_without_a_change_is_taken(run: Path) -> None:
    change_manifest(run, {})
    assert Run(run).steps == Run(GOLDEN / "attempts").steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "expected format lossledger-run version 1, found 'lossledger-run' version 2"),
        ({"format": "other"}, "expected format lossledger-run version 1, found 'other' version 1"),
        ({"colour": "red"}, r"missing fields \[\], unknown fields \['colour'\]"),
        ({"attempts": [{"number": 1, "first_step": 0, "joined": "", "state": "", "colour": 1}]}, "not understood"),
        ({"trainer": {"name": "torch", "version": "2", "colour": "red"}}, "not understood"),
    ],
)
def test_an_unknown_version_or_field_of_the_manifest_is_refused(
    run: Path, changes: dict[str, Any], message: str
) -> None:
    change_manifest(run, changes)
    for read_it in (Run, verify):
        with pytest.raises(FormatError, match=message):
            read_it(run)


def test_a_segment_of_an_unknown_version_is_refused_and_named(run: Path) -> None:
    name = list_segments(run)[0]
    path = run / SEGMENTS_FOLDER / name.file
    file = TensorFile(path)
    tensorfile.write(path, {entry: file.tensor(entry) for entry in file.names}, {**file.facts, "version": 2})
    with pytest.raises(FormatError, match=r"expected a segment of lossledger-run version 1, found .* version 2"):
        Run(run).parameters(0)
    (damage,) = verify(run).damages
    assert (damage.file, damage.lost) == (str(path), ((name.start, name.stop),))


def test_a_constant_file_of_an_unknown_version_is_refused(run: Path) -> None:
    path = run / "untrained.safetensors"
    file = TensorFile(path)
    tensorfile.write(path, {entry: file.tensor(entry) for entry in file.names}, {**file.facts, "version": 2})
    (damage,) = verify(run).damages
    assert damage.file == str(path)
    with pytest.raises(FormatError, match="version"):
        Run(run).untrained()
