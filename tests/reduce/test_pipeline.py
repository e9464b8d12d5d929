from __future__ import annotations

import dataclasses
import itertools
import math
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from recorder.errors import FormatError
from reduce import cube, pipeline, schema
from replay.shards import ATTENTION_COMPONENTS, COMPONENTS, Parameter, Shard, ShardFolder

Build = Callable[..., ShardFolder]

FEW = settings(max_examples=25, deadline=None)


def reduced(run: Path) -> xr.Dataset:
    pipeline.write(pipeline.plan(run), run / cube.FILE_NAME, command="test")
    with cube.open_cube(run / cube.FILE_NAME) as dataset:
        return dataset.load()


@st.composite
def rows(draw: st.DrawFn, index: int) -> Parameter:
    stack = draw(st.sampled_from(["encoder", "decoder", "other", "model"]))
    depth = -1 if stack == "model" else draw(st.integers(0, 2))
    component = draw(st.sampled_from(COMPONENTS))
    heads = draw(st.sampled_from([0, 1, 2, 3])) if component in ATTENTION_COMPONENTS else 0
    rest = draw(st.lists(st.integers(1, 3), max_size=2))
    units = draw(st.integers(1, 3)) * max(heads, 1)
    axis = draw(st.integers(0, len(rest)))
    return Parameter(
        name=f"p{index}",
        shape=(*rest[:axis], units, *rest[axis:]),
        dtype="float32",
        status=draw(st.sampled_from(["trained", "trained", "untrained"])),
        layer=stack if stack == "model" else f"{stack}.{depth}",
        stack=stack,
        depth=depth,
        component=component,
        unit_axis=axis,
        heads=heads,
    )


tables = st.integers(1, 7).flatmap(lambda length: st.tuples(*[rows(index) for index in range(length)]))


