from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from recorder import commandline
from reduce import cube
from reduce.__main__ import main
from replay.shards import Parameter, Shard, ShardFolder, Status

Build = Callable[..., ShardFolder]
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def run(tmp_path: Path, build: Build, parameters: list[Parameter]) -> Path:
    build(tmp_path / "run", parameters, [(0, 4), (4, 8)])
    return tmp_path / "run"


def test_the_path_alone_goes_to_standard_output_and_the_summary_to_standard_error(
    run: Path, build: Build, parameters: list[Parameter], capsys: Captured
) -> None:
    def one_not_finite(shard: Shard) -> Shard:
        status = shard.per_step["status"].copy()
        status[0] = Status.NOT_FINITE
        per_unit = {name: {key: units.copy() for key, units in of.items()} for name, of in shard.per_unit.items()}
        per_unit["sum"]["scale"][0] = np.nan
        residual = shard.per_step["residual"].copy()
        residual[1] = -0.125
        residual[0] = np.nan
        return dataclasses.replace(
            shard, per_step={**shard.per_step, "status": status, "residual": residual}, per_unit=per_unit
        )

    build(run, parameters, [(2, 6)], loss_data="probe", change=one_not_finite)
    assert main(["--run", str(run)]) == commandline.DONE
    captured = capsys.readouterr()
    assert captured.out == f"{run / 'lca.nc'}\n"
    lines = captured.err.splitlines()
    assert lines[0] == "probe: not replayed: steps 0-1, 6-7; NaN there, with status missing"
    with cube.open_cube(run / "lca.nc") as ds:
        batch, probe = ds.sel(data="batch"), ds.sel(data="probe", step=[3, 4, 5])
        allocated, change = batch.lca.sum().item(), (batch.loss_end - batch.loss_start).sum().item()
        assert f"Σ LCA {allocated:+.6g} nat, Σ ΔL {change:+.6g} nat, worst |residual|" in lines[1]
        allocated, change = probe.lca.sum().item(), (probe.loss_end - probe.loss_start).sum().item()
        assert lines[2] == (
            f"probe: 4 steps, Σ LCA {allocated:+.6g} nat, Σ ΔL {change:+.6g} nat, "
            "worst |residual| 1.25e-01 nat at step 3; "
            "1 converged, 2 tolerance_not_met, 1 not_finite, 4 missing"
        )
        assert "python -m reduce --run" in ds.attrs["history"]
    assert lines[1].startswith("batch: 8 steps, ")
    assert lines[1].endswith("; 4 converged, 4 tolerance_not_met")
    assert len(lines) == 3


def test_an_old_cube_is_replaced_whole(run: Path, build: Build, parameters: list[Parameter]) -> None:
    assert main(["--run", str(run)]) == commandline.DONE
    build(run, parameters, [(8, 9)])
    assert main(["--run", str(run)]) == commandline.DONE
    with cube.open_cube(run / "lca.nc") as dataset:
        assert dataset.sizes["step"] == 9


@pytest.mark.parametrize("kind", ["text", "netcdf"])
def test_a_foreign_file_is_not_overwritten_unasked(run: Path, kind: str, capsys: Captured) -> None:
    out = run / "mine.nc"
    if kind == "text":
        out.write_text("my thesis")
    else:
        xr.Dataset({"lca": ("step", [1.0])}).to_netcdf(out)
    before = out.read_bytes()
    assert main(["--run", str(run), "--out", str(out)]) == commandline.WRONG_USAGE
    captured = capsys.readouterr()
    assert captured.err == (
        f"python -m reduce: error: {out}: expected a cube to replace, found a file that lossledger did not write. "
        "Pass another --out, or --overwrite to lose it.\n"
    )
    assert captured.out == ""
    assert out.read_bytes() == before
    assert main(["--run", str(run), "--out", str(out), "--overwrite"]) == commandline.DONE
    with cube.open_cube(out) as dataset:
        assert dataset.sizes["step"] == 8


def test_a_place_where_no_file_can_be_is_wrong_usage(run: Path, capsys: Captured) -> None:
    assert main(["--run", str(run), "--out", str(run)]) == commandline.WRONG_USAGE
    assert "expected a file name for the cube, found a folder" in capsys.readouterr().err
    assert main(["--run", str(run), "--out", str(run / "no" / "x.nc")]) == commandline.WRONG_USAGE
    assert "its folder does not exist" in capsys.readouterr().err


def test_ambiguous_loss_data_is_one_line_and_settings_decides(
    run: Path, build: Build, parameters: list[Parameter], capsys: Captured
) -> None:
    simpson = build(run, parameters, [(0, 2)], rule="simpson").settings.hash
    assert main(["--run", str(run)]) == commandline.WRONG_USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"python -m reduce: error: {run}: loss data 'batch' was replayed with 2 settings: ")
    assert f"{simpson} (loss data batch, rule simpson, 2 steps)" in line
    assert line.endswith("Pass --settings HASH once for this loss data.")
    assert not (run / "lca.nc").exists()
    assert main(["--run", str(run), "--settings", simpson]) == commandline.DONE
    with cube.open_cube(run / "lca.nc") as dataset:
        assert dataset.sizes["step"] == 2


@pytest.mark.parametrize("old", [True, False])
def test_a_truncated_shard_is_one_line_and_leaves_the_old_cube(
    run: Path, build: Build, parameters: list[Parameter], capsys: Captured, *, old: bool
) -> None:
    if old:
        assert main(["--run", str(run)]) == commandline.DONE
    before = (run / "lca.nc").read_bytes() if old else None
    capsys.readouterr()
    shard = build(run, parameters, []).file(4, 8)
    shard.write_bytes(shard.read_bytes()[:-5])
    assert main(["--run", str(run)]) == commandline.FAILED
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith(f"python -m reduce: error: {shard}: not a whole safetensors file")
    assert captured.out == ""
    assert ((run / "lca.nc").read_bytes() if old else None) == before
    assert not list(run.glob(".*"))


def test_stopped_in_the_middle_of_writing_no_file_appears(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    written: list[Path] = []

    def stopped(path: Path, *_: object) -> None:
        written.append(path)
        assert path.stat().st_size > 0
        raise KeyboardInterrupt

    monkeypatch.setattr(cube, "STEPS_AT_ONCE", 4)
    monkeypatch.setattr(cube, "_append", stopped)
    assert main(["--run", str(run)]) == commandline.INTERRUPTED
    assert len(written) == 1
    assert sorted(entry.name for entry in run.iterdir()) == ["shards"]
    assert capsys.readouterr().out == ""


def test_a_missing_run_and_a_run_without_shards_are_wrong_usage(tmp_path: Path, capsys: Captured) -> None:
    assert main(["--run", str(tmp_path / "none")]) == commandline.WRONG_USAGE
    assert capsys.readouterr().err == f"python -m reduce: error: no such run folder: {tmp_path / 'none'}\n"
    assert main(["--run", str(tmp_path)]) == commandline.WRONG_USAGE
    assert f"run first: python -m replay --run {tmp_path}" in capsys.readouterr().err
