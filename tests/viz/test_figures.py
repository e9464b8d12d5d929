"""What is drawn is what was selected: read back from the artists, not from pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from recorder.errors import UsageError
from viz import select, style
from viz.figures import plot_balance, plot_figure1
from viz.panels import ATTENTION, FEED_FORWARD, bars
from viz.saving import FORMATS, save_figure
from viz.table import totals_table

MakeCube = Callable[..., xr.Dataset]
SHAPES = ["encoder-decoder", "decoder-only", "encoder-only"]
PANELS = [panel.title for panel in (*ATTENTION, *FEED_FORWARD)]


def _heights(axes: Axes) -> dict[str, list[float]]:
    found = {}
    for container in axes.containers:
        rectangles = [patch for patch in container.get_children() if isinstance(patch, Rectangle)]
        found[str(container.get_label())] = [patch.get_height() for patch in rectangles]
    return found


def _text(figure: Figure) -> str:
    return " ".join(" ".join(text.get_text() for text in figure.texts).split())


def _line(axes: Axes, label: str) -> tuple[list[float], list[float]]:
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()


@pytest.mark.parametrize("data", ["batch", "probe"])
def test_heights_of_bars_are_the_selected_numbers(make_cube: MakeCube, data: str) -> None:
    cubes = {shape: make_cube(shape, seed=seed) for seed, shape in enumerate(SHAPES)}
    figure = plot_figure1(cubes, data=data)
    assert [axes.get_title().split()[0] for axes in figure.axes] == PANELS * 3
    for row, cube in enumerate(cubes.values()):
        cells = select.summed_over_steps(cube, data)
        expected = [
            bars(cells, panels).sel(panel=panel.title) for panels in (ATTENTION, FEED_FORWARD) for panel in panels
        ]
        for axes, numbers in zip(figure.axes[6 * row : 6 * row + 6], expected, strict=True):
            groups = numbers["group"].values
            title = axes.get_title().replace("\N{MINUS SIGN}", "-").split()
            assert float(title[1]) == pytest.approx(float(numbers.sum()), rel=0.05)
            assert _heights(axes) == {name: numbers.values[groups == name].tolist() for name in dict.fromkeys(groups)}


def test_panels_of_a_half_share_their_y_axis_and_the_halves_do_not(make_cube: MakeCube) -> None:
    axes = plot_figure1({"run": make_cube()}, data="batch").axes
    limits = [one.get_ylim() for one in axes]
    assert len(set(limits[:4])) == 1
    assert len(set(limits[4:])) == 1
    assert limits[0] != limits[4]
    apart = axes[4].get_position().x0 - axes[3].get_position().x1
    assert apart > 4 * (axes[1].get_position().x0 - axes[0].get_position().x1)


def test_a_cell_without_parameters_draws_nothing(make_cube: MakeCube) -> None:
    cube = make_cube("encoder-only")
    cube["lca"].loc[{"layer": "encoder.4", "component": "value"}] = np.nan
    cube["n_parameters"].loc[{"layer": "encoder.4", "component": "value"}] = 0
    cube["lca"].loc[{"component": "out"}] = np.nan
    cube["n_parameters"].loc[{"component": "out"}] = 0
    key, _, value, out, *_ = plot_figure1({"run": cube}, data="batch").axes
    assert len(_heights(key)["encoder"]) == 12
    assert len(_heights(value)["encoder"]) == 11
    assert 0.0 not in _heights(value)["encoder"]
    assert _heights(out) == {"encoder": []}
    assert [text.get_text() for text in out.texts] == ["no parameters"]


def test_groups_are_labelled_and_coloured(make_cube: MakeCube) -> None:
    figure = plot_figure1({"run": make_cube()}, data="batch")
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels == ["encoder\n0–5", "decoder\n0–5", "cross\n0–5"]  # noqa: RUF001
    assert [label.get_text() for label in figure.legends[0].get_texts()] == [
        "encoder",
        "decoder",
        "decoder cross-attention",
    ]
    patches = [container.get_children()[0] for container in figure.axes[0].containers]
    colours = [patch.get_facecolor() for patch in patches if isinstance(patch, Rectangle)]
    for found, expected in zip(colours, (style.BLUE, style.ORANGE, style.GREEN), strict=True):
        assert same_color(found, expected)


@pytest.mark.parametrize("units", ["nat", "bit"])
def test_every_axis_is_labelled_with_the_units_of_the_data(make_cube: MakeCube, units: str) -> None:
    cube = make_cube()
    for name in ("lca", "loss_start", "loss_end", "residual"):
        cube[name].attrs["units"] = units
    figure = plot_figure1({"run": cube}, data="batch")
    for axes in (figure.axes[0], figure.axes[4]):
        assert " ".join(axes.get_ylabel().split()) == (
            f"loss change allocation, summed over steps [$10^{{-3}}$ {units}]"
        )
    assert {axes.get_xlabel() for axes in figure.axes} == {"layer"}
    above, beneath = plot_balance({"run": cube.sel(data=["batch"])}).axes
    assert above.get_ylabel().endswith(f"{units}]")
    assert beneath.get_ylabel() == f"|residual|\n[{units}]"
    assert beneath.get_xlabel() == "optimizer step"


def test_caption_says_what_decides_the_meaning_of_a_number(make_cube: MakeCube) -> None:
    cubes = {"a": make_cube(), "b": make_cube("decoder-only", path="chord")}
    text = _text(plot_figure1(cubes, data="batch"))
    assert "loss data: batch" in text
    assert "measured on each update's own batch" in text
    assert text.count("Negative: this part lowered the loss.") == 1
    assert "path recorded; 40 steps, all converged" in text
    assert "path chord (straight between checkpoints); 40 intervals, all converged" in text
    assert "measured on a fixed probe set" in _text(plot_figure1(cubes, data="probe"))
    named = _text(plot_figure1({"a": make_cube(data=("news",))}, data="news"))
    assert "the examples that the user named news" in named


def test_recorded_runs_and_chords_side_by_side_come_with_a_warning(make_cube: MakeCube) -> None:
    recorded, chord = make_cube(), make_cube(path="chord")
    warning = "Runs of path recorded and of path chord stand side by side: their totals compare"
    interval = "Of a run of path chord a step is the interval between two checkpoints"

    def texts(cubes: dict[str, xr.Dataset]) -> list[str]:
        # The notes of the table, and what both figures say, without their line breaks.
        figures = (plot_figure1(cubes, data="batch"), plot_balance(cubes))
        drawn = [" ".join(_text(figure).split()) for figure in figures]
        return [" ".join(totals_table(cubes).notes), *drawn]

    for text in texts({"a": recorded, "b": chord}):
        assert warning in text
        assert interval in text
    for text in texts({"a": chord, "b": chord}):
        assert warning not in text
        assert interval in text
    for text in texts({"a": recorded}):
        assert warning not in text
        assert interval not in text


def test_figure1_has_a_panel_for_gates_where_a_run_has_any(make_cube: MakeCube) -> None:
    plain = make_cube()
    gated = plain.copy(deep=True)
    gated = gated.assign_coords(component=["gate" if name == "other" else name for name in gated["component"].values])
    layers = [layer for layer in gated["layer"].values if layer != "model"]
    gated["lca"].loc[{"layer": layers, "component": "gate"}] = -1e-3
    gated["n_parameters"].loc[{"layer": layers, "component": "gate"}] = 64
    figure = plot_figure1({"plain": plain, "gated": gated}, data="batch")
    titles = [axes.get_title().split("  ")[0] for axes in figure.axes]
    assert titles == ["key", "query", "value", "out", "gate", "W1", "W2"] * 2
    of_gate = figure.axes[4 + 7]
    heights = [bar.get_height() for bar in of_gate.patches if isinstance(bar, Rectangle)]
    steps = int((gated["status"].sel(data="batch") <= 1).sum())
    assert heights == pytest.approx([-1e-3 * steps] * len(layers))
    assert "no parameters" in [text.get_text() for text in figure.axes[4].texts]
    assert [axes.get_title().split("  ")[0] for axes in plot_figure1({"plain": plain}, data="batch").axes] == PANELS


def test_figure1_names_the_steps_that_missed(make_cube: MakeCube) -> None:
    cube = make_cube(status={("batch", 2): "tolerance_not_met", ("batch", 8): "missing"})
    expected = "40 steps: 38 converged, 1 tolerance not met, 1 missing (left out)"
    assert expected in _text(plot_figure1({"run": cube}, data="batch"))
    assert expected in _text(plot_balance({"run": cube}))


def test_figure1_of_unknown_loss_data(make_cube: MakeCube) -> None:
    with pytest.raises(UsageError, match="found 'valid'"):
        plot_figure1({"run": make_cube()}, data="valid")


def test_balance_draws_the_selected_numbers(make_cube: MakeCube) -> None:
    cube = make_cube(status={("probe", 3): "tolerance_not_met", ("probe", 6): "not_finite"})
    figure = plot_balance({"run": cube})
    assert len(figure.axes) == 4  # two loss data, two axes each
    above, beneath = figure.axes[2:]
    books = select.balance(cube, "probe")
    within = ~books["beyond"].values
    np.testing.assert_array_equal(_line(above, "measured")[1], books["measured"])
    np.testing.assert_array_equal(_line(above, "allocated")[1], books["allocated"].values[within])
    np.testing.assert_array_equal(_line(beneath, "tolerance")[1], books["tolerance"])
    shown = within & (np.abs(books["residual"].values) > 0)
    np.testing.assert_array_equal(_line(beneath, "residual")[1], np.abs(books["residual"].values[shown]))


def test_a_step_beyond_the_tolerance_is_marked_red_above_and_beneath(make_cube: MakeCube) -> None:
    cube = make_cube(data=("batch",), status={("batch", 3): "tolerance_not_met"})
    figure = plot_balance({"run": cube})
    above, beneath = figure.axes
    assert _line(above, "beyond")[0] == [3]
    assert _line(beneath, "beyond") == ([3], [0.05])
    for axes in (above, beneath):
        (line,) = [line for line in axes.lines if line.get_label() == "beyond"]
        assert same_color(line.get_color(), style.VERMILION)
    assert "beyond it: 1" in _text(figure)
    assert "beyond tolerance" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_residual_of_zero_stands_on_the_lower_edge_and_the_caption_says_so(make_cube: MakeCube) -> None:
    figure = plot_balance({"run": make_cube(data=("batch",))})
    beneath = figure.axes[1]
    floor = beneath.get_ylim()[0]
    assert beneath.get_yscale() == "log"
    assert _line(beneath, "zero") == ([0], [floor])
    assert min(_line(beneath, "residual")[1]) > 5 * floor
    assert "stands on the lower edge" in _text(figure)
    moving = plot_balance({"run": make_cube(data=("batch",), first_step_still=False)})
    assert "lower edge" not in _text(moving)


def test_a_step_that_is_not_finite_is_marked_on_the_upper_edge(make_cube: MakeCube) -> None:
    figure = plot_balance({"run": make_cube(data=("batch",), status={("batch", 4): "not_finite"})})
    assert _line(figure.axes[1], "not finite") == ([4], [figure.axes[1].get_ylim()[1]])
    assert "marked on the upper edge" in _text(figure)


@pytest.mark.parametrize("status", ["missing", "not_finite", "not_checked"])
def test_a_run_without_one_step_that_counts_can_be_drawn(make_cube: MakeCube, status: str, tmp_path: Path) -> None:
    cube = make_cube(steps=1, data=("batch",), status={("batch", 0): status})
    save_figure(plot_figure1({"run": cube}, data="batch"), tmp_path / "a.png", "png")
    save_figure(plot_balance({"run": cube}), tmp_path / "b.png", "png")


def test_runs_with_different_loss_data_stand_in_the_columns_of_their_data(make_cube: MakeCube) -> None:
    cubes = {"a": make_cube(data=("batch", "probe")), "b": make_cube(data=("probe",))}
    axes = plot_balance(cubes).axes
    assert len(axes) == 6
    assert axes[4].get_position().x0 == axes[2].get_position().x0
    assert [one.get_title().split()[0] for one in plot_figure1(cubes, data="batch").axes] == PANELS


def test_text_stays_inside_the_page_and_off_other_text(make_cube: MakeCube) -> None:
    long = "a-run-with-a-very-long-name-" * 4
    status = {("batch", 3): "tolerance_not_met", ("batch", 4): "not_finite", ("batch", 5): "missing"}
    cubes = {long: make_cube(data=("batch", "probe", "valid"), status=status, path="chord"), "b": make_cube()}
    for figure in (plot_figure1(cubes, data="batch"), plot_balance(cubes)):
        with style.styled():
            figure.canvas.draw()
            boxes = [text.get_window_extent() for text in (*figure.texts, *figure.legends)]
            boxes += [box for axes in figure.axes if (box := axes.get_tightbbox()) is not None]
        for box in boxes:
            assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
            assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
        overlaps = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.shrunk(0.98, 0.9).overlaps(b)]
        assert not overlaps


def test_a_dollar_in_a_label_stands_for_itself(make_cube: MakeCube, tmp_path: Path) -> None:
    cubes = {"cost $5 and $6_x^": make_cube()}
    save_figure(plot_figure1(cubes, data="batch"), tmp_path / "a.png", "png")
    save_figure(plot_balance(cubes), tmp_path / "b.png", "png")


@pytest.mark.parametrize("kind", FORMATS)
def test_same_input_gives_the_same_bytes(make_cube: MakeCube, tmp_path: Path, kind: str) -> None:
    cube = make_cube(status={("batch", 3): "tolerance_not_met"})
    draws: dict[str, Callable[[], Figure]] = {
        "figure1": lambda: plot_figure1({"run": cube}, data="batch"),
        "balance": lambda: plot_balance({"run": cube}),
    }
    for name, draw in draws.items():
        save_figure(draw(), tmp_path / f"{name}-1", kind)
        again = draw()
        # What was saved before in another format, and what the user has set, leaves no trace.
        save_figure(again, tmp_path / "other", "png" if kind != "png" else "svg")
        with mpl.rc_context({"font.size": 20, "savefig.dpi": 30, "svg.hashsalt": "mine"}):
            save_figure(again, tmp_path / f"{name}-2", kind)
        assert (tmp_path / f"{name}-1").read_bytes() == (tmp_path / f"{name}-2").read_bytes()


def test_drawing_leaves_the_users_settings_and_pyplot_alone(make_cube: MakeCube) -> None:
    with mpl.rc_context({"font.size": 20}):
        before = dict(mpl.rcParams)
        plot_figure1({"run": make_cube()}, data="batch")
        assert dict(mpl.rcParams) == before


def test_many_dots_become_an_image_inside_a_vector_file(make_cube: MakeCube, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("viz.balance.MANY", 10)
    (line,) = [line for line in plot_balance({"run": make_cube()}).axes[0].lines if line.get_label() == "allocated"]
    assert line.get_rasterized()


def test_dots_of_a_long_run_are_smaller(make_cube: MakeCube) -> None:
    sizes = []
    for steps in (10, 1000):
        axes = plot_balance({"run": make_cube(steps=steps)}).axes[0]
        sizes += [line.get_markersize() for line in axes.lines if line.get_label() == "allocated"]
    assert sizes[1] < 0.7 * sizes[0]
