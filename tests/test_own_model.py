"""The example of docs/maps.md, command by command as its first lines say, in this process."""

from __future__ import annotations

import json
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from recorder.__main__ import main as recorder_main
from recorder.manifest import Manifest
from recorder.namingrules import parse_naming_rules
from recorder.parameters import UnmappedParameterWarning
from reduce import open_cube
from reduce.__main__ import main as reduce_main
from replay.__main__ import main as replay_main
from viz.__main__ import main as viz_main

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "own_model.py"
COMMANDS = {"recorder": recorder_main, "replay": replay_main, "reduce": reduce_main, "viz": viz_main}


def commands(runs: Path) -> list[list[str]]:
    lines = [
        line.strip() for line in EXAMPLE.read_text(encoding="utf-8").splitlines() if line.startswith("    python ")
    ]
    return [line.replace("runs/", f"{runs}/").replace("examples/", f"{ROOT}/examples/").split()[1:] for line in lines]


def do(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if arguments[0] == "-m":
        # One thread for the whole process is what replay leaves behind; the test that comes next finds its own.
        extra = (
            ["--workers", "1", "--loss-data", "batch", "--loss-data", "probe:64"] if arguments[1] == "replay" else []
        )
        assert COMMANDS[arguments[1]]([*arguments[2:], *extra]) == 0
    else:
        monkeypatch.setattr(sys, "argv", arguments)
        runpy.run_path(arguments[0], run_name="__main__")


@pytest.mark.filterwarnings("ignore::recorder.parameters.UnmappedParameterWarning")
def test_the_example_goes_the_whole_way_and_is_put_right_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    threads = torch.get_num_threads()
    found = commands(tmp_path)
    assert len(found) == 8
    try:
        for arguments in found:
            do(arguments, monkeypatch)
    finally:
        torch.set_num_threads(threads)
    cube = open_cube(tmp_path / "own" / "lca.nc")
    assert cube.sizes["step"] == 30
    assert (cube["status"] == 0).all()
    filled = set(cube["component"].values[(cube["n_parameters"] > 0).any("layer").values])
    assert filled == {"key", "query", "value", "out", "W1", "W2", "embedding", "position", "norm", "output"}
    change = cube["loss_end"] - cube["loss_start"]
    assert abs(float((cube["lca"].sum(("layer", "component")) - change).sum())) <= 1e-3 * float(abs(change).sum())
    heads = cube["lca_head"].sel(attention_component="key", layer="decoder.1")
    assert heads.sizes["head"] == 4
    assert (heads != 0).all()
    given, corrected = (Manifest.read(tmp_path / run) for run in ("own", "unsaid"))
    assert given.parameters == corrected.parameters
    capsys.readouterr()
    assert recorder_main(["info", str(tmp_path / "unsaid"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["map"].endswith(f"by {ROOT}/examples/own_model.toml")


def test_the_excerpt_in_the_documentation_says_what_the_examples_map_says() -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "maps.md").read_text(encoding="utf-8"), re.DOTALL)
    whole = EXAMPLE.with_suffix(".toml").read_text(encoding="utf-8")
    excerpt = parse_naming_rules(block, "own")
    assert excerpt == parse_naming_rules(whole, "own")[: len(excerpt)]
    assert len(excerpt) == 2


def test_the_training_without_the_map_warns_of_what_nobody_said(tmp_path: Path) -> None:
    module = runpy.run_path(str(EXAMPLE))
    with pytest.warns(UnmappedParameterWarning, match="26 parameters match no naming rule and go to component 'other'"):
        module["train"](os.fspath(tmp_path / "unsaid"), with_map=False)
