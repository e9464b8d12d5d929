"""The look of every figure: colours that colour-blind readers tell apart, sizes in inches, labels from attributes.

Layout is in explicit inches and not left to a layout engine: saving a figure in one format must not move it in
the next.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

PAGE_WIDTH = 7.2
MARGIN = 0.06
LINE = 0.125  # height of a line of the small print
CHARACTERS_PER_INCH = 20.5  # of the small print, on average
BOLD_CHARACTERS_PER_INCH = 15.5
SMALL = 6.5
LARGE = 8.5
STYLE_FILE = Path(__file__).with_name("lossledger.mplstyle")

# Okabe and Ito 2008, "Color Universal Design".
BLACK = "#000000"
ORANGE = "#E69F00"
SKY_BLUE = "#56B4E9"
GREEN = "#009E73"
BLUE = "#0072B2"
VERMILION = "#D55E00"
PURPLE = "#CC79A7"
GREY = "#5f5f5f"


def styled() -> AbstractContextManager[None]:
    """Apply the style while artists are made or saved, and leave the user's settings as they were.

    Returns
    -------
    contextlib.AbstractContextManager
        Matplotlib's own defaults with viz/lossledger.mplstyle on top: a user's matplotlibrc changes no byte.
    """
    return matplotlib.style.context(STYLE_FILE, after_reset=True)


def blank(height: float) -> Figure:
    """Make an empty figure of one page width.

    Parameters
    ----------
    height
        Inches.

    Returns
    -------
    matplotlib.figure.Figure
        Known to no pyplot.
    """
    return Figure(figsize=(PAGE_WIDTH, height))


def place(figure: Figure, box: tuple[float, float, float, float], **keywords: Any) -> Axes:
    """Add axes at a place given in inches.

    Parameters
    ----------
    figure
        Where to.
    box
        Left edge from the left, upper edge from the top, width and height, in inches.
    **keywords
        For `matplotlib.figure.Figure.add_axes`.

    Returns
    -------
    matplotlib.axes.Axes
        The new axes.
    """
    width, height = figure.get_size_inches()
    left, top, across, down = box
    return figure.add_axes((left / width, 1 - (top + down) / height, across / width, down / height), **keywords)


def write(figure: Figure, left: float, top: float, text: str, **keywords: Any) -> None:
    """Write text at a place given in inches.

    Parameters
    ----------
    figure
        Where to.
    left
        Inches from the left edge.
    top
        Inches from the upper edge to the top of the text.
    text
        What. A ``$`` stands for itself.
    **keywords
        For `matplotlib.figure.Figure.text`.
    """
    width, height = figure.get_size_inches()
    settings: dict[str, Any] = {"va": "top", "fontsize": SMALL, "parse_math": False, **keywords}
    figure.text(left / width, 1 - top / height, text, **settings)


def head(figure: Figure, title: str, handles: Sequence[Artist]) -> None:
    """Write a figure's title and, on a line beneath, its legend.

    Parameters
    ----------
    figure
        Where to.
    title
        What it shows.
    handles
        Labelled artists, in the order of the legend.
    """
    width, height = figure.get_size_inches()
    write(figure, MARGIN, 0.05, title, fontsize=LARGE, weight="bold")
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(MARGIN / width, 1 - 0.26 / height),
        ncols=max(1, len(handles)),
        borderpad=0,
        borderaxespad=0,
    )


def foot(figure: Figure, caption: Sequence[str]) -> None:
    """Write the caption along the lower edge.

    Parameters
    ----------
    figure
        Where to.
    caption
        Its lines.
    """
    height = figure.get_size_inches()[1]
    write(figure, MARGIN, height - MARGIN - LINE * len(caption), "\n".join(caption))


def wrapped(text: str, width: float) -> list[str]:
    """Break small print into lines.

    Parameters
    ----------
    text
        One paragraph.
    width
        Inches.

    Returns
    -------
    list of str
        Its lines.
    """
    return textwrap.wrap(text, max(16, int(width * CHARACTERS_PER_INCH)))


def shortened(label: str, width: float) -> str:
    """Cut a run's label where it would run into its neighbour; tables have it in full.

    Parameters
    ----------
    label
        The run's label.
    width
        Inches that it may take in bold print.

    Returns
    -------
    str
        At most as many characters as fit; an ellipsis stands for the middle, as runs often differ at the end.
    """
    room = max(8, int(width * BOLD_CHARACTERS_PER_INCH))
    if len(label) <= room:
        return label
    return f"{label[: room // 2]}…{label[len(label) - (room - 1) // 2 :]}"


def axis_label(attributes: Mapping[str, Any], *, exponent: int = 0, width: int = 24) -> str:
    """Label an axis by the attributes of what it shows.

    Parameters
    ----------
    attributes
        ``long_name`` and ``units`` of a variable; units ``1`` are not shown.
    exponent
        The tick labels are divided by 10 to this power.
    width
        Characters to a line.

    Returns
    -------
    str
        Name, then units in brackets; lines of `width` at most where words allow it.
    """
    units = str(attributes.get("units", "1"))
    power = f"$10^{{{exponent}}}$" if exponent else ""
    shown = " ".join(part for part in (power, "" if units == "1" else units) if part)
    lines = textwrap.wrap(str(attributes["long_name"]), width)
    if not shown:
        return "\n".join(lines)
    # The mark-up of a power is longer than what it prints.
    room = width - len(units) - (7 if exponent else 3)
    return "\n".join(lines) + ("\n" if len(lines[-1]) > room else " ") + f"[{shown}]"


def scaled_ticks(axes: Axes, largest: float, *, ticks: int = 5) -> int:
    """Give the y axis short tick labels by taking a power of ten out of them.

    Parameters
    ----------
    axes
        The axes.
    largest
        Largest absolute value shown.
    ticks
        About how many intervals.

    Returns
    -------
    int
        The power, a multiple of three, 0 for numbers that are short as they are.
    """
    exponent = 0
    if largest > 0 and not 0.1 <= largest < 1000:
        exponent = 3 * math.floor(math.log10(largest) / 3)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=ticks, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value / 10.0**exponent:.6g}".replace("-", "\N{MINUS SIGN}"))
    )
    return exponent
