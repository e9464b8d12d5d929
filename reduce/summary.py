"""A cube in one line a loss data: whether the books balance, and how the entries came about."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from reduce import cube, schema
from replay.shards import Status

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]


def lines(dataset: xr.Dataset) -> list[str]:
    """Sum up every loss data of a cube in one line.

    Parameters
    ----------
    dataset
        The cube. It is read a block of steps at a time.

    Returns
    -------
    list of str
        For every loss data the number of replayed steps, the sums in nats of LCA and of the measured changes of the
        loss over the finite steps whose losses were measured, the worst residual in nats, and how many steps have which
        status.
    """
    length = dataset.sizes["step"]
    blocks = [slice(first, first + cube.STEPS_AT_ONCE) for first in range(0, length, cube.STEPS_AT_ONCE)]
    return [_line(dataset.isel(data=index), blocks) for index in range(dataset.sizes["data"])]


def _line(entries: xr.Dataset, blocks: list[slice]) -> str:
    noun = "interval" if entries.attrs["path"] == "chord" else "step"
    status = entries["status"].values
    residual = np.abs(entries["residual"].values)
    change = (entries["loss_end"] - entries["loss_start"]).values
    cells: npt.NDArray[np.bool_] = entries["n_parameters"].values > 0
    allocated = np.concatenate([_allocated(entries["lca"].isel(step=block), cells) for block in blocks])
    finite = np.isfinite(allocated) & np.isfinite(change) & (status != schema.MISSING)
    unchecked = (status == Status.NOT_CHECKED).any()
    over = f" over {finite.sum()} checked {noun}s" if unchecked else ""
    worst = "no finite residual"
    if np.isfinite(residual).any():
        at = int(np.nanargmax(np.where(np.isfinite(residual), residual, np.nan)))
        worst = f"worst |residual| {residual[at]:.2e} nat at {noun} {entries['step'].values[at]}"
    counts = ", ".join(
        f"{(status == code).sum()} {name}" for code, name in enumerate(schema.STATUSES) if (status == code).any()
    )
    return (
        f"{entries['data'].item()}: {(status != schema.MISSING).sum()} {noun}s, "
        f"Σ LCA {allocated[finite].sum():+.6g} nat, Σ ΔL {change[finite].sum():+.6g} nat{over}, {worst}; {counts}"
    )


def _allocated(lca: xr.DataArray, cells: npt.NDArray[np.bool_]) -> Floats:
    # Over the cells that exist only: a NaN in one of those means that the step is not finite, and must show.
    totals: Floats = lca.values[:, cells].sum(axis=1)
    return totals
