"""``python -m recorder map``, and maps given to a training."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import recorder
from recorder.__main__ import main
from recorder.correction import correct
from recorder.errors import DamagedFileError, UsageError
from recorder.lock import RunLock
from recorder.manifest import MANIFEST_FILE, Manifest
from recorder.namingrules import naming_rules, parse_naming_rules
from recorder.parameters import UnmappedParameterWarning, parameter_table
from recorder.placing import Place
from recorder.pruned import prune
from recorder.runformat import Run
from recorder.segments import list_segments
from recorder.table import FUSED, Parameter, Part
from recorder.usermap import UnmatchedRuleWarning, read_map
from recorder.verify import verify
from tests import cases
from tests.cases import TinyTransformer

pytestmark = pytest.mark.filterwarnings("ignore::recorder.parameters.UnmappedParameterWarning")

own_model: Any = importlib.import_module("examples.own_model")  # a module for users, not typed for us
Captured = pytest.CaptureFixture[str]
Say = Callable[[str], str]
OWN = own_model.MAP.read_text(encoding="utf-8")
KEYS = "[[rule]]\npattern = '{}'\ncomponent = \"key\"\n"


def few_steps(
    run: Path, steps: int = 2, *, start: int = 0, model: nn.Module | None = None, **watch_arguments: Any
) -> nn.Module:
    """Train the example's model for a few steps, from the run's own parameters where it goes on."""
    torch.manual_seed(0)
    task = own_model.workload()
    model = task.model() if model is None else model
    if start:
        model.load_state_dict(Run(run).parameters(start), strict=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with recorder.watch(model, optimizer, run=run, first_step=start, **watch_arguments) as rec:
        for step in range(start, start + steps):
            batch = task.batch(range(step, step + 4), split="train", epoch=1)
            rec.batch(range(step, step + 4), batch)
            loss, predictions = task.loss(model, batch)
            (loss / predictions).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("recorded") / "run"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnmappedParameterWarning)
        few_steps(run)
    return run


@pytest.fixture
def run(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / "run"))


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        (tmp_path / "own.toml").write_text(text, encoding="utf-8")
        return tmp_path / "own.toml"

    return write


def table(run: Path) -> dict[str, Parameter]:
    return {row.name: row for row in Manifest.read(run).parameters}


def place(row: Parameter) -> tuple[Any, ...]:
    return row.layer, row.component, row.unit_axis, row.heads


# --- Printing -------------------------------------------------------------------------------------------------------


def test_the_table_is_printed_in_lines_with_what_fell_to_other_last(run: Path, file: Any, capsys: Captured) -> None:
    text = OWN.partition("[[rule]]\npattern = 'symbols")[0]
    assert main(["map", str(run), "--map", str(file(text))]) == 0
    capsys.readouterr()
    assert main(["map", str(run)]) == 0
    said = capsys.readouterr()
    printed = said.out.splitlines()
    assert re.fullmatch(r"26 parameters, 18,016 entries; corrected \S+ by \S+own\.toml", printed[0])
    lines = [re.split(r" {2,}", line.strip()) for line in printed]
    qkv = "rows: query 4 heads of 8, key 4 heads of 8, value 4 heads of 8"
    assert ["trunk.{0-1}.mixing.qkv.weight", "decoder.0-1", "query+key+value", "(96, 32)", qkv] in lines
    assert ["trunk.{0-1}.mixing.merge.weight", "decoder.0-1", "out", "(32, 32)", "4 heads of 8 columns"] in lines
    assert ["decoder", "2 layers", "17,088", "94.8%"] in lines
    assert ["query", "2,112", "11.7%"] in lines
    assert "  symbols.weight = scores.weight" in printed
    other = printed.index("other, 928 entries that no rule places:")
    assert all(printed.index(line) < other for line in printed if line.startswith("  trunk"))
    assert [line.split()[0] for line in printed[other + 1 : other + 3]] == ["places", "symbols.weight"]
    skeleton = "\n".join(printed[other + 3 :])
    assert [rule.pattern.pattern for rule in parse_naming_rules(skeleton, "printed")] == [
        "places",
        r"symbols\.weight",
        r"scores\.weight",
    ]
    assert "2 parameters are in 'other'. To say what they are, save the rules above as a file" in said.err
    assert f"python -m recorder map {run} --map map.toml" in said.err


def test_the_printed_skeleton_corrected_by_hand_corrects_the_run(run: Path, file: Any, capsys: Captured) -> None:
    assert main(["map", str(run), "--skeleton"]) == 0
    text = capsys.readouterr().out
    by_hand = text.replace("pattern = 'places'\ncomponent = \"other\"", "pattern = 'places'\ncomponent = \"position\"")
    assert by_hand != text
    assert main(["map", str(run), "--map", str(file(by_hand))]) == 0
    assert table(run)["places"].component == "position"
    assert place(table(run)["trunk.1.widen.weight"]) == ("trunk.1", "other", 0, 0)


def test_every_parameter_has_a_line_of_its_own_if_asked_for(run: Path, capsys: Captured) -> None:
    assert main(["map", str(run), "--map", str(own_model.MAP), "--full", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    names = [line.split()[0] for line in printed.partition("tied:")[0].splitlines()[2:] if line]
    assert names == [row.name for row in Manifest.read(run).parameters]


def test_untrained_and_left_out_parameters_stand_apart(tmp_path: Path, capsys: Captured) -> None:
    cases.train(tmp_path / "run", steps=1, frozen="decoder.layers.0.fc1")
    assert main(["map", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert re.search(
        r"\nuntrained:\n  decoder\.layers\.0\.fc1\.weight +decoder\.0 +W1 .*\n  decoder\.layers\.0\.fc1\.bias", printed
    )
    assert "other" not in printed
    assert "[[rule]]" not in printed


def test_a_machine_gets_rows_totals_and_changes(run: Path, capsys: Captured) -> None:
    assert main(["map", str(run), "--map", str(own_model.MAP), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [Parameter.from_dict(row) for row in facts["parameters"]] == list(Manifest.read(run).parameters)
    assert (facts["other"], len(facts["changed"])) == ([], 26)
    assert facts["components"]["embedding"] == facts["components"]["output"] == 736
    assert facts["stacks"] == {"model": {"layers": 0, "entries": 1664}, "decoder": {"layers": 2, "entries": 17088}}
    assert set(facts["correction"]) == {"source", "text", "created", "recorded"}


# --- Correcting -----------------------------------------------------------------------------------------------------


def test_a_corrected_run_has_the_table_of_a_training_with_the_map(run: Path, tmp_path: Path, capsys: Captured) -> None:
    few_steps(tmp_path / "mapped", map=own_model.MAP)
    before = Manifest.read(run)
    assert main(["map", str(run), "--map", str(own_model.MAP)]) == 0
    now, wanted = Manifest.read(run), Manifest.read(tmp_path / "mapped")
    assert now.parameters == wanted.parameters
    assert now.correction is not None
    assert now.correction.text == OWN
    assert wanted.correction is None
    assert (wanted.provenance["map"]["source"], wanted.provenance["map"]["text"]) == (str(own_model.MAP), OWN)
    # Nothing else has changed, and no segment.
    for field in ("run_id", "attempts", "optimizer", "recipe", "provenance"):
        assert getattr(now, field) == getattr(before, field)
    assert verify(run).damages == ()
    out = capsys.readouterr().out
    assert re.search(r"changed:\n +places +other -> position\n", out)
    assert re.search(r"trunk\.\{0-1\}\.mixing\.qkv\.weight +other -> decoder query\+key\+value, 4\+4\+4 heads\n", out)


def test_the_recorded_table_can_be_had_back(run: Path, file: Any, capsys: Captured) -> None:
    before = (run / MANIFEST_FILE).read_bytes()
    assert main(["map", str(run), "--map", str(own_model.MAP)]) == 0
    assert (run / MANIFEST_FILE).read_bytes() != before
    # Another file replaces the correction: what only the first one said is as it was recorded.
    assert main(["map", str(run), "--map", str(file(KEYS.format("places")))]) == 0
    assert table(run)["places"].component == "key"
    assert table(run)["symbols.weight"].component == "other"
    assert "25 parameters are in 'other'. To say what they are, save the rules above" in capsys.readouterr().err
    assert main(["map", str(run), "--as-recorded"]) == 0
    assert (run / MANIFEST_FILE).read_bytes() == before
    capsys.readouterr()
    assert main(["map", str(run), "--as-recorded"]) == 0
    assert "nothing changes" in capsys.readouterr().err


def test_a_dry_run_keeps_nothing_and_needs_no_lock(run: Path, capsys: Captured) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    lock = RunLock(run)
    try:
        assert main(["map", str(run), "--map", str(own_model.MAP), "--dry-run"]) == 0
    finally:
        lock.release()
    assert "26 of 26 parameters would move; nothing is kept (--dry-run)" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_that_is_being_recorded_is_not_corrected(run: Path, capsys: Captured) -> None:
    before = (run / MANIFEST_FILE).read_bytes()
    lock = RunLock(run)
    try:
        assert main(["map", str(run), "--map", str(own_model.MAP)]) == 2
        said = capsys.readouterr().err
        assert f"{run} cannot be corrected: it is being recorded into" in said
        assert "--record-map" in said
        assert main(["map", str(run)]) == 0  # looking is free
    finally:
        lock.release()
    assert (run / MANIFEST_FILE).read_bytes() == before


def test_a_correction_is_sealed_with_the_manifest(run: Path) -> None:
    assert main(["map", str(run), "--map", str(own_model.MAP)]) == 0
    manifest = run / MANIFEST_FILE
    manifest.write_text(manifest.read_text().replace("examples/own_model.py", "examples/own_model.px"))
    with pytest.raises(DamagedFileError, match="fails its own CRC-32"):
        Manifest.read(run)


def test_a_changed_unit_axis_and_what_was_pruned_are_told(run: Path, file: Any, capsys: Captured) -> None:
    text = "[[rule]]\npattern = 'places'\ncomponent = \"position\"\nunit_axis = 1\n"
    assert main(["map", str(run), "--map", str(file(text)), "--dry-run"]) == 0
    assert f"first 'places': python -m replay --run {run} computes all again\n" in capsys.readouterr().err
    prune(run, list_segments(run)[:1])
    assert main(["map", str(run), "--map", str(file(text))]) == 0
    assert "computes all again; the steps that were pruned can not\n" in capsys.readouterr().err
    assert main(["map", str(run), "--map", str(file(KEYS.format("symbols.weight")))]) == 0


# --- The package's rules on an older run ----------------------------------------------------------------------------


def older(run: Path, *, without_places: bool = False) -> tuple[Parameter, ...]:
    """Make of a run of the tiny transformer one from when tables knew no uses."""
    cases.train(run, steps=1)
    manifest = Manifest.read(run)
    rows = [dataclasses.replace(row, uses=()) for row in manifest.parameters]
    if without_places:
        rows = [dataclasses.replace(row, **Place().fields()) for row in rows]
    dataclasses.replace(manifest, parameters=tuple(rows)).write(run)
    return manifest.parameters


def test_an_older_run_gets_the_uses_of_its_tied_weights(tmp_path: Path, capsys: Captured) -> None:
    now = older(tmp_path / "run")
    assert now[0].uses
    assert main(["map", str(tmp_path / "run"), "--refresh"]) == 0
    assert Manifest.read(tmp_path / "run").parameters == now
    said = capsys.readouterr().err
    assert "names stay as they were recorded, for their rules ask for the live model; the first: " in said
    assert "the units or the uses of 1 of them change, first 'decoder.embed_tokens.weight'" in said


def test_what_asks_for_the_live_model_stays_as_it_was(tmp_path: Path) -> None:
    now = {row.name: row for row in older(tmp_path / "run", without_places=True)}
    assert main(["map", str(tmp_path / "run"), "--refresh"]) == 0
    found = table(tmp_path / "run")
    attention = {name for name in now if ".self_attn." in name}
    assert {name for name, row in found.items() if row != now[name]} == attention
    assert {found[name].component for name in attention} == {"other"}


def test_a_users_rules_come_before_those_of_the_package(tmp_path: Path, file: Any) -> None:
    older(tmp_path / "run", without_places=True)
    text = KEYS.format(r"decoder\.layers\.\d+\.fc1\.weight")
    assert main(["map", str(tmp_path / "run"), "--refresh", "--map", str(file(text))]) == 0
    found = table(tmp_path / "run")
    assert found["decoder.layers.0.fc1.weight"].component == "key"
    assert found["decoder.layers.0.fc1.bias"].component == "W1"


TIED = [
    ({}, {"a": "embedding", "c": "output"}),
    ({"b": "position"}, {"a": "position", "c": "output"}),  # a and b are one use: what is said of one holds for both
    ({"a": "position", "b": "norm"}, {"a": "position", "b": "norm", "c": "output"}),
    ({"c": "embedding"}, {"a": "embedding"}),
    ({"a": "output"}, {"a": "output"}),
]


@pytest.mark.parametrize(("said", "uses"), TIED)
def test_what_is_said_of_one_name_of_a_tied_tensor_holds_for_its_use(
    said: dict[str, str], uses: dict[str, str]
) -> None:
    first = Parameter(name="a", aliases=("b",), shape=(2,), dtype="float32", component="embedding")
    second = Parameter(name="c", shape=(2,), dtype="float32", component="output", tied_to="a")
    row = dataclasses.replace(first, aliases=("b", "c"), uses=(first, second))
    text = "".join(f"[[rule]]\npattern = '{name}'\ncomponent = '{component}'\n" for name, component in said.items())
    (found,) = correct([row], parse_naming_rules(text, "own")).parameters
    assert {use.name: use.component for use in found.uses or (found,)} == uses
    assert (found.name, found.aliases) == ("a", ("b", "c"))
    assert {name for use in found.uses or (found,) for name in (use.name, *use.aliases)} == {"a", "b", "c"}


# --- Restarted trainings --------------------------------------------------------------------------------------------


def test_a_restarted_training_keeps_the_corrected_table(run: Path, file: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert main(["map", str(run), "--map", str(own_model.MAP)]) == 0
    corrected = Manifest.read(run)
    with caplog.at_level("INFO"):
        few_steps(run, start=2)
    now = Manifest.read(run)
    assert (now.parameters, now.correction) == (corrected.parameters, corrected.correction)
    assert f"which parameter is which stays as the run has it, by {own_model.MAP}" in caplog.text
    # Not even a map given to the training undoes it.
    few_steps(run, start=4, map=file(KEYS.format("places")))
    assert Manifest.read(run).parameters == corrected.parameters
    assert Run(run).consecutive == [(0, 6)]
    assert main(["map", str(run), "--as-recorded"]) == 0
    assert {row.component for row in Manifest.read(run).parameters} == {"other"}


def test_a_map_given_once_holds_for_the_restart_and_another_one_replaces_it(tmp_path: Path, file: Any) -> None:
    run = tmp_path / "run"
    few_steps(run, map=own_model.MAP)
    first = Manifest.read(run)
    few_steps(run, start=2)
    assert Manifest.read(run).parameters == first.parameters
    few_steps(run, start=4, map=file(KEYS.format("places")))
    assert table(run)["places"].component == "key"
    assert Manifest.read(run).provenance["map"]["text"] == KEYS.format("places")


# --- Functions ------------------------------------------------------------------------------------------------------


def own_place(name: str, parameter: nn.Parameter, model: nn.Module) -> Any:
    """Places as dictionaries, one as a Place, and None for the rest."""
    assert isinstance(model, own_model.Model)
    layer = re.match(r"trunk\.(\d+)\.", name)
    where = {"stack": "decoder", "depth": int(layer[1])} if layer else {}
    if ".qkv." in name:
        parts = tuple(Part(component=part, units=32, heads=own_model.HEADS) for part in ("query", "key", "value"))
        return Place(component=FUSED, fused=parts, **where)  # type: ignore[arg-type]
    if name.endswith("merge.weight"):
        return {"component": "out", "heads": own_model.HEADS, "unit_axis": 1, **where}
    if name.endswith("merge.bias"):
        return Place(component="out", **where)  # type: ignore[arg-type]
    columns = 1 if parameter.dim() == 2 else 0
    components = {"widen": ("W1", 0), "narrow": ("W2", columns), "before": ("norm", 0), "between": ("norm", 0)}
    outside = {"places": ("position", 0), "symbols": ("embedding", 0), "scores": ("output", 0)}
    word = name.split(".")[2 if layer else 0]
    component, axis = (components | outside)[word]
    return {"component": component, "unit_axis": axis, "heads": None, **where}


def test_a_function_maps_as_the_file_does(tmp_path: Path, run: Path) -> None:
    few_steps(tmp_path / "function", map=own_place)
    assert main(["map", str(run), "--map", str(own_model.MAP)]) == 0
    found = Manifest.read(tmp_path / "function")
    assert found.parameters == Manifest.read(run).parameters
    assert found.provenance["map"]["source"].endswith("test_map.own_place")


def test_a_function_leaves_what_it_does_not_know_to_the_package() -> None:
    from recorder.usermap import table_of

    model = TinyTransformer()
    given = read_map(lambda name, parameter, model: {"component": "gate"} if name.endswith("fc1.weight") else None)
    found = {row.name: row for row in table_of(model, given)}
    assert found["decoder.layers.1.fc1.weight"].component == "gate"
    rest = {row.name: row for row in parameter_table(model) if not row.name.endswith("fc1.weight")}
    assert {name: found[name] for name in rest} == rest


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("key", "expected a mapping such as {'component': 'key', 'heads': 8}, a Place or None, found 'key'"),
        ({"component": "keys"}, "component 'keys' is none of key, "),
        ({"component": "key", "head": 2}, "field 'head' is none of classes, component, "),
        ({"component": "key", "heads": 5}, "6 units do not divide into 5 heads"),
        ({"component": "key", "heads": "num_heads"}, "its pattern has no group 'attention'"),
        (
            {"parts": [{"component": "key", "units": 4}, {"component": "value", "units": 1}]},
            "its parts have 4 + 1 units, but it has 6",
        ),
        ({"heads": 2}, "it has no field 'component' (or 'parts'"),
        ({"parts": "key"}, "parts = 'key' is of the wrong type: expected an array of tables"),
    ],
)
def test_what_is_wrong_with_a_functions_answer_is_told_with_the_parameters_name(
    place: Any, problem: str, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UsageError, match=rf"^the function \S+, for parameter '0\.weight'.*{re.escape(problem)}"):
        recorder.watch(model, optimizer, run=tmp_path / "run", map=lambda name, parameter, model: place)
    assert not (tmp_path / "run").exists()


def test_rules_may_be_given_as_they_are(tmp_path: Path) -> None:
    few_steps(tmp_path / "run", map=parse_naming_rules(OWN, "own"))
    assert table(tmp_path / "run")["places"].component == "position"
    with pytest.raises(UsageError, match="expected the path of a TOML file, naming rules or a function, found \\[3\\]"):
        read_map([3])  # type: ignore[list-item]


# --- What is wrong with a file --------------------------------------------------------------------------------------

ATTENTION = (
    "[[rule]]\npattern = '(?P<attention>trunk\\.\\d+\\.mixing)\\.merge\\.bias'\ncomponent = 'out'\nheads = 'n'\n"
)
WRONG = [
    ("", "holds no rule: expected tables [[rule]] with pattern and component"),
    ("[[rule]", "is no TOML: "),
    ("[[rules]]\n", "expected a table [fragments] and tables [[rule]], found ['rules']"),
    (
        KEYS.format("places") + "[[rule]]\ncomponent = 'key'\n",
        "naming rule 2 is not understood: it has no field 'pattern'",
    ),
    ("[[rule]]\npattern = 'places'\n", "naming rule 1 is not understood: it has no field 'component' (or 'parts'"),
    (
        "[[rule]]\npattern = '('\ncomponent = 'key'",
        "naming rule 1 is not understood: missing ), unterminated subpattern",
    ),
    (
        "[[rule]]\npattern = 'places'\ncomponent = 'positon'",
        "naming rule 1 is not understood: component 'positon' is none of key, query",
    ),
    ("[[rule]]\npattern = 'places'\ncomponent = 'positon'", "other; did you mean 'position'?"),
    (
        "[[rule]]\npattern = 'places'\ncomponent = 'key'\nhaeds = 2",
        "field 'haeds' is none of classes, component, depth",
    ),
    ("[[rule]]\npattern = 'places'\ncomponent = 'key'\nhaeds = 2", "did you mean 'heads'?"),
    (
        "[[rule]]\npattern = 'places'\ncomponent = 'key'\nunit_axis = '1'",
        "unit_axis = '1' is of the wrong type: expected an integer",
    ),
    ("[[rule]]\npattern = 'places'\ncomponent = 'key'\nunit_axis = true", "unit_axis = True is of the wrong type"),
    (
        "[[rule]]\npattern = 'places'\ncomponent = 'key'\nstack = 'a'\ndepth = -1",
        "expected a stack and a depth of 0 or more, ",
    ),
    (
        "[[rule]]\npattern = 'places'\ncomponent = 'key'\ndepth = 0",
        "expected a stack and a depth of 0 or more, from the pattern or the rule, or neither",
    ),
    (
        "[[rule]]\npattern = 'places'\ncomponent = 'key'\nunit_axis = 2",
        "naming rule 1: parameter 'places': unit axis 2 is not an axis of shape (6, 32)",
    ),
    (
        "[[rule]]\npattern = 'places'\ncomponent = 'key'\nheads = 4",
        "naming rule 1: parameter 'places': 6 units do not divide into 4 heads",
    ),
    (
        ATTENTION,
        "for parameter 'trunk.0.mixing.merge.bias': 'n' is an attribute; the live model is not here, only names and ",
    ),
    (
        ATTENTION,
        "names and shapes: give numbers, such as heads = 8",
    ),
    (
        "[[rule]]\npattern = '(?P<it>trunk\\..*)\\.bias'\ncomponent = 'out'\nclasses = {it = 'Linear'}\n",
        "naming rule 1, for parameter 'trunk.0.before.bias': asks for classes of modules; the live model is not here",
    ),
]


@pytest.mark.parametrize(("text", "problem"), WRONG)
def test_what_is_wrong_with_a_file_is_one_line_with_file_rule_and_field(
    text: str, problem: str, run: Path, file: Any, capsys: Captured
) -> None:
    before = (run / MANIFEST_FILE).read_bytes()
    assert main(["map", str(run), "--map", str(file(text))]) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("python -m recorder: error: ")
    assert str(file(text)) in line
    assert problem in line
    assert said.out == ""
    assert (run / MANIFEST_FILE).read_bytes() == before


def test_a_file_that_is_not_there_and_flags_that_exclude_each_other(
    run: Path, tmp_path: Path, capsys: Captured
) -> None:
    assert main(["map", str(run), "--map", str(tmp_path / "none.toml")]) == 2
    assert f"the map {tmp_path / 'none.toml'} cannot be read: No such file or directory" in capsys.readouterr().err
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    assert main(["map", str(run), "--map", str(tmp_path / "binary.toml")]) == 2
    assert "it is no UTF-8 text" in capsys.readouterr().err
    assert main(["map", str(run), "--map", str(own_model.MAP), "--as-recorded"]) == 2
    assert "--as-recorded takes corrections back; give it without --map and --refresh" in capsys.readouterr().err
    assert main(["map", str(tmp_path / "nothing")]) == 2
    assert "no such run folder" in capsys.readouterr().err


def test_the_same_mistakes_are_told_before_a_training_begins(tmp_path: Path, file: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for text, problem in [
        (
            "[[rule]]\npattern = '0.weight'\ncomponent = 'keys'",
            r"own\.toml: naming rule 1 is not understood: component",
        ),
        (
            "[[rule]]\npattern = '0.weight'\ncomponent = 'key'\nheads = 4",
            "naming rule 1: parameter '0.weight': 6 units",
        ),
        (
            "[[rule]]\npattern = '(?P<attention>0).weight'\ncomponent = 'key'\nheads = 'num_heads'",
            r"module '0' \(Linear\) has no number 'num_heads'",
        ),
    ]:
        with pytest.raises(UsageError, match=problem):
            recorder.watch(model, optimizer, run=tmp_path / "run", map=file(text))
    assert not (tmp_path / "run").exists()


def test_a_rule_that_decides_nothing_is_named(run: Path, file: Any, capsys: Captured) -> None:
    text = KEYS.format("place") + KEYS.format("places") + KEYS.format("plac.s")
    assert main(["map", str(run), "--map", str(file(text)), "--dry-run"]) == 0
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    path = file(text)
    assert warned == [
        f"warning: {path}: naming rule 1: the pattern 'place' matches no parameter; did you mean 'places'?",
        f"warning: {path}: naming rule 3 decides no parameter: {path}: naming rule 2 matches 'places' before it",
    ]


def test_a_rule_that_decides_nothing_is_named_to_a_training_too(tmp_path: Path, file: Any) -> None:
    with pytest.warns(
        UnmatchedRuleWarning, match=r"naming rule 1: the pattern 'qqq' matches no parameter; there is, for"
    ):
        few_steps(tmp_path / "run", map=file(KEYS.format("qqq")))


def test_the_package_knows_no_parameter_of_the_example() -> None:
    """Else the tests above would show nothing."""
    names = [name for name, _ in own_model.Model().named_parameters(remove_duplicate=False)]
    assert not [name for name in names for rule in naming_rules() if rule.pattern.fullmatch(name)]
