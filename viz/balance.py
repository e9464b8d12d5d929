"""Do the books balance? What was allocated at every step, against what was measured, against the tolerance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import CARETUPBASE
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from viz import select, style, wording

LEFT = 0.62
RIGHT = 0.12  # half of the last tick label
Y_LABEL = 0.36  # its lower edge, from the axis
APART = 0.68
TOP = 0.56  # title and legend
ABOVE = 1.0
BETWEEN = 0.13
BENEATH = 0.75
FOOT = 0.46
ACROSS = 3  # loss data side by side; further ones go on in the next row
MANY = 5000  # dots: beyond this many a vector file is slow to open, so they become an image inside it

MEASURED: dict[str, Any] = {"color": style.GREY, "linewidth": 0.8}
ALLOCATED: dict[str, Any] = {"color": style.BLUE, "marker": "o", "linestyle": "none"}
BEYOND: dict[str, Any] = {"color": style.VERMILION, "marker": "X", "markersize": 4.5, "linestyle": "none"}
ZERO: dict[str, Any] = {"color": style.BLUE, "marker": CARETUPBASE, "markersize": 4.5, "linestyle": "none"}
NOT_FINITE: dict[str, Any] = {
    "color": style.BLACK,
    "marker": "x",
    "markersize": 4,
    "markeredgewidth": 0.9,
    "linestyle": "none",
}
TOLERANCE: dict[str, Any] = {"color": style.ORANGE, "linewidth": 1.0}

TITLE = "Do the books balance? Σ LCA against the measured change of the loss"


def plot_balance(cubes: Mapping[str, xr.Dataset]) -> Figure:
    """Draw Σ LCA over the measured ΔL and, beneath, the residual against its tolerance, step by step.

    Parameters
    ----------
    cubes
        Cubes by run label.

    Returns
    -------
    matplotlib.figure.Figure
        Of one page width: a row for every run, a column for every loss data that any run has, in nats. Steps
        beyond the tolerance are red crosses. A residual of exactly 0 stands on the lower edge of its log axis.
    """
    names = select.loss_data(cubes)
    columns = min(ACROSS, max(1, len(names)))
    width = (style.PAGE_WIDTH - LEFT - RIGHT - (columns - 1) * APART) / columns
    books = {
        (label, data): select.balance(cube, data)
        for label, cube in cubes.items()
        for data in names
        if data in cube["data"].to_numpy()
    }
    heads = {key: style.wrapped(_head(cubes[key[0]], key[1], book), width) for key, book in books.items()}
    rows = [
        [(label, data) for data in names[start : start + ACROSS]]
        for label in cubes
        for start in range(0, len(names), ACROSS)
    ]
    head_heights = [style.LINE * (1 + max((len(heads.get(key, ())) for key in row), default=0)) + 0.08 for row in rows]
    caption = style.wrapped(
        _caption(list(books.values()), [str(cube.attrs["path"]) for cube in cubes.values()]),
        style.PAGE_WIDTH - 2 * style.MARGIN,
    )
    below_head = ABOVE + BETWEEN + BENEATH + FOOT
    height = TOP + sum(head_heights) + below_head * len(rows) + style.LINE * len(caption) + style.MARGIN
    with style.styled():
        figure = style.blank(height)
        style.head(figure, TITLE, _legend(list(books.values())))
        top = TOP
        for row, head_height in zip(rows, head_heights, strict=True):
            for column, key in enumerate(row):
                if key in books:
                    left = LEFT + column * (width + APART)
                    title = f"{style.shortened(key[0], width - 0.1 * len(key[1]))}, {key[1]}"
                    style.write(figure, left, top, title, weight="bold", fontsize=7)
                    style.write(figure, left, top + style.LINE, "\n".join(heads[key]), color=style.GREY)
                    _books(figure, left, top + head_height, width, books[key])
            top += head_height + below_head
        style.foot(figure, caption)
    return figure


def _books(figure: Figure, left: float, top: float, width: float, book: xr.Dataset) -> None:
    above = style.place(figure, (left, top, width, ABOVE))
    _changes(above, book)
    beneath = style.place(figure, (left, top + ABOVE + BETWEEN, width, BENEATH), sharex=above)
    _residuals(beneath, book)
    beneath.set_xlabel(style.axis_label(book["step"].attrs, width=60))


def _head(cube: xr.Dataset, data: str, book: xr.Dataset) -> str:
    totals = select.totals(cube, data)
    rtol, atol = select.asked_tolerance(cube, data)
    parts = [f"{wording.power(rtol)}·|ΔL|"] if rtol > 0 else []
    parts += [f"{wording.power(atol)} {totals.units}"] if atol > 0 else []
    tolerance = " + ".join([*parts, "rounding"])
    return (
        f"{wording.steps(totals)}; {wording.path(totals)}; tolerance {tolerance}, beyond it: "
        f"{int(book['beyond'].sum()):,}"
    )


def _caption(books: Sequence[xr.Dataset], paths: Sequence[str]) -> str:
    sentences = [
        "Above: LCA summed over all parameters (dots) must follow ΔL, the measured change of the loss (line).",
        "Beneath: |residual| = |Σ LCA \N{MINUS SIGN} ΔL| against the tolerance.",
    ]
    if _any(books, "residual", 0):
        sentences.append(
            "A residual of exactly 0, as where the learning rate is 0 and nothing moves, has no logarithm and stands "
            "on the lower edge."
        )
    if _any(books, "status", "not_finite"):
        sentences.append("A step whose loss or gradient was not finite is marked on the upper edge.")
    if _any(books, "status", "not_checked"):
        sentences.append("Steps whose losses were not measured have a dot above and nothing beneath.")
    if _any(books, "status", "missing"):
        sentences.append("Steps that were not replayed leave a gap.")
    return " ".join((*sentences, *wording.of_paths(paths)))


def _any(books: Sequence[xr.Dataset], name: str, value: object) -> bool:
    return any(value in book[name].to_numpy() for book in books)


def _legend(books: Sequence[xr.Dataset]) -> list[Line2D]:
    handles = [
        Line2D([], [], **MEASURED, label="measured ΔL"),
        Line2D([], [], **ALLOCATED, label="Σ LCA, |residual|"),
        Line2D([], [], **TOLERANCE, label="tolerance"),
    ]
    if _any(books, "beyond", True):
        handles.append(Line2D([], [], **BEYOND, label="beyond tolerance"))
    if _any(books, "residual", 0):
        handles.append(Line2D([], [], **ZERO, label="residual exactly 0"))
    if _any(books, "status", "not_finite"):
        handles.append(Line2D([], [], **NOT_FINITE, label="not finite"))
    return handles


def _changes(axes: Axes, book: xr.Dataset) -> None:
    step, beyond = book["step"].to_numpy(), book["beyond"].to_numpy()
    many = len(step) > MANY
    axes.grid(visible=True, axis="y")
    axes.axhline(0, color=style.BLACK, linewidth=0.4)
    axes.plot(step, book["measured"], **MEASURED, label="measured", rasterized=many)
    allocated = book["allocated"].to_numpy()
    axes.plot(step[~beyond], allocated[~beyond], **_dots(step), label="allocated", rasterized=many)
    _mark(axes, step[beyond], allocated[beyond], BEYOND, "beyond")
    shown = np.concatenate([allocated, book["measured"].to_numpy()])
    exponent = style.scaled_ticks(axes, float(np.nanmax(np.abs(shown), initial=0.0)))
    units = book["measured"].attrs["units"]
    _label(axes, style.axis_label({"long_name": "change of the loss", "units": units}, exponent=exponent, width=18))
    axes.tick_params(axis="x", labelbottom=False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if step.size:
        air = 0.02 * max(1, int(step[-1] - step[0]))
        axes.set_xlim(step[0] - air, step[-1] + air)


def _residuals(axes: Axes, book: xr.Dataset) -> None:
    step, beyond = book["step"].to_numpy(), book["beyond"].to_numpy()
    size, allowed = np.abs(book["residual"].to_numpy()), book["tolerance"].to_numpy()
    many = len(step) > MANY
    floor, ceiling = _decades(np.concatenate([size, allowed]))
    axes.set_yscale("log")
    axes.set_ylim(floor, ceiling)
    axes.grid(visible=True, axis="y")
    axes.plot(step, allowed, **TOLERANCE, drawstyle="steps-mid", label="tolerance", rasterized=many)
    within = ~beyond & (size > 0)
    axes.plot(step[within], size[within], **_dots(step), label="residual", rasterized=many)
    # A logarithm has no place for 0: the lower edge stands for it, with a mark of its own.
    zero = ~beyond & (size == 0)
    _mark(axes, step[zero], np.full(zero.sum(), floor), ZERO, "zero")
    _mark(axes, step[beyond], np.maximum(size[beyond], floor), BEYOND, "beyond")
    lost = (book["status"] == "not_finite").to_numpy()
    _mark(axes, step[lost], np.full(lost.sum(), ceiling), NOT_FINITE, "not finite")
    axes.yaxis.set_major_locator(LogLocator(numticks=5))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="y", which="minor", left=False)
    units = book["residual"].attrs["units"]
    _label(axes, style.axis_label({"long_name": "|residual|", "units": units}, width=14))


def _dots(step: npt.NDArray[np.int64]) -> dict[str, Any]:
    # Smaller where there are many, or a long run would be one blot that hides the line under it.
    size = 2.2 * min(1.0, math.sqrt(400 / max(1, len(step))))
    return {**ALLOCATED, "markersize": max(0.5, size)}


def _mark(
    axes: Axes,
    step: npt.NDArray[np.int64],
    amounts: npt.NDArray[np.float64],
    look: Mapping[str, Any],
    label: str,
) -> None:
    # Marks may stand on an edge of the axes, so they are not clipped; an empty line would have no place at all.
    if step.size:
        axes.plot(step, amounts, **look, clip_on=False, zorder=4, label=label, rasterized=len(step) > MANY)


def _label(axes: Axes, label: str) -> None:
    # The two labels of a pair stand on one line, whatever the width of the tick labels.
    axes.set_ylabel(label, va="bottom")
    inches = axes.get_position().width * style.PAGE_WIDTH
    axes.yaxis.set_label_coords(-Y_LABEL / inches, 0.5)


def _decades(amounts: npt.NDArray[np.float64]) -> tuple[float, float]:
    positive = amounts[np.isfinite(amounts) & (amounts > 0)]
    if not positive.size:
        return 1e-6, 1.0
    # A decade of air beneath: what stands on the lower edge is not to be read as the smallest residual.
    return 10.0 ** (np.floor(np.log10(positive.min())) - 1), 10.0 ** np.ceil(np.log10(positive.max()) + 0.1)
