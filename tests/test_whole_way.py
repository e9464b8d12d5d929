"""The whole way, as a newcomer goes it: the demo on a run of a few steps, and the plain PyTorch example."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from recorder.manifest import Manifest
from reduce import open_cube

# One fixture goes the whole way three times over, on a machine that may be busy.
pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).parents[1]
UPDATES = 10
SETTINGS = ("--updates", str(UPDATES), "--layers", "4", "--pairs", "400", "--probe", "16")
RUNS = ("translation", "causal-lm", "masked-lm")


def _python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("demo") / "out"
    finished = _python("-m", "demo", "--out", str(out), *SETTINGS)
    assert finished.returncode == 0, finished.stderr
    return out, finished.stdout


@pytest.mark.fairseq
@pytest.mark.cluster
def test_the_demo_draws_the_figures_and_prints_the_table(demo: tuple[Path, str]) -> None:
    out, printed = demo
    figures = {file.name for file in (out / "figures").iterdir()}
    assert {"figure1-batch.png", "figure1-probe.png", "balance.png", "table.csv", "table.md"} <= figures
    for word in ("key", "cross_value", "W2", "embedding", "total", "measured ΔL", "worst |residual|"):
        assert re.search(rf"^{re.escape(word)}\b|^{re.escape(word)}", printed, re.MULTILINE), word
    assert str(out / "figures" / "balance.png") in printed


@pytest.mark.fairseq
@pytest.mark.cluster
@pytest.mark.parametrize("name", RUNS)
def test_the_books_of_the_demo_balance_at_every_step(demo: tuple[Path, str], name: str) -> None:
    cube = open_cube(demo[0] / "runs" / name / "lca.nc")
    assert cube.sizes["step"] == UPDATES
    assert list(cube["data"].values) == ["batch", "probe"]
    change = (cube["loss_end"] - cube["loss_start"]).values
    residual = cube["lca"].sum(["layer", "component"]).values - change
    assert (np.abs(residual) <= cube["tolerance"].values + 1e-12).all()
    assert (cube["tolerance"].values <= 1e-3 * np.abs(change) + 2e-5).all()
    np.testing.assert_allclose(residual, cube["residual"].values, atol=1e-12)
    # The first update of a warm-up has learning rate 0: nothing moves, and every book is exactly empty.
    assert (change[:, 0] == 0).all()
    assert (change[:, 1:] < 0).all()


@pytest.mark.fairseq
@pytest.mark.cluster
@pytest.mark.parametrize("name", RUNS)
def test_every_parameter_of_the_demo_is_in_a_cell_of_its_own_component(demo: tuple[Path, str], name: str) -> None:
    run = demo[0] / "runs" / name
    manifest, cube = Manifest.read(run), open_cube(run / "lca.nc")
    entries = cube["n_parameters"] - cube["n_tied"]
    assert int(entries.sum()) == sum(parameter.size for parameter in manifest.trained)
    tied = sum(parameter.size for parameter in manifest.trained if parameter.uses)
    assert tied
    assert int(cube["n_tied"].sum()) == tied == int(cube["n_tied"].sel(component="output").sum())
    assert int(cube["n_parameters"].sel(component="other").sum()) == 0
    assert cube.sizes["head"] == 8
    # What fairseq's encoder layers hold in vain is neither recorded with the steps nor counted.
    dead = {parameter.name for parameter in manifest.parameters if not parameter.trained}
    assert any(name.endswith("in_proj_weight") for name in dead) == (name != "causal-lm")


@pytest.mark.fairseq
@pytest.mark.cluster
def test_the_notebook_cells_of_the_readme_run_on_the_demo(
    demo: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("## A first look at the cube")[1].split("\n## ")[0]
    cells = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(cells) == 3
    # The short demo has four layers, two of them in the decoder.
    code = "\n".join(cells).replace("decoder.5", "decoder.1").replace("demo-out", str(demo[0]))
    monkeypatch.setenv("MPLBACKEND", "agg")
    names: dict[str, xr.DataArray] = {}
    exec(code, names)
    assert float(names["change"].sum()) < 0
    assert names["heads"].sizes == {"step": UPDATES, "head": 8}


@pytest.mark.fairseq
@pytest.mark.cluster
def test_batches_need_no_data_and_a_probe_finds_moved_data_by_its_flag(demo: tuple[Path, str]) -> None:
    out = demo[0]
    run, moved = str(out / "copy"), out / "moved"
    shutil.copytree(out / "runs" / "masked-lm", run)
    replay = ("-m", "replay", "--run", run, "--steps", "0:2", "--chunk", "2", "--workers", "1")
    (out / "prepared").rename(moved)
    try:
        assert _python(*replay, "--loss-data", "batch").returncode == 0
        lost = _python(*replay, "--loss-data", "probe:8")
        assert lost.returncode == 2
        assert len(lost.stderr.splitlines()) == 1
        assert "pass --data FOLDER" in lost.stderr
        wrong = _python(*replay, "--loss-data", "probe:8", "--data", str(moved / "translation"))
        assert wrong.returncode == 2
        assert "does not hold the split 'train'" in wrong.stderr
        found = _python(*replay, "--loss-data", "probe:8", "--data", str(moved / "language-model"))
        assert found.returncode == 0, found.stderr
    finally:
        moved.rename(out / "prepared")


@pytest.mark.fairseq
@pytest.mark.cluster
def test_the_demo_done_again_does_nothing_again(demo: tuple[Path, str]) -> None:
    out = demo[0]
    before = {file: file.stat().st_mtime_ns for file in (out / "runs").rglob("*.safetensors")}
    assert _python("-m", "demo", "--out", str(out), *SETTINGS).returncode == 0
    assert {file: file.stat().st_mtime_ns for file in (out / "runs").rglob("*.safetensors")} == before


def test_the_plain_pytorch_example_goes_the_whole_way(tmp_path: Path) -> None:
    run = tmp_path / "plain"
    example = (ROOT / "examples" / "plain_pytorch.py").read_text(encoding="utf-8")
    commands = [line.strip() for line in example.splitlines() if line.startswith("    python ")]
    assert len(commands) == 4
    for command in commands:
        _, *arguments = command.replace("runs/plain", str(run)).split()
        extra = ["--workers", "1"] if "replay" in arguments else []
        finished = _python(*arguments, *extra)
        assert finished.returncode == 0, finished.stderr
        assert "Traceback" not in finished.stderr
        if arguments[0].endswith("plain_pytorch.py"):
            told = finished.stderr.splitlines()
            assert told[0].startswith(f"lossledger: recording all steps from 0 into {run}: a step has ")
            assert told[-1].startswith(f"lossledger: recorded 40 steps into {run}: ")
    cube = open_cube(run / "lca.nc")
    assert cube.sizes["step"] == 40
    assert (cube["status"] == 0).all()
    assert float((cube["loss_end"] - cube["loss_start"]).sel(data="probe").sum()) < 0
