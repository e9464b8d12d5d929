"""How the paper's Figure 1 arranges the cells of a cube: which panels, and which bars stand in them.

Panels and the order of bars are data; no component is recognised by a substring of its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xarray as xr


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One panel of the paper's Figure 1.

    Parameters
    ----------
    title
        Its name.
    component
        The component whose layers are its bars.
    cross
        The component of cross-attention drawn in the same panel, if there is one.
    """

    title: str
    component: str
    cross: str | None = None


ATTENTION = tuple(
    Panel(title=title, component=title, cross=f"cross_{title}") for title in ("key", "query", "value", "out")
)
FEED_FORWARD = (Panel(title="W1", component="W1"), Panel(title="W2", component="W2"))
GATED = (Panel(title="gate", component="gate"), *FEED_FORWARD)


def feed_forward(cells: Iterable[xr.DataArray]) -> tuple[Panel, ...]:
    """Choose the panels of the feed-forward blocks of several runs.

    Parameters
    ----------
    cells
        From `viz.select.summed_over_steps`, of each run.

    Returns
    -------
    tuple of Panel
        `GATED` where any of them has a gate, else `FEED_FORWARD`.
    """
    gated = any(not np.isnan(_of_component(of_run, "gate")).all() for of_run in cells)
    return GATED if gated else FEED_FORWARD


def bars(cells: xr.DataArray, panels: Sequence[Panel]) -> xr.DataArray:
    """Arrange cells as the bars of panels that share their axes.

    Parameters
    ----------
    cells
        From `viz.select.summed_over_steps`.
    panels
        `ATTENTION`, or those of `feed_forward`.

    Returns
    -------
    xarray.DataArray
        Nats, of dimensions ``panel`` and ``bar``, NaN where a layer lacks the component. Along ``bar`` the
        coordinates ``group`` (a stack, or ``cross`` for its cross-attention), ``layer`` and ``depth``: the same
        bars in every panel, those groups that any panel has.
    """
    columns: list[tuple[str, str, int, list[float]]] = []
    for stack in dict.fromkeys(str(name) for name in cells["stack"].to_numpy()):
        layers = cells.isel(layer=np.flatnonzero(cells["stack"].to_numpy() == stack))
        for cross in (False, True):
            names = [panel.cross if cross else panel.component for panel in panels]
            heights = np.stack([_of_component(layers, name) for name in names])
            # Layers inside a group keep their place though they lack the component; outside a stack nothing does.
            if np.isnan(heights).all():
                continue
            group = _group(stack, cross=cross)
            columns += [
                (group, str(layer), int(depth), list(column))
                for layer, depth, column in zip(
                    layers["layer"].to_numpy(), layers["depth"].to_numpy(), heights.T, strict=True
                )
            ]
    return xr.DataArray(
        np.array([column[3] for column in columns], dtype=float).reshape(len(columns), len(panels)).T,
        dims=("panel", "bar"),
        coords={
            "panel": [panel.title for panel in panels],
            "group": ("bar", np.array([column[0] for column in columns], dtype=object)),
            "layer": ("bar", np.array([column[1] for column in columns], dtype=object)),
            "depth": ("bar", np.array([column[2] for column in columns], dtype=np.int64)),
        },
        attrs=cells.attrs,
    )


def _of_component(cells: xr.DataArray, component: str | None) -> npt.NDArray[np.float64]:
    if component not in cells["component"].to_numpy():
        return np.full(cells.sizes["layer"], np.nan)
    return cells.sel(component=component).to_numpy()


def _group(stack: str, *, cross: bool) -> str:
    if not cross:
        return stack
    return "cross" if stack == "decoder" else f"{stack} cross"