@FEW
@given(table=tables)
def test_every_unit_is_counted_once(
    table: tuple[Parameter, ...], build: Build, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = tmp_path_factory.mktemp("run")
    folder = build(run, table, [(0, 3)])
    dataset = reduced(run)
    shard = folder.read(0, 3)
    trained = [row for row in table if row.trained]
    assert dataset.n_parameters.sum() == sum(row.size for row in trained)
    for variable, quantity in (("lca", "sum"), ("lca_positive", "positive_sum")):
        for step in range(3):
            units = [value for row in trained for value in shard.per_unit[quantity][row.name][step].tolist()]
            total = dataset[variable].sel(data="batch", step=step).sum().item()
            assert abs(total - math.fsum(units)) <= 1e-12 * math.fsum(map(abs, units))
            for layer, component in {(row.layer, row.component) for row in trained}:
                of_cell = [row for row in trained if (row.layer, row.component) == (layer, component)]
                here = [value for row in of_cell for value in shard.per_unit[quantity][row.name][step].tolist()]
                cell = dataset[variable].sel(data="batch", step=step, layer=layer, component=component).item()
                assert abs(cell - math.fsum(here)) <= 1e-12 * math.fsum(map(abs, here))
    counts = (dataset.hurting * dataset.n_parameters).sum(["layer", "component"]).sel(data="batch")
    for step in range(3):
        expected = sum(int(shard.per_unit["positive_count"][row.name][step].sum()) for row in trained)
        assert counts[step].item() == pytest.approx(expected, rel=1e-12)


@FEW
@given(table=tables)
def test_heads_sum_to_the_weights_part_of_their_cell(
    table: tuple[Parameter, ...], build: Build, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = tmp_path_factory.mktemp("run")
    folder = build(run, table, [(0, 2)])
    dataset = reduced(run)
    shard = folder.read(0, 2)
    for layer in dataset.layer.values:
        for component in ATTENTION_COMPONENTS:
            weights = [
                row
                for row in table
                if (row.layer, row.component) == (layer, component) and row.trained and row.heads and len(row.shape) > 1
            ]
            heads = dataset.lca_head.sel(data="batch", layer=layer, attention_component=component)
            known = max((row.heads for row in weights), default=0)
            assert np.isnan(heads.isel(head=slice(known, None))).all()
            assert not np.isnan(heads.isel(head=slice(0, known))).any()
            for step in range(2):
                units = [value for row in weights for value in shard.per_unit["sum"][row.name][step].tolist()]
                total = heads.sel(step=step).sum().item()
                assert abs(total - math.fsum(units)) <= 1e-12 * math.fsum(map(abs, units))


def test_a_head_is_a_block_of_consecutive_units(tmp_path: Path, build: Build, parameters: list[Parameter]) -> None:
    folder = build(tmp_path, parameters, [(0, 2)])
    units = folder.read(0, 2).per_unit["sum"]
    heads = reduced(tmp_path).lca_head.sel(data="batch", layer="decoder.0")
    out = heads.sel(attention_component="out")
    np.testing.assert_allclose(out[:, 0], units["d0.out"][:, :3].sum(axis=1), rtol=1e-12)
    np.testing.assert_allclose(out[:, 1], units["d0.out"][:, 3:].sum(axis=1), rtol=1e-12)
    key = units["d0.key"][:, 3:].sum(axis=1) + units["d0.key.extra"][:, 2:].sum(axis=1)
    np.testing.assert_allclose(heads.sel(attention_component="key")[:, 1], key, rtol=1e-12)


def ranges_between(cuts: set[int], steps: int) -> list[tuple[int, int]]:
    edges = sorted({0, steps, *cuts})
    return list(itertools.pairwise(edges))


@pytest.fixture(scope="module")
def in_one_shard(build: Build, parameters: list[Parameter], tmp_path_factory: pytest.TempPathFactory) -> xr.Dataset:
    run = tmp_path_factory.mktemp("run")
    build(run, parameters, [(0, 23)])
    build(run, parameters, [(0, 23)], loss_data="probe")
    return reduced(run)


@FEW
@given(cuts=st.sets(st.integers(1, 22)), probe_cuts=st.sets(st.integers(1, 22)), at_once=st.integers(1, 30))
def test_any_chunking_gives_the_identical_cube(
    cuts: set[int],
    probe_cuts: set[int],
    at_once: int,
    build: Build,
    parameters: list[Parameter],
    in_one_shard: xr.Dataset,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    run = tmp_path_factory.mktemp("run")
    build(run, parameters, ranges_between(cuts, 23))
    build(run, parameters, ranges_between(probe_cuts, 23), loss_data="probe")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cube, "STEPS_AT_ONCE", at_once)
        found = reduced(run)
    found.attrs["history"] = in_one_shard.attrs["history"]
    xr.testing.assert_identical(found, in_one_shard)
    for name in schema.ALONG_STEP:
        assert found[name].values.tobytes() == in_one_shard[name].values.tobytes()


def test_a_step_that_was_not_replayed_is_missing_and_never_zero(
    tmp_path: Path, build: Build, parameters: list[Parameter]
) -> None:
    build(tmp_path, parameters, [(0, 4), (4, 8)])
    build(tmp_path, parameters, [(2, 4), (9, 10)], loss_data="probe")
    dataset = reduced(tmp_path)
    assert dataset.step.values.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 9]
    for data, absent in (("batch", [9]), ("probe", [0, 1, 4, 5, 6, 7])):
        gone = dataset.sel(data=data, step=absent)
        there = dataset.sel(data=data).drop_sel(step=absent)
        assert (gone.status == schema.STATUSES.index("missing")).all()
        assert (gone.evaluations == 0).all()
        for name in ("lca", "lca_positive", "hurting", "lca_head", "loss_start", "loss_end", "residual"):
            assert np.isnan(gone[name]).all(), name
        assert (there.status == there.step % 2).all()
        assert (there.evaluations > 0).all()
        assert there.lca.notnull().any(["layer", "component"]).all()
        assert there.residual.notnull().all()
    assert (dataset.predictions == 100 + dataset.step).all()
    assert (dataset.epoch == 1 + dataset.step // 5).all()


def test_cells_without_trained_parameters_are_nan(tmp_path: Path, build: Build, parameters: list[Parameter]) -> None:
    build(tmp_path, parameters, [(0, 2)])
    dataset = reduced(tmp_path)
    empty = dataset.n_parameters == 0
    assert empty.sel(layer="encoder.2", component="value")
    for name in ("lca", "lca_positive", "hurting"):
        assert (dataset[name].isnull() == empty).all(), name


def test_loss_data_of_different_updates_are_refused(tmp_path: Path, build: Build, parameters: list[Parameter]) -> None:
    def other_rate(shard: Shard) -> Shard:
        return dataclasses.replace(shard, per_step={**shard.per_step, "lr": shard.per_step["lr"] * 2})

    build(tmp_path, parameters, [(0, 2)])
    build(tmp_path, parameters, [(0, 2)], loss_data="probe", change=other_rate)
    with pytest.raises(FormatError, match=r"step 0: expected lr 0.001 as on the other loss data, found 0.002"):
        reduced(tmp_path)


def test_a_shard_of_other_steps_than_its_name_is_refused(
    tmp_path: Path, build: Build, parameters: list[Parameter]
) -> None:
    def later(shard: Shard) -> Shard:
        return dataclasses.replace(shard, per_step={**shard.per_step, "step": shard.per_step["step"] + 5})

    build(tmp_path, parameters, [(0, 2)], change=later)
    with pytest.raises(FormatError, match=r"00000000-00000002.*expected steps 0 to 1, found \[5, 6\]"):
        reduced(tmp_path)


def test_memory_does_not_grow_with_the_number_of_steps(
    tmp_path: Path, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cube, "STEPS_AT_ONCE", 16)
    # One parameter to a layer: what is left of a step is large enough to be noticed if it were kept.
    table = [
        Parameter(name=layer, shape=(400, 2), dtype="float32", layer=layer, stack="encoder", depth=depth)
        for depth, layer in enumerate(f"encoder.{depth}" for depth in range(40))
    ]

    def peak(steps: int) -> int:
        run = tmp_path / str(steps)
        build(run, table, [(start, start + 4) for start in range(0, steps, 4)])
        plan = pipeline.plan(run)
        tracemalloc.start()
        try:
            pipeline.write(plan, run / cube.FILE_NAME, command="test")
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(16)
    assert peak(256) < 1.3 * peak(64)


def test_reduce_imports_no_torch() -> None:
    code = "import sys, reduce.pipeline, reduce.cube, reduce.__main__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
