"""An example done as its first lines say: trained in a process of its own, then replayed, reduced and drawn."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import reduce.__main__
import replay.__main__
import viz.__main__
from reduce import open_cube

ROOT = Path(__file__).parents[2]


def go_the_whole_way(
    example: str, shown_run: str, run: Path, captured: pytest.CaptureFixture[str], *, steps: int
) -> xr.Dataset:
    """Run the commands about `shown_run` in an example's docstring on `run`, and check that its books balance.

    The three packages do their part in this process: their command lines have tests of their own.
    """
    text = (ROOT / "examples" / example).read_text(encoding="utf-8")
    commands = [line.split() for line in re.findall(rf"^    python (.*{shown_run}\b.*)$", text, re.MULTILINE)]
    script, *others = [[word.replace(shown_run, str(run)) for word in command] for command in commands]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    trained = subprocess.run(
        [sys.executable, *script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert trained.returncode == 0, trained.stderr
    assert f"recorded {steps} steps into {run}" in trained.stderr
    mains = {"replay": replay.__main__.main, "reduce": reduce.__main__.main, "viz": viz.__main__.main}
    assert [command[:2] for command in others] == [["-m", name] for name in mains]
    for _, name, *arguments in others:
        extra = {"replay": ["--workers", "1", "--device", "cpu"], "viz": ["--out", str(run / "figures")]}.get(name, [])
        assert mains[name]([*arguments, *extra]) == 0
        told = captured.readouterr().err
        if name == "replay":
            assert re.search(r"self-check: steps? [0-9, ]+ done again: losses and parameters are the recorded ", told)
            assert "losses not compared" not in told
            assert "parameters not compared" not in told
    assert list((run / "figures").glob("*.png"))
    cube = open_cube(run / "lca.nc")
    assert list(cube["step"].values) == list(range(steps))
    assert list(cube["data"].values) == ["batch", "probe"]
    assert (cube["status"] == 0).all()
    change = cube["loss_end"] - cube["loss_start"]
    residual = cube["lca"].sum(["layer", "component"]) - change
    assert (np.abs(residual) <= cube["tolerance"] + 1e-12).all()
    assert (cube["tolerance"] <= 1e-3 * np.abs(change) + 2e-5).all()
    return cube
