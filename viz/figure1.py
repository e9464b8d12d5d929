"""The paper's Figure 1: which layers and components lowered the loss, and by how much (Vázquez et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from viz import select, style, wording
from viz.panels import ATTENTION, Panel, bars, feed_forward

COLOURS = {"encoder": style.BLUE, "decoder": style.ORANGE, "cross": style.GREEN}
# Stacks of other names, in the order in which they come.
OTHER_COLOURS = (style.PURPLE, style.SKY_BLUE, style.VERMILION, style.GREY)
LEGEND = {"cross": "decoder cross-attention"}

LEFT = 0.71  # room for the y label and its tick labels
Y_LABEL = 0.29  # its lower edge, from the axis
GAP = 0.07
APART = 0.7  # between attention and feed-forward: the second y axis stands here
WIDER = 1.4  # an attention panel against one of feed-forward: it has cross-attention too
HEAD = 0.54  # title and legend
ROW_HEAD = 0.35  # the run's name and the panels' titles, without the lines of its account
ROW = 1.2
ROW_FOOT = 0.48  # group labels and x label
BAR_WIDTH = 0.82
BETWEEN_GROUPS = 1.3
GROUP_LABEL = 5.5


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
    panels = ATTENTION, feed_forward(cells.values())
    arranged = {label: (bars(cell, panels[0]), bars(cell, panels[1])) for label, cell in cells.items()}
    colours = _colours([str(group) for pair in arranged.values() for half in pair for group in half["group"].values])
    usable = style.PAGE_WIDTH - 2 * style.MARGIN
    accounts = {
        label: style.wrapped(_account(select.totals(cube, data), arranged[label]), usable)
        for label, cube in rows.items()
    }
    caption = style.wrapped(_caption(data, [str(cube.attrs["path"]) for cube in rows.values()]), usable)
    row_head = ROW_HEAD + style.LINE * max(map(len, accounts.values()))
    row_height = row_head + ROW + ROW_FOOT
    with style.styled():
        figure = style.blank(HEAD + len(rows) * row_height + style.LINE * len(caption) + style.MARGIN)
        handles = [Patch(color=colour, label=LEGEND.get(group, group)) for group, colour in colours.items()]
        style.head(figure, f"LCA summed over steps, loss data: {data}", handles)
        for number, (label, cube) in enumerate(rows.items()):
            top = HEAD + number * row_height
            style.write(figure, style.MARGIN, top, style.shortened(label, usable), weight="bold", fontsize=7)
            style.write(figure, style.MARGIN, top + style.LINE, "\n".join(accounts[label]), color=style.GREY)
            _row(figure, top + row_head, cube, panels, arranged[label], colours)
        style.foot(figure, caption)
    return figure


def _caption(data: str, paths: Sequence[str]) -> str:
    sentences = (
        f"{wording.SIGN} The loss is {wording.meaning(data)}. Each bar is one layer's weights and biases of the "
        "component, from the lowest layer on the left; the number beside a component is the sum of its bars, in nats. "
        "Embeddings, positions, norms and the output layer stand in the table: their scale is another."
    )
    return " ".join((sentences, *wording.of_paths(paths)))


def _account(totals: select.Totals, halves: tuple[xr.DataArray, xr.DataArray]) -> str:
    shown = sum(float(half.sum()) for half in halves)
    return (
        f"{wording.path(totals)}; {wording.steps(totals)}; bars: {wording.number(shown)} of "
        f"{wording.number(totals.total)} {totals.units} in all"
    )


def _colours(groups: Sequence[str]) -> dict[str, str]:
    known = {group: colour for group, colour in COLOURS.items() if group in groups}
    others = [group for group in dict.fromkeys(groups) if group not in COLOURS]
    return known | {group: OTHER_COLOURS[i % len(OTHER_COLOURS)] for i, group in enumerate(others)}


def _row(
    figure: Figure,
    top: float,
    cube: xr.Dataset,
    panels: tuple[Sequence[Panel], Sequence[Panel]],
    halves: tuple[xr.DataArray, xr.DataArray],
    colours: Mapping[str, str],
) -> None:
    attention, feed_forward = map(len, panels)
    gaps = (attention + feed_forward - 2) * GAP
    narrow = (style.PAGE_WIDTH - LEFT - APART - style.MARGIN - gaps) / (WIDER * attention + feed_forward)
    left = LEFT
    for half, titles, width in zip(halves, panels, (WIDER * narrow, narrow), strict=True):
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
                axes.set_ylabel(style.axis_label(half.attrs, exponent=exponent), va="bottom")
                axes.yaxis.set_label_coords(-Y_LABEL / width, 0.5)
            else:
                axes.tick_params(axis="y", labelleft=False, length=0)
                axes.spines["left"].set_visible(False)
        left += APART - GAP


def _panel(axes: Axes, half: xr.DataArray, panel: Panel, colours: Mapping[str, str]) -> None:
    heights = half.sel(panel=panel.title).to_numpy()
    empty = np.isnan(heights).all()
    # Panels share a scale, on which a small component is a line: its sum says what the eye can't see.
    axes.set_title(panel.title if empty else f"{panel.title}  {wording.number(float(np.nansum(heights)), 2)}", pad=3)
    axes.grid(visible=True, axis="y")
    axes.spines["bottom"].set_visible(False)
    axes.axhline(0, color=style.BLACK, linewidth=0.6, zorder=3)
    groups = half["group"].to_numpy()
    names = list(dict.fromkeys(groups))
    places = np.arange(len(groups)) + BETWEEN_GROUPS * np.array([names.index(group) for group in groups])
    axes.set_xlim(-0.8, (places[-1] if len(places) else 0) + 0.8)
    ticks, labels = [], []
    for name in names:
        inside = groups == name
        drawn = inside & ~np.isnan(heights)
        axes.bar(places[drawn], heights[drawn], width=BAR_WIDTH, color=colours[name], label=name)
        ticks.append(float(places[inside].mean()))
        labels.append(_group_label(name, half["depth"].to_numpy()[inside]))
    axes.set_xticks(ticks, labels)
    axes.tick_params(axis="x", length=0, labelsize=GROUP_LABEL)
    if empty:
        axes.text(0.5, 0.5, "no parameters", transform=axes.transAxes, ha="center", va="center", color=style.GREY)


def _group_label(name: str, depths: npt.NDArray[np.int64]) -> str:
    if depths.min() < 0:
        return name
    return f"{name}\n{depths.min()}\N{EN DASH}{depths.max()}" if len(depths) > 1 else f"{name}\n{depths[0]}"
