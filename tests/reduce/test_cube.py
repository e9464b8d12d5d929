from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import netCDF4
import numpy as np
import pytest
import xarray as xr

import reduce
from recorder.errors import FormatError, LossledgerError, UsageError
from reduce import cube, pipeline, schema
from replay.shards import Parameter, ShardFolder

mpl.use("Agg")
Build = Callable[..., ShardFolder]


@pytest.fixture
def made(tmp_path: Path, build: Build, parameters: list[Parameter]) -> Path:
    build(tmp_path, parameters, [(0, 4), (4, 8)])
    build(tmp_path, parameters, [(0, 8)], loss_data="probe")
    path = tmp_path / cube.FILE_NAME
    pipeline.write(pipeline.plan(tmp_path), path, command="python -m reduce --run x")
    return path


def test_plain_xarray_opens_it_with_every_coordinate_and_label(made: Path) -> None:
    with xr.open_dataset(made) as dataset:
        assert set(dataset.coords) == set(schema.COORDINATES)
        assert set(dataset.data_vars) == set(schema.VARIABLES)
        for name, variable in dataset.variables.items():
            assert variable.attrs["long_name"], name
            assert variable.attrs["units"], name
        assert dataset.status.attrs["flag_values"].tolist() == [0, 1, 2, 3, 4]
        assert dataset.status.attrs["flag_meanings"] == "converged tolerance_not_met not_finite not_checked missing"
        assert dataset.layer.values.tolist() == ["encoder.2", "encoder.10", "decoder.0", "model"]
        assert dataset["stack"].values.tolist() == ["encoder", "encoder", "decoder", "model"]
        assert dataset.depth.values.tolist() == [2, 10, 0, -1]
        assert dataset["head"].values.tolist() == [0, 1, 2]
        assert dataset.attrs["path"] == "recorded"
        assert dataset.attrs["history"].endswith("Z python -m reduce --run x")


def test_the_contract_names_every_variable_and_coordinate() -> None:
    page = Path(__file__).parents[2].joinpath("docs", "formats", "cube.md").read_text(encoding="utf-8")
    for name, field in schema.FIELDS.items():
        assert f"`{name}`" in page
        if name in schema.VARIABLES and field.units == "nat":
            assert any(f"`{name}`" in line and "| nat |" in line for line in page.splitlines())


def test_provenance_is_json_with_the_settings_of_every_loss_data(made: Path) -> None:
    with reduce.open_cube(made) as dataset:
        provenance = json.loads(dataset.attrs["provenance"])
    assert provenance["host"] == "somewhere"
    assert provenance["fp16"] is None
    assert set(provenance["loss_data"]) == {"batch", "probe"}
    assert provenance["loss_data"]["probe"]["rule"] == "adaptive"


def test_a_long_provenance_fits(tmp_path: Path, made: Path) -> None:
    with cube.open_cube(made) as dataset:
        values = {name: dataset[name].values for name in schema.FIELDS}
    words = {"words": ["é" * 100] * 5000}
    attributes = schema.attributes(path="recorded", provenance=words, command="c")
    cube.write(tmp_path / "long.nc", [cube.make(values, attributes)], steps=8)
    with cube.open_cube(tmp_path / "long.nc") as dataset:
        assert json.loads(dataset.attrs["provenance"]) == words


def test_plots_label_their_axes(made: Path) -> None:
    import matplotlib.pyplot as plt

    with cube.open_cube(made) as ds:
        figure = plt.figure()
        ds.lca.sel(data="batch", component="key").sum("step").plot()
        (axes,) = figure.axes
        assert axes.get_xlabel() == "layer [1]"
        assert axes.get_ylabel() == "loss change allocation [nat]"
        plt.close(figure)

        figure = plt.figure()
        ds.lca_head.sel(data="batch", layer="decoder.0", attention_component="key").plot()
        assert [figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()] == [
            "attention head [1]",
            "optimizer step [1]",
        ]
        plt.close(figure)


def test_a_model_without_heads_opens_and_plots(tmp_path: Path, build: Build) -> None:
    import matplotlib.pyplot as plt

    build(tmp_path, [Parameter(name="w", shape=(3, 2), dtype="float32", component="W1")], [(0, 2)])
    pipeline.write(pipeline.plan(tmp_path), tmp_path / "x.nc", command="c")
    with xr.open_dataset(tmp_path / "x.nc") as dataset:
        assert dataset.sizes["head"] == 1
        assert np.isnan(dataset.lca_head).all()
        figure = plt.figure()
        dataset.lca.sel(data="batch", layer="model").plot()
        plt.close(figure)


def test_another_version_is_refused(made: Path) -> None:
    with netCDF4.Dataset(made, "a") as file:
        file.setncattr("lossledger_cube_version", 2)
    with pytest.raises(FormatError) as caught:
        cube.open_cube(made)
    assert str(caught.value) == (
        f"{made}: expected a cube of version 1, found version 2. "
        "Make it again from the run's shards: python -m reduce --run RUN"
    )


def test_a_cube_without_a_variable_is_refused(made: Path) -> None:
    with netCDF4.Dataset(made, "a") as file:
        file.renameVariable("residual", "rest")
    with pytest.raises(FormatError, match="expected the cube's variable 'residual', found none"):
        cube.open_cube(made)


def test_a_cube_with_other_dimensions_is_refused(made: Path) -> None:
    with netCDF4.Dataset(made, "a") as file:
        file.renameVariable("residual", "rest")
        file.createVariable("residual", "f8", ("step",))
    with pytest.raises(FormatError, match=r"'residual' to be float64 over \('data', 'step'\), found .* \('step',\)"):
        cube.open_cube(made)


def test_what_is_no_cube_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such cube"):
        cube.open_cube(tmp_path / "none.nc")
    (tmp_path / "text.nc").write_text("text")
    xr.Dataset({"x": ("y", [1.0])}).to_netcdf(tmp_path / "foreign.nc")
    for name in ("text.nc", "foreign.nc"):
        with pytest.raises(FormatError, match="found a file that is no cube of lossledger"):
            cube.open_cube(tmp_path / name)


def test_a_cube_that_lacks_steps_never_appears(made: Path, tmp_path: Path) -> None:
    before = made.read_bytes()
    with cube.open_cube(made) as dataset:
        block = dataset.load()
    with pytest.raises(LossledgerError, match="expected 9 steps in order after writing, found 8"):
        cube.write(made, [cube.make({name: block[name].values for name in schema.FIELDS}, block.attrs)], steps=9)
    assert made.read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_is_one_line_and_leaves_nothing(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("NetCDF: HDF error")

    monkeypatch.setattr(cube, "_append", fails)
    monkeypatch.setattr(cube, "STEPS_AT_ONCE", 4)
    out = tmp_path / "full.nc"
    with pytest.raises(LossledgerError, match=r"full.nc: the cube cannot be written \(NetCDF: HDF error\)"):
        pipeline.write(pipeline.plan(tmp_path), out, command="c")
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))


def test_the_package_is_lazy() -> None:
    assert reduce.open_cube is cube.open_cube
    with pytest.raises(AttributeError, match="module 'reduce' has no attribute 'close_cube'"):
        reduce.close_cube  # noqa: B018
