"""The numbers of the figures are the cube's."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import xarray as xr

from recorder.errors import UsageError
from viz import select
from viz.panels import ATTENTION, FEED_FORWARD, bars

MakeCube = Callable[..., xr.Dataset]
SHAPES = ["encoder-decoder", "decoder-only", "encoder-only"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("data", ["batch", "probe"])
def test_sum_over_steps_is_the_cubes(make_cube: MakeCube, shape: str, data: str) -> None:
    cube = make_cube(shape)
    found = select.summed_over_steps(cube, data)
    lca = cube["lca"].sel(data=data)
    for layer in cube["layer"].values:
        for component in cube["component"].values:
            amounts = lca.sel(layer=layer, component=component).values
            if cube["n_parameters"].sel(layer=layer, component=component) == 0:
                assert np.isnan(found.sel(layer=layer, component=component))
            else:
                assert float(found.sel(layer=layer, component=component)) == math.fsum(amounts)
    assert found.attrs == {"long_name": "loss change allocation, summed over steps", "units": "nat"}


def test_sum_does_not_depend_on_the_block_of_steps(make_cube: MakeCube, monkeypatch: pytest.MonkeyPatch) -> None:
    cube = make_cube(status={("batch", 7): "missing", ("batch", 8): "not_finite"})
    whole, books = select.summed_over_steps(cube, "batch"), select.balance(cube, "batch")
    monkeypatch.setattr(select, "STEPS_AT_ONCE", 7)
    xr.testing.assert_identical(select.summed_over_steps(cube, "batch"), whole)
    xr.testing.assert_identical(select.balance(cube, "batch"), books)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_bar_is_a_cell_and_every_cell_of_the_panels_a_bar(make_cube: MakeCube, shape: str) -> None:
    cells = select.summed_over_steps(make_cube(shape), "batch")
    for panels in (ATTENTION, FEED_FORWARD):
        arranged = bars(cells, panels)
        for panel in panels:
            for bar in arranged.sel(panel=panel.title).transpose("bar"):
                component = panel.cross if str(bar["group"].item()) == "cross" else panel.component
                expected = cells.sel(layer=str(bar["layer"].item()), component=component)
                np.testing.assert_array_equal(bar.values, expected.values)
        names = [name for panel in panels for name in (panel.component, panel.cross) if name]
        drawn = np.sort(arranged.values[~np.isnan(arranged.values)])
        held = cells.sel(component=names).values
        np.testing.assert_array_equal(drawn, np.sort(held[~np.isnan(held)]))


@pytest.mark.parametrize(
    ("shape", "attention", "feed_forward"),
    [
        ("encoder-decoder", {"encoder": 6, "decoder": 6, "cross": 6}, {"encoder": 6, "decoder": 6}),
        ("decoder-only", {"decoder": 12}, {"decoder": 12}),
        ("encoder-only", {"encoder": 12}, {"encoder": 12}),
    ],
)
def test_groups_of_bars(
    make_cube: MakeCube, shape: str, attention: dict[str, int], feed_forward: dict[str, int]
) -> None:
    cells = select.summed_over_steps(make_cube(shape), "probe")
    for panels, expected in ((ATTENTION, attention), (FEED_FORWARD, feed_forward)):
        groups = list(bars(cells, panels)["group"].values)
        assert {name: groups.count(name) for name in dict.fromkeys(groups)} == expected


def test_a_layer_without_the_component_keeps_its_place_without_a_number(make_cube: MakeCube) -> None:
    cube = make_cube("decoder-only")
    cube["lca"].loc[{"layer": "decoder.4", "component": "W1"}] = np.nan
    cube["n_parameters"].loc[{"layer": "decoder.4", "component": "W1"}] = 0
    found = bars(select.summed_over_steps(cube, "batch"), FEED_FORWARD).sel(panel="W1")
    assert np.flatnonzero(np.isnan(found.values)).tolist() == [4]
    assert found["depth"].values.tolist() == list(range(12))


@pytest.mark.parametrize("shape", SHAPES)
def test_balance(make_cube: MakeCube, shape: str) -> None:
    cube = make_cube(shape)
    books = select.balance(cube, "probe")
    one = cube.sel(data="probe")
    np.testing.assert_array_equal(books["allocated"], one["lca"].sum(["layer", "component"]))
    np.testing.assert_array_equal(books["measured"], one["loss_end"] - one["loss_start"])
    np.testing.assert_array_equal(books["residual"], one["residual"])
    np.testing.assert_array_equal(books["tolerance"], one["tolerance"])
    assert not books["beyond"].any()


def test_tolerance_is_that_of_the_replay(make_cube: MakeCube) -> None:
    cube = make_cube(tolerances={"probe": {"rtol": 1e-6, "atol": 1e-9}})
    assert select.asked_tolerance(cube, "probe") == (1e-6, 1e-9)
    assert np.isnan(select.asked_tolerance(cube, "batch")).all()
    # Step 0 moves nothing; residuals of 1e-3 are beyond 1e-6 everywhere else.
    assert select.balance(cube, "probe")["beyond"].values[1:].mean() > 0.9


def test_steps_that_do_not_count_are_in_no_sum(make_cube: MakeCube) -> None:
    cube = make_cube(status={("batch", 5): "not_finite", ("batch", 9): "missing", ("batch", 3): "tolerance_not_met"})
    # What stands at a step that is not finite must not matter, whatever it is.
    cube["lca"].loc[{"data": "batch", "step": 5}] = np.inf
    cube["loss_end"].loc[{"data": "batch", "step": 5}] = np.inf
    counted = cube.sel(data="batch").drop_sel(step=[5, 9])
    found = select.totals(cube, "batch")
    assert found.total == float(counted["lca"].sum())
    assert found.measured == pytest.approx(float((counted["loss_end"] - counted["loss_start"]).sum()), rel=1e-12)
    assert found.statuses == {"converged": 37, "tolerance_not_met": 1, "not_finite": 1, "not_checked": 0, "missing": 1}
    assert (found.worst_residual, found.worst_step) == (0.05, 3)
    books = select.balance(cube, "batch")
    assert books["step"].values[np.isnan(books["allocated"].values)].tolist() == [5, 9]
    assert books["step"].values[books["beyond"].values].tolist() == [3]


def test_cells_that_do_not_add_up_are_beyond_though_the_residual_is_small(make_cube: MakeCube) -> None:
    cube = make_cube()
    cube["lca"].loc[{"data": "probe", "step": 6, "layer": "model", "component": "embedding"}] += 0.5
    assert select.balance(cube, "probe")["beyond"].values.nonzero()[0].tolist() == [6]


def test_totals_of_components_have_no_entry_without_parameters(make_cube: MakeCube) -> None:
    found = select.totals(make_cube("decoder-only"), "batch").by_component
    assert list(found) == ["key", "query", "value", "out", "W1", "W2", "embedding", "norm"]


def test_no_step_counts(make_cube: MakeCube) -> None:
    cube = make_cube(steps=2, status={("batch", 0): "missing", ("batch", 1): "missing"})
    found = select.totals(cube, "batch")
    assert found.worst_step is None
    assert np.isnan([found.total, found.measured, found.worst_residual]).all()
    assert np.isnan(select.summed_over_steps(cube, "batch")).all()


def test_unknown_loss_data_is_named_with_the_known(make_cube: MakeCube) -> None:
    cubes = {"a": make_cube(data=("batch",)), "b": make_cube(data=("probe", "batch"))}
    assert select.loss_data(cubes) == ["batch", "probe"]
    assert list(select.cubes_with(cubes, "probe")) == ["b"]
    with pytest.raises(UsageError, match=r"expected one that the cubes carry \(batch, probe\), found 'prob'"):
        select.cubes_with(cubes, "prob")


def test_steps_that_were_not_checked_count_and_leave_the_measured_change_open(make_cube: MakeCube) -> None:
    whole = select.totals(make_cube(), "batch")
    cube = make_cube(status={("batch", step): "not_checked" for step in range(1, 40) if step % 4})
    found = select.totals(cube, "batch")
    assert found.total == whole.total
    assert math.isnan(found.measured)
    assert found.worst_step is not None
    assert found.worst_step % 4 == 0
    assert (found.statuses["converged"], found.statuses["not_checked"]) == (10, 30)
    book = select.balance(cube, "batch")
    assert np.isfinite(book["allocated"]).all()
    assert not book["beyond"].any()
