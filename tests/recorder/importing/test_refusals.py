"""Checkpoints that do not fit are refused in one line that names everything; no file's code ever runs."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from recorder.importing.found import number_in
from tests import cases, checkpoints
from tests.checkpoints import State

Importing = Callable[..., tuple[int, str]]
FC1 = "decoder.layers.0.fc1.weight"


def changed(states: Mapping[int, State], change: Callable[[dict[str, torch.Tensor]], object]) -> dict[int, State]:
    copies: dict[int, State] = {}
    for t, state in states.items():
        copy = checkpoints.untied(state)
        change(copy)
        copies[t] = copy
    return copies


def rename(state: dict[str, torch.Tensor]) -> None:
    state["decoder.layers.0.ffn1.weight"] = state.pop(FC1)


def drop(state: dict[str, torch.Tensor]) -> None:
    del state["decoder.layers.1.fc2.bias"]


def reshape(state: dict[str, torch.Tensor]) -> None:
    state[FC1] = state[FC1].T.contiguous()


def add(state: dict[str, torch.Tensor]) -> None:
    state["decoder.layers.2.fc1.weight"] = torch.ones(2, 3)


def quantise(state: dict[str, torch.Tensor]) -> None:
    state[FC1] = state[FC1].to(torch.int8)


def everything(state: dict[str, torch.Tensor]) -> None:
    rename(state)
    drop(state)
    add(state)
    name = "decoder.layers.1.fc1.bias"
    state[name] = state[name][:3]


@pytest.mark.parametrize(
    ("change", "complaints"),
    [
        (
            rename,
            [
                f"in all 4 checkpoints: 1 parameters are missing: '{FC1}' (16, 8) (renamed? there is 'decoder.layers.0",
                "1 tensors are not the model's: 'decoder.layers.0.ffn1.weight' (16, 8)",
            ],
        ),
        (drop, ["1 parameters are missing: 'decoder.layers.1.fc2.bias' (8,)"]),
        (reshape, [f"1 shapes differ: '{FC1}' is (8, 16), the model's (16, 8)"]),
        (
            add,
            ["1 tensors are not the model's: 'decoder.layers.2.fc1.weight' (2, 3); if the loss does not need them"],
        ),
        (quantise, [f"1 parameters are in none of bfloat16, float16, float32, float64: '{FC1}' is int8"]),
        (
            everything,
            [
                f"2 parameters are missing: '{FC1}' (16, 8) (renamed?",
                "'decoder.layers.1.fc2.bias' (8,)",
                "2 tensors are not the model's",
                "1 shapes differ: 'decoder.layers.1.fc1.bias' is (3,), the model's (16,)",
                "Let the workload build the model that was trained",
            ],
        ),
    ],
)
def test_what_does_not_fit_the_model_is_named_in_one_line(
    change: Callable[[dict[str, torch.Tensor]], object],
    complaints: list[str],
    importing: Importing,
    states: Mapping[int, State],
    tmp_path: Path,
) -> None:
    source = checkpoints.as_huggingface(tmp_path / "source", changed(states, change))
    code, said = importing(source)
    assert code == 2
    assert said.count("\n") == 1
    assert said.startswith(
        f"python -m recorder: error: {source}: the checkpoints are not of the model that tests.cases:"
    )
    for complaint in complaints:
        assert complaint in said
    assert not (tmp_path / "run").exists()


def test_one_of_many_checkpoints_is_named(importing: Importing, states: Mapping[int, State], tmp_path: Path) -> None:
    one = {**states, **changed({4: states[4]}, drop)}
    _, said = importing(checkpoints.as_huggingface(tmp_path / "source", one))
    assert "in checkpoint-4: 1 parameters are missing" in said


def test_tensors_beyond_the_model_may_be_ignored_by_a_pattern(
    importing: Importing, states: Mapping[int, State], tmp_path: Path
) -> None:
    source = checkpoints.as_huggingface(tmp_path / "source", changed(states, add))
    assert importing(source, "--ignore", "decoder.layers.2.*")[0] == 0


def test_a_dtype_that_changes_between_checkpoints_is_refused(
    importing: Importing, states: Mapping[int, State], tmp_path: Path
) -> None:
    mixed = {**states, 4: {name: tensor.bfloat16() for name, tensor in states[4].items()}}
    code, said = importing(checkpoints.as_huggingface(tmp_path / "source", mixed))
    assert code == 2
    assert "parameters change their dtype between checkpoints" in said
    assert "is float32 in checkpoint-0 and bfloat16 in checkpoint-4" in said


def test_tied_weights_that_differ_in_the_checkpoint_are_refused(
    importing: Importing, states: Mapping[int, State], tmp_path: Path
) -> None:
    loose = {
        t: {**state, "decoder.output_projection.weight": state["decoder.output_projection.weight"] + 1}
        for t, state in states.items()
    }
    code, said = importing(checkpoints.as_fairseq(tmp_path / "source", loose))
    assert code == 2
    assert (
        "'decoder.embed_tokens.weight' and 'decoder.output_projection.weight' are one tensor in the model that the "
        "workload builds, and differ in the checkpoint" in said
    )


def test_two_prefixes_that_fit_equally_well_ask_for_a_choice(
    importing: Importing, states: Mapping[int, State], tmp_path: Path
) -> None:
    both = {
        t: {f"{prefix}.{name}": tensor for prefix in ("model", "ema") for name, tensor in state.items()}
        for t, state in states.items()
    }
    source = checkpoints.as_fairseq(tmp_path / "source", both)
    code, said = importing(source)
    assert code == 2
    assert "behind each of the prefixes 'ema.' and 'model.'; say which holds the model: --prefix PREFIX" in said
    assert importing(source, "--prefix", "model.")[0] == 0


def test_two_checkpoints_of_one_number_that_differ_are_refused(
    importing: Importing, states: Mapping[int, State], tmp_path: Path
) -> None:
    source = checkpoints.as_fairseq(tmp_path / "source", states)
    torch.save({"model": dict(states[0]), "optimizer_history": [{"num_updates": 6}]}, source / "checkpoint_best.pt")
    code, said = importing(source)
    assert code == 2
    assert "are both after 6 updates, and" in said
    assert "checkpoint_best.pt" in said


def test_one_checkpoint_is_too_few(importing: Importing, states: Mapping[int, State], tmp_path: Path) -> None:
    code, said = importing(checkpoints.as_huggingface(tmp_path / "source", {2: states[2]}))
    assert code == 2
    assert "expected checkpoints of 2 different numbers of updates or more" in said
    assert "found checkpoint-2 after 2 updates (kind huggingface)" in said


def test_checkpoints_that_are_all_the_same_leave_nothing_to_allocate(
    importing: Importing, states: Mapping[int, State], tmp_path: Path
) -> None:
    code, said = importing(checkpoints.as_huggingface(tmp_path / "source", dict.fromkeys((0, 5), states[2])))
    assert code == 2
    assert "all 2 checkpoints are the same, bit for bit: there is nothing to allocate" in said


def test_a_recorded_run_and_a_folder_of_something_else_are_no_place_to_import_into(
    training: checkpoints.Training, importing: Importing, states: Mapping[int, State], tmp_path: Path
) -> None:
    source = checkpoints.as_huggingface(tmp_path / "source", states)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    assert "holds 'thesis.tex' and is no run" in importing(source)[1]
    (tmp_path / "run" / "thesis.tex").unlink()
    (tmp_path / "run" / "manifest.json").write_bytes((training.run / "manifest.json").read_bytes())
    assert "holds a run of path recorded; give another folder to import into" in importing(source)[1]


def test_a_checkpoint_that_lies_between_those_of_the_run_or_is_gone_is_refused(
    importing: Importing, states: Mapping[int, State], tmp_path: Path
) -> None:
    source = checkpoints.as_huggingface(tmp_path / "source", {t: states[t] for t in (0, 6)})
    importing(source)
    checkpoints.as_huggingface(source, {2: states[2]})
    assert (
        "the checkpoint after 2 updates lies between those of the run; import into a new folder" in importing(source)[1]
    )
    other = checkpoints.as_huggingface(tmp_path / "other", {t: states[t] for t in (0, 4)})
    assert "holds the checkpoint after 6 updates, which" in importing(other)[1]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "expected a SOURCE, or --step N=PATH for each checkpoint"),
        (("--step", "7"), "--step expects N=PATH, N being the number of updates done, got '7'"),
        (("nowhere",), "nowhere: no such file or folder"),
        (("{empty}",), "holds no checkpoints of a known kind"),
        (("{empty}", "--kind", "fairseq"), "expected fairseq's checkpoint*.pt, found none"),
        (("{empty}", "--kind", "huggingface"), "expected folders checkpoint-*"),
        (("{empty}", "--kind", "lightning"), "expected Lightning's *.ckpt there or in"),
        (("{empty}", "--kind", "distributed"), "expected folders of torch.distributed.checkpoint"),
        (("{empty}", "--kind", "files"), "expected files .safetensors"),
        (
            ("--step", "0={empty}", "--step", "1={empty}"),
            "expected a checkpoint, found a folder without model.safetensors",
        ),
        (
            ("--step", "0={text}", "--step", "1={text}"),
            "expected a file of weights, with one of the endings .safetensors",
        ),
        (("{list}",), "line 2: expected a number of updates, a comma, a path; found 'ten,x.pt'"),
    ],
)
def test_wrong_use_is_told_in_one_line(
    arguments: tuple[str, ...], complaint: str, importing: Importing, tmp_path: Path
) -> None:
    places = {"empty": tmp_path / "empty", "text": tmp_path / "notes.md", "list": tmp_path / "list.csv"}
    places["empty"].mkdir()
    places["text"].touch()
    places["list"].write_text("0,a.pt\nten,x.pt\n")
    code, said = importing(*(argument.format(**places) for argument in arguments))
    assert (code, said.count("\n")) == (2, 1)
    assert complaint in said


def test_files_that_are_not_what_their_names_say_are_refused_by_name(importing: Importing, tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.pt"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
    torch.save({"lr": 1.0}, tmp_path / "c.pt")
    torch.save({"net_a": {"w": torch.ones(1)}, "net_b": {"w": torch.ones(1)}}, tmp_path / "d.pt")
    for name, complaint in {
        "a.safetensors": "cannot be read as a safetensors file",
        "b.pt": "or is no file of torch.save",
        "c.pt": "expected the model's tensors under one of state_dict, model,",
        "d.pt": "found 'net_a', 'net_b'",
    }.items():
        code, said = importing("--step", f"0={tmp_path / name}", "--step", f"1={tmp_path / name}")
        assert (code, said.count("\n")) == (2, 1)
        assert f"{tmp_path / name}: " in said
        assert complaint in said


# --- What a file brings along does not run --------------------------------------------------------------------------


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.witness, "it ran"))


def malicious_fairseq(folder: Path, states: Mapping[int, State], witness: Path) -> Path:
    folder.mkdir()
    for t, state in states.items():
        document = {"model": dict(state), "optimizer_history": [{"num_updates": t}], "extra_state": Malicious(witness)}
        torch.save(document, folder / f"checkpoint_{t}.pt")
    return folder


def malicious_lightning(folder: Path, states: Mapping[int, State], witness: Path) -> Path:
    folder.mkdir()
    for t, state in states.items():
        torch.save({"state_dict": dict(state), "global_step": t, "callbacks": Malicious(witness)}, folder / f"{t}.ckpt")
    return folder


def malicious_bin(folder: Path, states: Mapping[int, State], witness: Path) -> Path:
    for t, state in states.items():
        (folder / f"checkpoint-{t}").mkdir(parents=True)
        torch.save({**state, "x": Malicious(witness)}, folder / f"checkpoint-{t}" / "pytorch_model.bin")
    return folder


def malicious_legacy(folder: Path, states: Mapping[int, State], witness: Path) -> Path:
    folder.mkdir()
    for t, state in states.items():
        document = {"model": dict(state), "optimizer_history": [{"num_updates": t}], "args": Malicious(witness)}
        torch.save(document, folder / f"checkpoint_{t}.pt", _use_new_zipfile_serialization=False)
        assert not zipfile.is_zipfile(folder / f"checkpoint_{t}.pt")
    return folder


def malicious_metadata(folder: Path, states: Mapping[int, State], witness: Path) -> Path:
    checkpoints.as_distributed(folder, states)
    for place in folder.iterdir():
        metadata = pickle.loads((place / ".metadata").read_bytes())
        metadata.planner_data = Malicious(witness)
        (place / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder


def malicious_distributed_bytes(folder: Path, states: Mapping[int, State], witness: Path) -> Path:
    checkpoints.as_distributed(folder, {t: {**state, "x": Malicious(witness)} for t, state in states.items()})  # type: ignore[dict-item]
    return folder


@pytest.mark.parametrize(
    "make", [malicious_fairseq, malicious_lightning, malicious_bin, malicious_legacy, malicious_metadata]
)
def test_a_file_that_would_run_code_is_refused_and_nothing_runs(
    make: Callable[[Path, Mapping[int, State], Path], Path],
    importing: Importing,
    states: Mapping[int, State],
    tmp_path: Path,
) -> None:
    witness = tmp_path / "witness"
    code, said = importing(make(tmp_path / "source", states, witness))
    assert not witness.exists()
    assert (code, said.count("\n")) == (2, 1)
    assert "could run code of whoever made" in said
    assert not (tmp_path / "run").exists()


def test_the_malicious_object_does_run_where_it_is_let(tmp_path: Path) -> None:
    # Else the tests above would prove nothing.
    witness = tmp_path / "witness"
    pickle.loads(pickle.dumps(Malicious(witness)))
    assert witness.read_text() == "it ran"


def test_objects_beside_the_tensors_of_a_distributed_checkpoint_are_not_loaded(
    importing: Importing, states: Mapping[int, State], tmp_path: Path
) -> None:
    witness = tmp_path / "witness"
    assert importing(malicious_distributed_bytes(tmp_path / "source", states, witness))[0] == 0
    assert not witness.exists()


def test_nothing_is_allowed_for_longer_than_a_load(
    importing: Importing, states: Mapping[int, State], tmp_path: Path
) -> None:
    before = set(torch.serialization.get_safe_globals())
    importing(checkpoints.as_fairseq(tmp_path / "source", states))
    assert set(torch.serialization.get_safe_globals()) == before
    assert argparse.Namespace not in before


# --- Names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("step1000", 1000),
        ("checkpoint-500", 500),
        ("global_step300", 300),
        ("iter_0000020", 20),
        ("stage1-step1000-tokens5B", 1000),
        ("epoch=2-step=300", 300),
        ("ckpt7", 7),
        ("42", 42),
        ("main", None),
        ("v2-final-3", None),
    ],
)
def test_a_number_of_updates_is_read_from_a_name_only_where_it_is_clear(name: str, number: int | None) -> None:
    assert number_in(name) == number


def test_a_workload_that_wraps_the_trained_model_is_seen_through(
    importing: Importing, states: Mapping[int, State], tmp_path: Path
) -> None:
    code, said = importing(
        checkpoints.as_huggingface(tmp_path / "source", states), workload="tests.recorder.importing.wrapped:workload"
    )
    assert code == 0, said
    assert "names with 'model.' before them" in said


def test_buffers_that_change_are_taken_and_a_constant_one_is_left_to_the_workload(
    importing: Importing, tmp_path: Path
) -> None:
    from recorder.chordrun import open_run
    from tests.recorder.importing.wrapped import normed

    model = normed().model()
    for t in (0, 1, 2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        model.get_buffer("norm.running_mean").add_(t)
        (tmp_path / "source").mkdir(exist_ok=True)
        save_file(checkpoints.copied(model), tmp_path / "source" / f"step{t}.safetensors")  # type: ignore[arg-type]
    code, said = importing(tmp_path / "source", workload="tests.recorder.importing.wrapped:normed")
    assert code == 0, said
    run = open_run(tmp_path / "run")
    assert run.manifest.buffers == ("norm.running_mean",)
    assert [float(run.buffers(k)["norm.running_mean"][0]) for k in (0, 1, 2)] == [0, 1, 3]
    assert "buffers taken from the checkpoints: norm.running_mean" in said


def test_the_tests_model_is_the_one_that_is_imported() -> None:
    assert FC1 in dict(cases.workload().model().named_parameters())
