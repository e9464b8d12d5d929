"""The table's totals are the cube's, and every form of it shows them."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable

import numpy as np
import pytest
import xarray as xr

from viz.figures import plot_figure1
from viz.table import Row, Table, show, to_csv, to_markdown, totals_table

MakeCube = Callable[..., xr.Dataset]


def _row(table: Table, name: str) -> Row:
    (row,) = [row for row in table.rows if row.name == name]
    return row


@pytest.fixture
def cubes(make_cube: MakeCube) -> dict[str, xr.Dataset]:
    return {
        "translation": make_cube(status={("batch", 4): "tolerance_not_met", ("probe", 9): "missing"}),
        "causal [lm]": make_cube("decoder-only", data=("probe",), seed=1, path="chord"),
    }


def test_columns_and_rows(cubes: dict[str, xr.Dataset]) -> None:
    table = totals_table(cubes)
    assert table.columns == (("translation", "batch"), ("translation", "probe"), ("causal [lm]", "probe"))
    names = [row.name for row in table.rows]
    components = ["key", "query", "value", "out", "cross_key", "cross_query", "cross_value", "cross_out"]
    assert names[: names.index("total")] == [*components, "W1", "W2", "embedding", "norm"]
    assert _row(table, "cross_key").cells[2] is None
    assert _row(table, "path").cells == ("recorded", "recorded", "chord")
    assert _row(table, "steps").cells == (40, 40, 40)
    assert _row(table, "steps converged").cells == (39, 39, 40)
    assert _row(table, "steps tolerance not met").cells == (1, 0, 0)
    assert _row(table, "steps missing").cells == (0, 1, 0)
    assert _row(table, "at step").cells[0] == 4
    assert _row(table, "worst |residual| of a step").cells[0] == 0.05


def test_the_uses_of_tied_weights_have_a_row_each_and_the_total_stays(make_cube: MakeCube) -> None:
    whole = make_cube(data=("batch",))
    by_use = whole.copy(deep=True)
    embedding, output = ({"layer": "model", "component": name} for name in ("embedding", "output"))
    # A power of two, so that no addition rounds.
    by_use["lca"].loc[output] = whole["lca"].loc[embedding].values * 1.25
    by_use["lca"].loc[embedding] = whole["lca"].loc[embedding].values * -0.25
    by_use["n_parameters"].loc[output] = whole["n_parameters"].loc[embedding].values
    table = totals_table({"whole": whole, "by use": by_use})
    names = [row.name for row in table.rows]
    assert names[names.index("norm") + 1] == "output"
    together, looked_up = _row(table, "embedding").cells
    nothing, predicted = _row(table, "output").cells
    assert nothing is None
    assert isinstance(together, float)
    assert predicted == pytest.approx(1.25 * together, rel=1e-12)
    assert looked_up == pytest.approx(-0.25 * together, rel=1e-12)
    assert _row(table, "total").cells[0] == pytest.approx(_row(table, "total").cells[1], rel=1e-12)
    figure = plot_figure1({"by use": by_use}, data="batch")
    said = " ".join(" ".join(text.get_text() for text in figure.texts).split())
    assert "Embeddings, positions, norms and the output layer stand in the table" in said


def test_total_is_the_sum_of_components_and_stands_beside_the_measured_change(
    cubes: dict[str, xr.Dataset],
) -> None:
    table = totals_table(cubes)
    parts = table.rows[: [row.name for row in table.rows].index("total")]
    for column, (label, data) in enumerate(table.columns):
        one = cubes[label].sel(data=data)
        amounts = [row.cells[column] for row in parts if row.cells[column] is not None]
        total = _row(table, "total").cells[column]
        assert total == np.sum(np.array(amounts, dtype=float)) == float(one["lca"].sum())
        measured = _row(table, "measured ΔL").cells[column]
        assert measured == pytest.approx(float((one["loss_end"] - one["loss_start"]).sum()), rel=1e-12)
        difference = _row(table, "total \N{MINUS SIGN} measured ΔL").cells[column]
        assert difference == pytest.approx(float(one["residual"].sum()), rel=1e-6)


def test_csv_has_every_digit(cubes: dict[str, xr.Dataset]) -> None:
    table = totals_table(cubes)
    header, *lines = csv.reader(io.StringIO(to_csv(table)))
    assert header == ["LCA", "units", "translation, batch", "translation, probe", "causal [lm], probe"]
    assert [line[0] for line in lines] == [row.name for row in table.rows]
    total = next(line for line in lines if line[0] == "total")
    assert total[1] == "nat"
    assert tuple(map(float, total[2:])) == _row(table, "total").cells
    assert next(line for line in lines if line[0] == "cross_key")[4] == ""


def test_markdown(cubes: dict[str, xr.Dataset]) -> None:
    text = to_markdown(totals_table(cubes))
    rows, notes = text.split("\n\n")
    lines = rows.splitlines()
    assert lines[1] == "| --- | --- | ---: | ---: | ---: |"
    assert {line.replace("\\|", "").count("|") for line in lines} == {6}
    assert "probe: the loss is measured on a fixed probe set" in notes


def test_printed_table_is_aligned_plain_text_of_any_width(cubes: dict[str, xr.Dataset]) -> None:
    many = {f"{label} {i}": cube for i in range(5) for label, cube in cubes.items()}
    stream = io.StringIO()
    show(totals_table(many), stream)
    text = stream.getvalue()
    assert "\x1b" not in text
    assert "…" not in text
    assert "causal [lm] 4" in text  # not taken for mark-up
    rows = text.splitlines()[: len(totals_table(many).rows)]
    assert len({len(row) for row in rows}) == 1
    assert f"{_row(totals_table(many), 'total').cells[0]:+.6f}" in text
    assert "tolerance not met" in text
