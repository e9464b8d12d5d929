"""The numbers behind every figure and the table: pure functions of a cube, without matplotlib.

Everything is in nats and means what docs/formats/cube.md says. Sums over steps run over the *counted* steps of one
loss data, those with status ``converged``, ``tolerance_not_met`` or ``not_checked``; the others hold no usable LCA,
and how many they are stands beside every sum (`Totals.statuses`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xarray as xr

from recorder.errors import UsageError

COUNTED = ("converged", "tolerance_not_met", "not_checked")
STEPS_AT_ONCE = 4096  # bounds the memory: 125,000 steps of a 12-layer model are 200 MB


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What one run's ledger says in all, on one loss data.

    Parameters
    ----------
    path
        ``recorded`` or ``chord``.
    units
        Of every amount here, from the cube.
    by_component
        LCA summed over counted steps and layers, for every component that has parameters, in the cube's order.
    total
        Sum of `by_component`.
    measured
        Σ (loss_end - loss_start) over the same steps; NaN where the losses of one were not measured.
    worst_residual
        Largest |residual| of a counted step, NaN where none was taken.
    worst_step
        The step at which it happened.
    statuses
        Number of steps by status, every status of the format named.
    """

    path: str
    units: str
    by_component: Mapping[str, float]
    total: float
    measured: float
    worst_residual: float
    worst_step: int | None
    statuses: Mapping[str, int]

    @property
    def steps(self) -> int:
        """Number of steps of the run, counted or not."""
        return sum(self.statuses.values())


def loss_data(cubes: Mapping[str, xr.Dataset]) -> list[str]:
    """Name the loss data that any of the cubes carries.

    Parameters
    ----------
    cubes
        Cubes by run label.

    Returns
    -------
    list of str
        Without repetition, in the order in which the cubes name them.
    """
    return list(dict.fromkeys(str(name) for cube in cubes.values() for name in cube["data"].to_numpy()))


def cubes_with(cubes: Mapping[str, xr.Dataset], data: str) -> dict[str, xr.Dataset]:
    """Keep the cubes that carry a loss data.

    Parameters
    ----------
    cubes
        Cubes by run label.
    data
        Name of a loss data.

    Returns
    -------
    dict of str to xarray.Dataset
        In the same order.

    Raises
    ------
    UsageError
        If no cube carries it.
    """
    present = {label: cube for label, cube in cubes.items() if data in cube["data"].to_numpy()}
    if not present:
        known = ", ".join(loss_data(cubes)) or "none at all"
        message = f"loss data: expected one that the cubes carry ({known}), found {data!r}"
        raise UsageError(message)
    return present


def statuses(cube: xr.Dataset, data: str) -> xr.DataArray:
    """Name every step's status.

    Parameters
    ----------
    cube
        A cube.
    data
        Name of one of its loss data.

    Returns
    -------
    xarray.DataArray
        Strings of dimension ``step``.
    """
    status = cube["status"].sel(data=data)
    names = _flags(status)
    return xr.DataArray(
        np.array([names[int(value)] for value in status.to_numpy()], dtype=object),
        dims="step",
        coords={"step": cube["step"]},
    )


def summed_over_steps(cube: xr.Dataset, data: str) -> xr.DataArray:
    """Sum LCA over the counted steps (Vázquez et al. 2022, Figure 1; Lan et al. 2019, section 4).

    Parameters
    ----------
    cube
        A cube.
    data
        Name of one of its loss data.

    Returns
    -------
    xarray.DataArray
        Nats, float64, of dimensions ``layer`` and ``component``. NaN, not 0, for a cell without parameters and
        where no step counts.
    """
    counted = _counted(cube, data)
    filled = (cube["n_parameters"].transpose("layer", "component") > 0).to_numpy()
    amounts = np.zeros(filled.shape)
    for steps, block in _blocks(cube, data):
        amounts += block[counted[steps]].sum(axis=0)
    attributes = cube["lca"].attrs
    return xr.DataArray(
        np.where(filled & counted.any(), amounts, np.nan),
        dims=("layer", "component"),
        coords={name: cube[name] for name in ("layer", "component", "stack", "depth")},
        attrs={"long_name": f"{attributes['long_name']}, summed over steps", "units": attributes["units"]},
    )


def asked_tolerance(cube: xr.Dataset, data: str) -> tuple[float, float]:
    """Read the tolerance that the user asked for when a loss data was replayed.

    Parameters
    ----------
    cube
        A cube.
    data
        Name of one of its loss data.

    Returns
    -------
    rtol : float
        Relative to |ΔL|; from the cube's provenance, NaN where it does not tell.
    atol : float
        In nats, likewise.
    """
    settings = json.loads(cube.attrs.get("provenance", "{}")).get("loss_data", {}).get(data, {})
    return float(settings.get("rtol", math.nan)), float(settings.get("atol", math.nan))


