"""``python -m viz``: what it writes and prints, and what it says to wrong use."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import xarray as xr

from viz.__main__ import main

MakeCube = Callable[..., xr.Dataset]


@pytest.fixture
def run(make_cube: MakeCube, tmp_path: Path) -> Path:
    return _write(make_cube(steps=5), tmp_path / "translation")


def _write(cube: xr.Dataset, folder: Path) -> Path:
    folder.mkdir(parents=True)
    cube.to_netcdf(folder / "lca.nc")
    return folder


def test_one_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--run", str(run)]) == 0
    out, err = capsys.readouterr()
    names = [
        *(f"{name}.{kind}" for name in ("figure1-batch", "figure1-probe", "balance") for kind in ("png", "pdf")),
        "table.csv",
        "table.md",
    ]
    assert out.splitlines()[-8:] == [str(run / "figures" / name) for name in names]
    assert out.startswith(" ")
    assert "measured ΔL" in out
    assert err == ""
    assert sorted(path.name for path in (run / "figures").iterdir()) == sorted(names)


def test_several_runs_formats_and_out(
    run: Path, make_cube: MakeCube, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = _write(make_cube("decoder-only", steps=5, data=("news/2024",)), tmp_path / "causal")
    out = tmp_path / "some" / "where"
    arguments = ["--run", str(run), "--run", f"my label={other / 'lca.nc'}", "--out", str(out)]
    assert main([*arguments, "--format", "svg", "--format", "svg"]) == 0
    assert "my label" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [
        "balance.svg",
        "figure1-batch.svg",
        "figure1-news_2024.svg",
        "figure1-probe.svg",
        "table.csv",
        "table.md",
    ]


def test_several_runs_go_to_figures_here(
    run: Path, make_cube: MakeCube, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = _write(make_cube("decoder-only", steps=5), tmp_path / "causal")
    monkeypatch.chdir(tmp_path)
    assert main(["--run", str(run), "--run", str(other), "--format", "png"]) == 0
    assert (tmp_path / "figures" / "balance.png").is_file()


def test_a_second_call_writes_the_same_bytes(run: Path, tmp_path: Path) -> None:
    for out in ("a", "b"):
        assert main(["--run", str(run), "--out", str(tmp_path / out)]) == 0
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def _refused(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int) -> str:
    assert main(arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("python -m viz: error: ")
    assert err.count("\n") == 1
    return err


def test_missing_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = _refused(["--run", str(tmp_path / "nowhere")], capsys, 2)
    assert f"expected a run's folder or a cube's .nc file, found nothing at {tmp_path / 'nowhere'}" in error


def test_run_without_a_cube(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = _refused(["--run", str(tmp_path)], capsys, 2)
    assert f"found no {tmp_path / 'lca.nc'}; run first: python -m reduce --run {tmp_path}" in error


def test_unknown_format(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = _refused(["--run", str(run), "--format", "gif"], capsys, 2)
    assert "--format: expected one of png, pdf, svg, found 'gif'" in error
    assert not (run / "figures").exists()


def test_same_label_twice(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = _refused(["--run", f"a={run}", "--run", f"a={run}"], capsys, 2)
    assert "--run: expected every label once, found 'a' more than once" in error


def test_out_is_a_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").touch()
    error = _refused(["--run", str(run), "--out", str(tmp_path / "taken")], capsys, 2)
    assert f"--out: expected a folder, found a file: {tmp_path / 'taken'}" in error


def test_cube_of_another_version(make_cube: MakeCube, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cube = make_cube(steps=2)
    cube.attrs["lossledger_cube_version"] = 99
    error = _refused(["--run", str(_write(cube, tmp_path / "new"))], capsys, 1)
    assert "found version 99" in error


def test_no_cube_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.nc").write_text("not a cube")
    assert "found a file that is no cube" in _refused(["--run", str(tmp_path / "notes.nc")], capsys, 1)


def test_without_a_run_the_usage_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert "python -m viz: error: the following arguments are required: --run" in capsys.readouterr().err


def test_flags_are_these_and_no_others(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert shown.startswith("usage: python -m viz [-h] --run [LABEL=]RUN [--out OUT] [--format png|pdf|svg]")


def test_viz_needs_neither_torch_nor_dask_nor_pyplot() -> None:
    program = (
        "import sys, viz.__main__; print(*{'torch', 'dask', 'distributed', 'matplotlib.pyplot'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")
