"""What version 1 of the cube was at first opens for ever: tests/golden/cube-v1, made before there was `step_end`."""

from __future__ import annotations

from pathlib import Path

import netCDF4
import numpy as np

import reduce
from reduce import cube, pipeline, schema

GOLDEN = Path(__file__).parents[1] / "golden"


def test_a_cube_without_the_ends_of_its_steps_opens_and_has_them() -> None:
    path = GOLDEN / "cube-v1" / "lca.nc"
    with netCDF4.Dataset(path) as file:
        assert "step_end" not in file.variables
    with reduce.open_cube(path) as dataset:
        assert dataset["step"].values.tolist() == [0, 1, 2]
        assert dataset["step_end"].values.tolist() == [1, 2, 3]
        assert dataset["step_end"].attrs["long_name"] == schema.FIELDS["step_end"].long_name
        assert dataset.attrs["path"] == "recorded"
        change = (dataset["loss_end"] - dataset["loss_start"]).values
        np.testing.assert_allclose(
            dataset["lca"].sum(["layer", "component"]).values, change + dataset["residual"].values, atol=1e-12
        )


def test_shards_of_then_make_the_same_cube_now(tmp_path: Path) -> None:
    plan = pipeline.plan(GOLDEN / "shards-v1" / "run")
    pipeline.write(plan, tmp_path / "lca.nc", command="test")
    with cube.open_cube(tmp_path / "lca.nc") as now, cube.open_cube(GOLDEN / "cube-v1" / "lca.nc") as then:
        for name in ("lca", "lca_head", "loss_start", "loss_end", "residual", "status", "total_standard_error"):
            np.testing.assert_array_equal(now[name].sel(data="probe").values, then[name].sel(data="probe").values)
