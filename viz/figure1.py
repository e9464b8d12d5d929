"""The paper's Figure 1: which layers and components lowered the loss, and by how much (Vázquez et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from viz import select, style, wording
from viz.panels import ATTENTION, FEED_FORWARD, Panel, bars

COLOURS = {"encoder": style.BLUE, "decoder": style.ORANGE, "cross": style.GREEN}
# Stacks of other names, in the order in which they come.
OTHER_COLOURS = (style.PURPLE, style.SKY_BLUE, style.VERMILION, style.GREY)
LEGEND = {"cross": "decoder cross-attention"}

LEFT = 0.62  # room for the y label and its tick labels
GAP = 0.09
APART = 0.66  # between attention and feed-forward: the second y axis stands here
HEAD = 0.42  # title and legend
ROW_HEAD = 0.36  # the run's name and the panels' titles
ROW = 1.2
ROW_FOOT = 0.5  # group labels and x label
BAR_WIDTH = 0.82
NO_ROOM_FOR_NAMES = 34  # characters of a run's label beside the account of its steps


def plot_figure1(cubes: Mapping[str, xr.Dataset], *, data: str) -> Figure:
    """Draw LCA summed over steps, a bar for every layer, a panel for every component, a row for every run.

    Parameters
    ----------
    cubes
        Cubes by run label; those without `data` get no row.
    data
        Name of the loss data, such as ``batch`` or ``probe``.

    Returns
    -------
    matplotlib.figure.Figure
        Of one page width. Heights are those of `viz.panels.bars`, in nats; a layer without the component has no
        bar. Attention and feed-forward have a y axis each, shared by the panels of a run.

    References
    ----------
    Vázquez et al., COLING 2022, Figure 1.
    """
    rows = select.cubes_with(cubes, data)
    cells = {label: select.summed_over_steps(cube, data) for label, cube in rows.items()}
    arranged = {label: (bars(cell, ATTENTION), bars(cell, FEED_FORWARD)) for label, cell in cells.items()}
    colours = _colours([str(group) for pair in arranged.values() for half in pair for group in half["group"].values])
    caption = style.wrapped(_caption(data), style.PAGE_WIDTH - 2 * style.MARGIN)
    height = HEAD + len(rows) * (ROW_HEAD + ROW + ROW_FOOT) + style.LINE * len(caption) + style.MARGIN
    with style.styled():
        figure = style.blank(height)
        style.write(
            figure, style.MARGIN, 0.05, f"LCA summed over steps, loss data: {data}", fontsize=style.LARGE, weight="bold"
        )
        figure.legend(
            handles=[Patch(color=colour, label=LEGEND.get(group, group)) for group, colour in colours.items()],
            loc="upper right",
            bbox_to_anchor=(1 - style.MARGIN / style.PAGE_WIDTH, 1 - 0.03 / height),
            ncols=len(colours) or 1,
            borderpad=0,
            borderaxespad=0,
        )
        for number, (label, cube) in enumerate(rows.items()):
            top = HEAD + number * (ROW_HEAD + ROW + ROW_FOOT)
            attention, feed_forward = arranged[label]
            account = _account(select.totals(cube, data), attention, feed_forward)
            _head(figure, top, label, account)
            _row(figure, top + ROW_HEAD, cube, (attention, feed_forward), colours)
        style.write(figure, style.MARGIN, height - style.MARGIN - style.LINE * len(caption), "\n".join(caption))
    return figure


def _caption(data: str) -> str:
    return (
        f"{wording.SIGN} The loss is {wording.meaning(data)}. Each bar is one layer's weights and biases of the "
        "component, from the lowest layer on the left. Embeddings, positions, norms and the output layer stand in "
        "the table: their scale is another."
    )


def _account(totals: select.Totals, *halves: xr.DataArray) -> str:
    shown = sum(float(half.sum()) for half in halves)
    return (
        f"{wording.path(totals)}; {wording.steps(totals)}; bars: {wording.nats(shown, totals.units)} of "
        f"{wording.nats(totals.total, totals.units)}"
    )


def _colours(groups: Sequence[str]) -> dict[str, str]:
    known = {group: colour for group, colour in COLOURS.items() if group in groups}
    others = [group for group in dict.fromkeys(groups) if group not in COLOURS]
    return known | {group: OTHER_COLOURS[i % len(OTHER_COLOURS)] for i, group in enumerate(others)}


def _head(figure: Figure, top: float, label: str, account: str) -> None:
    short = label if len(label) <= NO_ROOM_FOR_NAMES else f"{label[: NO_ROOM_FOR_NAMES - 1]}…"
    style.write(figure, style.MARGIN, top, short, weight="bold", fontsize=7.5)
    style.write(figure, style.PAGE_WIDTH - style.MARGIN, top + 0.01, account, ha="right", color=style.GREY)


def _row(
    figure: Figure,
    top: float,
    cube: xr.Dataset,
    halves: tuple[xr.DataArray, xr.DataArray],
    colours: Mapping[str, str],
) -> None:
    panels = len(ATTENTION) + len(FEED_FORWARD)
    width = (style.PAGE_WIDTH - LEFT - APART - style.MARGIN - (panels - 2) * GAP) / panels
    left = LEFT
    for half, titles in zip(halves, (ATTENTION, FEED_FORWARD), strict=True):
        first: Axes | None = None
        for panel in titles:
            axes = style.place(figure, (left, top, width, ROW), sharey=first)
            left += width + GAP
            _panel(axes, half, panel, colours)
            axes.set_xlabel(style.axis_label(cube["layer"].attrs))
            if first is None:
                first = axes
                largest = float(np.nanmax(np.abs(half.values))) if half.size else 0.0
                exponent = style.scaled_ticks(axes, largest)
                axes.set_ylabel(style.axis_label(half.attrs, exponent=exponent))
            else:
                axes.tick_params(axis="y", labelleft=False, length=0)
                axes.spines["left"].set_visible(False)
        left += APART - GAP


def _panel(axes: Axes, half: xr.DataArray, panel: Panel, colours: Mapping[str, str]) -> None:
    axes.set_title(panel.title, pad=3)
    axes.grid(visible=True, axis="y")
    axes.spines["bottom"].set_visible(False)
    axes.axhline(0, color=style.BLACK, linewidth=0.6, zorder=3)
    heights = half.sel(panel=panel.title).to_numpy()
    groups = half["group"].to_numpy()
    names = list(dict.fromkeys(groups))
    # A bar's place: its rank, and one place left free before every further group.
    places = np.arange(len(groups)) + np.array([names.index(group) for group in groups], dtype=float)
    axes.set_xlim(-0.8, (places[-1] if len(places) else 0) + 0.8)
    ticks, labels = [], []
    for name in names:
        inside = groups == name
        drawn = inside & ~np.isnan(heights)
        axes.bar(places[drawn], heights[drawn], width=BAR_WIDTH, color=colours[name], label=name)
        ticks.append(float(places[inside].mean()))
        labels.append(_group_label(name, half["depth"].to_numpy()[inside]))
    axes.set_xticks(ticks, labels)
    axes.tick_params(axis="x", length=0)
    if np.isnan(heights).all():
        axes.text(0.5, 0.5, "no parameters", transform=axes.transAxes, ha="center", va="center", color=style.GREY)


def _group_label(name: str, depths: np.typing.NDArray[np.int64]) -> str:
    if depths.min() < 0:
        return name
    return f"{name}\n{depths.min()}\N{EN DASH}{depths.max()}" if len(depths) > 1 else f"{name}\n{depths[0]}"