def balance(cube: xr.Dataset, data: str) -> xr.Dataset:
    """Set what was allocated against what was measured, step by step.

    Parameters
    ----------
    cube
        A cube.
    data
        Name of one of its loss data.

    Returns
    -------
    xarray.Dataset
        Of dimension ``step``, in nats: ``allocated`` (Σ LCA over all cells), ``measured`` (ΔL = loss_end -
        loss_start), ``residual`` and ``tolerance`` as the cube has them, all NaN at steps that do not count;
        ``beyond``: the status says ``tolerance_not_met``, or |residual| or |allocated - measured| exceeds the
        tolerance; ``status`` by name.
    """
    counted = _counted(cube, data)
    filled = (cube["n_parameters"].transpose("layer", "component") > 0).to_numpy()
    allocated = np.full(counted.shape, np.nan)
    for steps, block in _blocks(cube, data):
        allocated[steps] = block[:, filled].sum(axis=1)
    allocated[~counted] = np.nan
    one = cube[["loss_start", "loss_end", "residual", "tolerance"]].sel(data=data).load()
    measured = np.where(counted, (one["loss_end"] - one["loss_start"]).to_numpy(), np.nan)
    residual = np.where(counted, one["residual"].to_numpy(), np.nan)
    allowed = np.where(counted, one["tolerance"].to_numpy(), np.nan)
    status = statuses(cube, data)
    beyond = (status.to_numpy() == "tolerance_not_met") | (np.abs(residual) > allowed)
    # The cube's own cells must add up too, and not only what replay saw before they were grouped.
    beyond |= np.abs(allocated - measured) > allowed
    units = {name: cube[name].attrs["units"] for name in ("lca", "loss_end", "residual")}
    step = ("step",)
    return xr.Dataset(
        {
            "allocated": (step, allocated, {"long_name": "Σ LCA", "units": units["lca"]}),
            "measured": (step, measured, {"long_name": "ΔL", "units": units["loss_end"]}),
            "residual": (step, residual, {"long_name": "residual", "units": units["residual"]}),
            "tolerance": (step, allowed, {"long_name": "tolerance", "units": units["residual"]}),
            "beyond": (step, beyond),
            "status": status,
        },
        coords={"step": cube["step"]},
    )


def totals(cube: xr.Dataset, data: str) -> Totals:
    """Add up a run's ledger on one loss data.

    Parameters
    ----------
    cube
        A cube.
    data
        Name of one of its loss data.

    Returns
    -------
    Totals
        Amounts in nats.
    """
    cells = summed_over_steps(cube, data)
    names = statuses(cube, data).to_numpy()
    one = (
        cube[["loss_start", "loss_end", "residual", "tolerance"]].sel(data=data).isel(step=_counted(cube, data)).load()
    )
    sizes = np.abs(one["residual"].to_numpy())
    worst = int(np.nanargmax(sizes)) if np.isfinite(sizes).any() else None
    filled = cube["n_parameters"].sum("layer").to_numpy() > 0
    by_component = {
        str(name): float(amount)
        for name, amount, has in zip(
            cells["component"].to_numpy(), cells.sum("layer", min_count=1).to_numpy(), filled, strict=True
        )
        if has
    }
    return Totals(
        path=str(cube.attrs["path"]),
        units=str(cube["lca"].attrs["units"]),
        by_component=by_component,
        total=float(np.sum(list(by_component.values()))),
        measured=float((one["loss_end"] - one["loss_start"]).sum(skipna=False)) if sizes.size else float("nan"),
        worst_residual=float("nan") if worst is None else float(sizes[worst]),
        worst_step=None if worst is None else int(one["step"][worst]),
        statuses={name: int((names == name).sum()) for name in _flags(cube["status"]).values()},
    )


def _flags(status: xr.DataArray) -> dict[int, str]:
    values = np.atleast_1d(status.attrs["flag_values"])
    return dict(zip(map(int, values), str(status.attrs["flag_meanings"]).split(), strict=True))


def _counted(cube: xr.Dataset, data: str) -> npt.NDArray[np.bool_]:
    return np.isin(statuses(cube, data).to_numpy().astype(str), COUNTED)


def _blocks(cube: xr.Dataset, data: str) -> Iterator[tuple[slice, npt.NDArray[np.float64]]]:
    lca = cube["lca"].sel(data=data).transpose("step", "layer", "component")
    for start in range(0, lca.sizes["step"], STEPS_AT_ONCE):
        steps = slice(start, start + STEPS_AT_ONCE)
        yield steps, lca.isel(step=steps).to_numpy()
