"""Every kind of checkpoints gives the same run: the parameters of the training, after the same numbers of updates."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from recorder.__main__ import main
from recorder.checkpoints import Record
from recorder.chordrun import ChordRun, open_run
from recorder.errors import DamagedFileError
from recorder.verify import verify
from tests import cases, checkpoints
from tests.checkpoints import KINDS, LINKED, State

Importing = Callable[..., tuple[int, str]]


def agrees(run: Path, states: Mapping[int, State]) -> None:
    opened = open_run(run)
    assert opened.manifest.path == "chord"
    assert opened.manifest.checkpoints == tuple(sorted(states))
    assert opened.steps == list(range(len(states) - 1))
    for k, state in enumerate(states.values()):
        parameters = opened.parameters(k)
        assert set(parameters) == {name for name, _ in cases.workload().model().named_parameters()}
        for name, tensor in parameters.items():
            assert torch.equal(tensor, state[name])


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_recognised_and_its_parameters_are_those_of_the_training(
    kind: str, importing: Importing, states: Mapping[int, State], tmp_path: Path
) -> None:
    source = KINDS[kind](tmp_path / "source", states)
    code, said = importing(source)
    assert (code, "Warning" in said) == (0, False)
    run = tmp_path / "run"
    agrees(run, states)
    assert f"4 checkpoints after 0, 2, 4, 6 updates: {8 if 'shards' in kind else 4} files " in said
    assert verify(run).damages == ()
    assert verify(run).usable == ((0, 6),)
    assert not list(run.rglob("*.partial"))
    manifest = checkpoints.facts(run)
    assert manifest["workload"] == checkpoints.WORKLOAD
    assert manifest["provenance"]["source"] == str(source)
    assert {row["status"] for row in manifest["parameters"]} == {"trained"}
    assert open_run(run).manifest.parameters == open_run(run).manifest.trained


@pytest.mark.parametrize("kind", LINKED)
def test_safetensors_files_are_linked(
    kind: str, importing: Importing, states: Mapping[int, State], tmp_path: Path
) -> None:
    source = KINDS[kind](tmp_path / "source", states)
    there = source if source.is_dir() else source.parent
    theirs = {file.stat().st_ino for file in there.rglob("*") if file.resolve().is_file()}
    importing(source)
    ours = list((tmp_path / "run" / "checkpoints").rglob("*.safetensors"))
    assert len(ours) == (8 if "shards" in kind else 4)
    assert {file.stat().st_ino for file in ours} <= theirs
    assert not any(file.is_symlink() for file in ours)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - set(LINKED)))
def test_other_files_are_written_as_safetensors_without_the_optimizer(
    kind: str, importing: Importing, states: Mapping[int, State], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    importing(KINDS[kind](tmp_path / "source", states))
    file = tmp_path / "run" / "checkpoints" / "00000004" / "model.safetensors"
    found = load_file(file)
    assert set(found) == {name for name, _ in cases.workload().model().named_parameters()}
    assert all(torch.equal(tensor, states[4][name]) for name, tensor in found.items())
    assert {file.stat().st_nlink for file in file.parent.iterdir()} == {1}


def test_where_no_hard_link_can_be_made_a_symbolic_one_is_and_the_source_must_be_kept(
    importing: Importing, states: Mapping[int, State], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    code, said = importing(checkpoints.as_hub_cache(tmp_path / "source", states))
    assert code == 0
    assert "4 files linked by name to another file system; keep the source" in said
    agrees(tmp_path / "run", states)
    (file,) = (tmp_path / "run" / "checkpoints" / "00000002").glob("*.safetensors")
    # It leads to the file itself, not to another link.
    assert file.is_symlink()
    assert not file.readlink().is_symlink()


def test_the_numbers_are_the_checkpoints_own_and_copies_are_recognised(
    importing: Importing, states: Mapping[int, State], tmp_path: Path
) -> None:
    _, said = importing(checkpoints.as_fairseq(tmp_path / "source", states))
    assert "checkpoint_last.pt is a copy of checkpoint4.pt, both after 6 updates: left out" in said
    assert [open_run(tmp_path / "run").step(k).epoch for k in range(3)] == [1, 2, 3]


def test_what_a_revision_without_a_number_is_said_to_be(
    importing: Importing, states: Mapping[int, State], tmp_path: Path
) -> None:
    _, said = importing(checkpoints.as_hub_cache(tmp_path / "source", states))
    assert "left out, for their names have no number of updates: revisions main" in said


def test_prefixes_are_taken_off_and_said(importing: Importing, states: Mapping[int, State], tmp_path: Path) -> None:
    _, said = importing(checkpoints.as_lightning(tmp_path / "source", states))
    assert "names without their 'model.', 1 tensors outside it left out" in said


def test_checkpoints_are_named_one_by_one(importing: Importing, states: Mapping[int, State], tmp_path: Path) -> None:
    folder = tmp_path / "source"
    checkpoints.as_huggingface(folder, {0: states[0]})
    checkpoints.as_distributed(folder, {2: states[2]})
    checkpoints.as_numbered_files(tmp_path / "files", {4: states[4], 6: states[6]})
    code, _ = importing(
        *("--step", f"0={folder / 'checkpoint-0'}", "--step", f"2={folder / 'step-2'}"),
        *("--step", f"4={tmp_path / 'files' / 'ckpt_4.pt'}", "--step", f"6={tmp_path / 'files' / 'ckpt_6.pt'}"),
    )
    assert code == 0
    agrees(tmp_path / "run", states)


def test_an_interrupted_import_goes_on_and_finished_checkpoints_are_not_done_again(
    importing: Importing, states: Mapping[int, State], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoints.as_fairseq(tmp_path / "source", states)
    write = Record.write

    def killed(record: Record, run: Path) -> None:
        if record.step == 4:
            raise KeyboardInterrupt
        write(record, run)

    with monkeypatch.context() as patched:
        patched.setattr(Record, "write", killed)
        assert importing(source)[0] == 130
    assert not (tmp_path / "run" / "manifest.json").exists()
    finished = [tmp_path / "run" / "checkpoints" / f"{t:08d}" / "model.safetensors" for t in (0, 2)]
    before = [(file.stat().st_ino, file.stat().st_mtime_ns) for file in finished]
    assert importing(source)[0] == 0
    assert [(file.stat().st_ino, file.stat().st_mtime_ns) for file in finished] == before
    agrees(tmp_path / "run", states)


def test_the_same_command_adds_what_has_come_since(
    importing: Importing, states: Mapping[int, State], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    checkpoints.as_huggingface(source, {t: states[t] for t in (0, 2)})
    importing(source)
    identity = checkpoints.facts(tmp_path / "run")["run_id"]
    checkpoints.as_huggingface(source, {t: states[t] for t in (4, 6)})
    assert importing(source)[0] == 0
    agrees(tmp_path / "run", states)
    assert checkpoints.facts(tmp_path / "run")["run_id"] == identity


def test_a_source_that_was_moved_is_the_same_source(
    importing: Importing, states: Mapping[int, State], tmp_path: Path
) -> None:
    source = checkpoints.as_huggingface(tmp_path / "source", states)
    importing(source)
    moved = Path(shutil.copytree(source, tmp_path / "moved"))
    for file in moved.rglob("*.safetensors"):
        os.utime(file, (1, 1))
    shutil.rmtree(source)
    assert importing(moved)[0] == 0
    agrees(tmp_path / "run", states)


def test_a_parameter_that_never_changes_is_untrained_and_one_that_does_is_trained_whatever_the_model_says(
    importing: Importing, states: Mapping[int, State], tmp_path: Path
) -> None:
    still = {
        t: {**state, "decoder.layers.0.fc1.bias": states[0]["decoder.layers.0.fc1.bias"]} for t, state in states.items()
    }
    _, said = importing(checkpoints.as_huggingface(tmp_path / "source", still))
    assert (
        "1 parameters (16 entries) are the same in all checkpoints, so they count as untrained: decoder.layers.0"
        in said
    )
    run = open_run(tmp_path / "run")
    assert [row.name for row in run.manifest.parameters if not row.trained] == ["decoder.layers.0.fc1.bias"]
    assert torch.equal(run.untrained()["decoder.layers.0.fc1.bias"], states[0]["decoder.layers.0.fc1.bias"])
    assert "decoder.layers.0.fc1.bias" not in run.parameters(1)


def test_identical_neighbours_are_named_and_kept(
    importing: Importing, states: Mapping[int, State], tmp_path: Path
) -> None:
    same = {**states, 4: states[2]}
    _, said = importing(checkpoints.as_huggingface(tmp_path / "source", same))
    assert "identical neighbours: after 2 and 4 updates the checkpoints are the same, bit for bit" in said
    agrees(tmp_path / "run", same)


def test_a_checkpoint_in_another_dtype_is_taken_as_it_is(
    importing: Importing, states: Mapping[int, State], tmp_path: Path
) -> None:
    half = {t: {name: tensor.bfloat16() for name, tensor in state.items()} for t, state in states.items()}
    _, said = importing(checkpoints.as_fairseq(tmp_path / "source", half))
    assert "the model is built in float32, the checkpoints are in bfloat16" in said
    agrees(tmp_path / "run", half)
    assert {(row.dtype, row.model_dtype) for row in open_run(tmp_path / "run").manifest.trained} == {
        ("bfloat16", "float32")
    }


def test_only_the_alias_of_a_tied_weight_may_be_there(
    importing: Importing, states: Mapping[int, State], tmp_path: Path
) -> None:
    alias = {
        t: {name: tensor for name, tensor in state.items() if "embed_tokens" not in name} for t, state in states.items()
    }
    assert importing(checkpoints.as_fairseq(tmp_path / "source", alias))[0] == 0
    agrees(tmp_path / "run", states)


def test_a_source_that_changed_after_the_import_is_found(
    importing: Importing, states: Mapping[int, State], tmp_path: Path
) -> None:
    source = checkpoints.as_huggingface(tmp_path / "source", states)
    importing(source)
    file = source / "checkpoint-2" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    with file.open("rb+") as stream:  # in place: the link leads to the same bytes
        stream.write(content)
    run = open_run(tmp_path / "run")
    with pytest.raises(DamagedFileError, match=r"is not the one that was imported: .*It is a hard link"):
        run.parameters(1)
    run.parameters(0)
    (damage,) = verify(tmp_path / "run").damages
    assert damage.lost == ((0, 4),)
    assert verify(tmp_path / "run").usable == ((4, 6),)
    code, said = importing(source)
    assert code == 2
    assert "checkpoint-2: the checkpoint after 2 updates has changed since it was imported" in said
    file.write_bytes(content[:-8])
    with pytest.raises(DamagedFileError, match="bytes; it had"):
        open_run(tmp_path / "run").parameters(1)


def test_info_tells_of_checkpoints(
    importing: Importing, states: Mapping[int, State], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    importing(checkpoints.as_huggingface(tmp_path / "source", states))
    assert main(["info", "--json", str(tmp_path / "run")]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["path"], facts["steps"], facts["checkpoints"]) == ("chord", "updates 0 to 6", [0, 2, 4, 6])
    assert facts["files"] == "4 by hard link"
    assert "segments" not in facts


def test_an_interval_tells_its_updates_and_no_batches(
    importing: Importing, states: Mapping[int, State], tmp_path: Path
) -> None:
    importing(checkpoints.as_huggingface(tmp_path / "source", states))
    run = open_run(tmp_path / "run")
    assert isinstance(run, ChordRun)
    assert [run.updates(k) for k in run.steps] == [(0, 2), (2, 4), (4, 6)]
    step = run.step(1)
    assert (step.updates, step.first_update, step.micro_batches) == ((2, 4), 2, ())
    assert (run.consecutive, run.attempts_within(1, 3), run.pruned) == ([(0, 3)], [(1, 1, 3)], [])
