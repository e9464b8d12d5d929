"""Do the books balance? What was allocated at every step, against what was measured, against the tolerance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from viz import select, style, wording

LEFT = 0.62
APART = 0.68
TOP = 0.42  # title and legend
ABOVE = 1.0
BETWEEN = 0.07
BENEATH = 0.75
FOOT = 0.46
MANY = 5000  # dots: beyond this many a vector file is slow to open, so they become an image inside it

MEASURED = {"color": style.GREY, "linewidth": 0.8}
ALLOCATED = {"color": style.BLUE, "marker": "o", "linestyle": "none"}
BEYOND = {"color": style.VERMILION, "marker": "X", "markersize": 4.5, "linestyle": "none"}
ZERO = {"color": style.BLUE, "marker": "v", "markersize": 3.5, "linestyle": "none"}
NOT_FINITE = {"color": style.BLACK, "marker": "x", "markersize": 4, "markeredgewidth": 0.9, "linestyle": "none"}
TOLERANCE = {"color": style.ORANGE, "linewidth": 1.0}

CAPTION = (
    "Above: LCA summed over all parameters (dots) must follow the measured change of the loss, ΔL (line). Beneath: "
    "|residual| = |Σ LCA − ΔL| against the tolerance. A residual of exactly 0, as where the learning rate is 0 and "
    "nothing moves, stands on the lower edge of its logarithmic axis."
)


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
    width = (style.PAGE_WIDTH - LEFT - style.MARGIN - (len(names) - 1) * APART) / max(1, len(names))
    books = {
        (label, data): select.balance(cube, data)
        for data in names
        for label, cube in select.cubes_with(cubes, data).items()
    }
    heads = {
        (label, data): style.wrapped(_head(cubes[label], data, book), width + 0.3)
        for (label, data), book in books.items()
    }
    head = style.LINE * (1 + max(map(len, heads.values()), default=0)) + 0.06
    row = head + ABOVE + BETWEEN + BENEATH + FOOT
    caption = style.wrapped(CAPTION, style.PAGE_WIDTH - 2 * style.MARGIN)
    height = TOP + row * len(cubes) + style.LINE * len(caption) + style.MARGIN
    with style.styled():
        figure = style.blank(height)
        style.write(figure, style.MARGIN, 0.05, "Do the books balance?", fontsize=style.LARGE, weight="bold")
        _legend(figure, list(books.values()))
        for (label, data), book in books.items():
            left = LEFT + names.index(data) * (width + APART)
            top = TOP + list(cubes).index(label) * row
            style.write(figure, left, top, f"{label}, {data}", weight="bold", fontsize=7)
            style.write(figure, left, top + style.LINE, "\n".join(heads[label, data]), color=style.GREY)
            above = style.place(figure, (left, top + head, width, ABOVE))
            _changes(above, book)
            beneath = style.place(figure, (left, top + head + ABOVE + BETWEEN, width, BENEATH), sharex=above)
            _residuals(beneath, book)
            beneath.set_xlabel(style.axis_label(book["step"].attrs, width=60))
        style.write(figure, style.MARGIN, height - style.MARGIN - style.LINE * len(caption), "\n".join(caption))
    return figure


def _head(cube: xr.Dataset, data: str, book: xr.Dataset) -> str:
    totals = select.totals(cube, data)
    units = totals.units
    return (
        f"{wording.steps(totals)}; {wording.path(totals)}; tolerance "
        f"max({book.attrs['rtol']:g}·|ΔL|, {book.attrs['atol']:g} {units}), beyond it: {int(book['beyond'].sum()):,}"
    )


def _legend(figure: Figure, books: Sequence[xr.Dataset]) -> None:
    handles = [
        Line2D([], [], **MEASURED, label="measured ΔL"),
        Line2D([], [], **ALLOCATED, label="Σ LCA, |residual|"),
        Line2D([], [], **TOLERANCE, label="tolerance"),
    ]
    if any(bool(book["beyond"].any()) for book in books):
        handles.append(Line2D([], [], **BEYOND, label="beyond tolerance"))
    if any(bool((book["residual"] == 0).any()) for book in books):
        handles.append(Line2D([], [], **ZERO, label="residual exactly 0"))
    if any(bool((book["status"] == "not_finite").any()) for book in books):
        handles.append(Line2D([], [], **NOT_FINITE, label="not finite"))
    figure.legend(
        handles=handles,
        loc="upper right",
        bbox_to_anchor=(1 - style.MARGIN / style.PAGE_WIDTH, 1 - 0.05 / figure.get_size_inches()[1]),
        ncols=len(handles),
        borderpad=0,
        borderaxespad=0,
    )


def _changes(axes: Axes, book: xr.Dataset) -> None:
    step, beyond = book["step"].to_numpy(), book["beyond"].to_numpy()
    many = len(step) > MANY
    axes.grid(visible=True, axis="y")
    axes.axhline(0, color=style.BLACK, linewidth=0.4)
    axes.plot(step, book["measured"], **MEASURED, label="measured", rasterized=many)
    allocated = book["allocated"].to_numpy()
    axes.plot(step[~beyond], allocated[~beyond], **ALLOCATED, label="allocated", rasterized=many)
    axes.plot(step[beyond], allocated[beyond], **BEYOND, label="beyond")
    shown = np.concatenate([allocated, book["measured"].to_numpy()])
    exponent = style.scaled_ticks(axes, float(np.nanmax(np.abs(shown), initial=0.0)))
    units = book["measured"].attrs["units"]
    axes.set_ylabel(style.axis_label({"long_name": "change of the loss", "units": units}, exponent=exponent))
    axes.tick_params(axis="x", labelbottom=False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    span = max(1, int(step[-1] - step[0])) if len(step) else 1
    axes.set_xlim(step[0] - 0.02 * span, step[-1] + 0.02 * span)


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
    axes.plot(step[within], size[within], **ALLOCATED, label="residual", rasterized=many)
    # A logarithm has no place for 0: the lower edge stands for it, with a mark of its own.
    zero = ~beyond & (size == 0)
    axes.plot(step[zero], np.full(zero.sum(), floor), **ZERO, clip_on=False, zorder=4, label="zero")
    axes.plot(step[beyond], np.maximum(size[beyond], floor), **BEYOND, zorder=4, label="beyond")
    lost = (book["status"] == "not_finite").to_numpy()
    axes.plot(step[lost], np.full(lost.sum(), ceiling), **NOT_FINITE, clip_on=False, zorder=4, label="not finite")
    axes.yaxis.set_major_locator(LogLocator(numticks=5))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="y", which="minor", left=False)
    units = book["residual"].attrs["units"]
    axes.set_ylabel(style.axis_label({"long_name": "|residual|", "units": units}))


def _decades(amounts: np.typing.NDArray[np.float64]) -> tuple[float, float]:
    positive = amounts[np.isfinite(amounts) & (amounts > 0)]
    if not positive.size:
        return 1e-6, 1.0
    # A decade of air beneath: what stands on the lower edge is not to be read as the smallest residual.
    return 10.0 ** (np.floor(np.log10(positive.min())) - 1), 10.0 ** np.ceil(np.log10(positive.max()) + 0.1)
