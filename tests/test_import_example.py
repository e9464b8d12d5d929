"""The example of checkpoints that exist already, command by command as it stands at its head."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from recorder.__main__ import main as recorder_main
from reduce import open_cube
from reduce.__main__ import main as reduce_main
from replay.__main__ import main as replay_main
from replay.work import replayer
from viz.__main__ import main as viz_main

ROOT = Path(__file__).parents[1]
MAINS: dict[str, Callable[[list[str]], int]] = {
    "recorder": recorder_main,
    "replay": lambda arguments: replay_main([*arguments, "--workers", "1"]),
    "reduce": reduce_main,
    "viz": viz_main,
}


def test_the_example_goes_the_whole_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = ROOT / "examples" / "import_checkpoints.py"
    lines = example.read_text(encoding="utf-8").splitlines()
    commands = [line.split()[1:] for line in lines if line.startswith("    python ")]
    assert len(commands) == 5
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    try:
        for command in commands:
            if command[0] == "-m":
                assert MAINS[command[1]](command[2:]) == 0
                continue
            monkeypatch.setattr(sys, "argv", [str(ROOT / command[0]), *command[1:]])
            runpy.run_path(str(ROOT / command[0]), run_name="__main__")
    finally:
        replayer.cache_clear()
    printed = capsys.readouterr().out
    assert "chord" in printed
    assert (tmp_path / "runs" / "imported" / "figures" / "figure1-probe.png").is_file()
    with open_cube(tmp_path / "runs" / "imported" / "lca.nc") as cube:
        assert cube["step"].values.tolist() == [0, 20, 40]
        assert cube["step_end"].values.tolist() == [20, 40, 60]
        assert (cube["status"] == 0).all()
        change = (cube["loss_end"] - cube["loss_start"]).values
        residual = cube["lca"].sum(["layer", "component"]).values - change
        assert (np.abs(residual) <= cube["tolerance"].values + 1e-12).all()
        assert (change < 0).all()
        # Attention and feed-forward have their components, and nothing is left over.
        filled = cube["n_parameters"].sum("layer")
        assert {str(name) for name in cube["component"].values[filled.values > 0]} == {
            *("key", "query", "value", "out", "W1", "W2", "embedding", "position", "norm", "output")
        }
