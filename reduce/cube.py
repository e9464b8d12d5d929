"""The cube: the netCDF-4 file that carries every result. The only module that writes, opens and validates it.

Described for readers in any language in docs/formats/cube.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import netCDF4
import numpy as np
import xarray as xr

from recorder import durable
from recorder.errors import FormatError, LossledgerError, UsageError
from reduce import schema

if TYPE_CHECKING:
    import numpy.typing as npt

VERSION = schema.VERSION
FILE_NAME = "lca.nc"
STEPS_AT_ONCE = 256
"""Steps to a block: the netCDF chunk along `step`, and the most steps held in memory while writing."""


def make(values: Mapping[str, npt.ArrayLike], attributes: Mapping[str, Any]) -> xr.Dataset:
    """Make a cube, or a block of consecutive steps of one, in memory.

    Parameters
    ----------
    values
        An array for every name in `schema.FIELDS`, with the dimensions and dtypes given there.
    attributes
        As `schema.attributes` returns them.

    Returns
    -------
    xarray.Dataset
        The cube; LCA and losses in nats.
    """
    arrays: dict[str, npt.NDArray[Any]] = {
        name: np.asarray(values[name], dtype=field.dtype) for name, field in schema.FIELDS.items()
    }
    return xr.Dataset(
        {name: (field.dims, arrays[name], field.attributes) for name, field in schema.VARIABLES.items()},
        coords={name: (field.dims, arrays[name], field.attributes) for name, field in schema.COORDINATES.items()},
        attrs=dict(attributes),
    )


def check_destination(path: Path, *, overwrite: bool) -> None:
    """Refuse a destination that a cube must not or cannot be written to.

    Parameters
    ----------
    path
        Where the cube is to go. A cube there may be replaced: it is derived data.
    overwrite
        Whether any other file there may be replaced too.

    Raises
    ------
    UsageError
        If a file that is no cube would be lost, or no file can be made there.
    """
    path = Path(path)
    if path.is_dir():
        message = f"{path}: expected a file name for the cube, found a folder; pass --out {path / FILE_NAME}"
        raise UsageError(message)
    if not path.parent.is_dir():
        message = f"{path}: its folder does not exist; make it, or pass another --out"
        raise UsageError(message)
    if path.exists() and not overwrite and _version(path) is None:
        message = (
            f"{path}: expected a cube to replace, found a file that lossledger did not write. "
            "Pass another --out, or --overwrite to lose it."
        )
        raise UsageError(message)


def write(path: Path, blocks: Iterable[xr.Dataset], *, steps: int) -> None:
    """Write a cube block by block; it appears at `path` only when it is whole, checked and on disk.

    One block is in memory at a time, and one thread, the caller's, writes: the HDF5 library is safe with no more.

    Parameters
    ----------
    path
        The final path; a file there is replaced. See `check_destination`.
    blocks
        Consecutive parts of the cube along `step`, from `make`, each but the last of `STEPS_AT_ONCE` steps.
    steps
        Number of steps of all blocks together.

    Raises
    ------
    LossledgerError
        If the file does not hold all steps after it was closed: the disk or the file system failed.
    """
    with durable.replacing(path) as temporary:
        start = 0
        for block in blocks:
            with _naming(path):
                if start == 0:
                    _start(temporary, block, min(STEPS_AT_ONCE, steps))
                else:
                    _append(temporary, block, start)
            start += block.sizes["step"]
        with open_cube(temporary) as written:
            found = written.sizes["step"]
            whole = found == steps and bool((np.diff(written["step"].values) > 0).all())
        if not whole:
            message = f"{path}: expected {steps} steps in order after writing, found {found}; nothing was replaced"
            raise LossledgerError(message)


def open_cube(path: Path | str) -> xr.Dataset:
    """Open a cube; values are read when they are used.

    Parameters
    ----------
    path
        The file.

    Returns
    -------
    xarray.Dataset
        The cube. Close it, or use it in a ``with`` statement.

    Raises
    ------
    UsageError
        If there is no such file.
    FormatError
        If it is no cube, or a cube of another version.
    """
    path = Path(path)
    if not path.is_file():
        message = f"no such cube: {path}; make it with: python -m reduce --run RUN --out {path}"
        raise UsageError(message)
    found = _version(path)
    if found is None:
        message = f"{path}: expected a cube of version {VERSION}, found a file that is no cube of lossledger"
        raise FormatError(message)
    if found != VERSION:
        message = (
            f"{path}: expected a cube of version {VERSION}, found version {found}. "
            "Make it again from the run's shards: python -m reduce --run RUN"
        )
        raise FormatError(message)
    dataset = xr.open_dataset(path, engine="netcdf4")
    for name, of_step in schema.SINCE.items():
        if name not in dataset.variables and "step" in dataset.variables:
            dataset.coords[name] = ("step", of_step(dataset["step"].values), schema.FIELDS[name].attributes)
    try:
        validate(dataset, path)
    except FormatError:
        dataset.close()
        raise
    return dataset


def validate(dataset: xr.Dataset, path: Path) -> None:
    """Check that every variable and coordinate of the format is there, with its dimensions and kind of type.

    Parameters
    ----------
    dataset
        An opened cube.
    path
        Its file, for the message.

    Raises
    ------
    FormatError
        If one is missing or different.
    """
    for name, field in schema.FIELDS.items():
        if name not in dataset.variables:
            message = f"{path}: expected the cube's variable {name!r}, found none; make the cube again"
            raise FormatError(message)
        variable = dataset.variables[name]
        matches = variable.dtype.kind in "OUT" if field.dtype is str else variable.dtype == field.dtype
        if tuple(variable.dims) != field.dims or not matches:
            message = (
                f"{path}: expected variable {name!r} to be {field.dtype.__name__} over {field.dims}, "
                f"found {variable.dtype} over {tuple(variable.dims)}; make the cube again"
            )
            raise FormatError(message)


def _version(path: Path) -> Any:
    # Asked of netCDF4 itself: xarray would decode the file first, and may fail or warn on a foreign one.
    try:
        with netCDF4.Dataset(path) as file:
            return file.getncattr(schema.VERSION_ATTRIBUTE)
    except (OSError, AttributeError):
        return None


def _start(path: Path, block: xr.Dataset, steps_at_once: int) -> None:
    encoding = {
        name: {
            "zlib": True,
            "complevel": 1,
            "chunksizes": tuple(
                steps_at_once if dim == "step" else 1 if dim == "data" else block.sizes[dim] for dim in field.dims
            ),
        }
        for name, field in schema.ALONG_STEP.items()
    }
    block.to_netcdf(path, engine="netcdf4", format="NETCDF4", unlimited_dims=["step"], encoding=encoding)


def _append(path: Path, block: xr.Dataset, start: int) -> None:
    rows = slice(start, start + block.sizes["step"])
    with netCDF4.Dataset(path, "a") as file:
        file.set_auto_maskandscale(False)
        for name, field in schema.ALONG_STEP.items():
            where = tuple(rows if dim == "step" else slice(None) for dim in field.dims)
            file[name][where] = block[name].values


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    # A full disk is no bug of ours, and netCDF4 reports it as a RuntimeError that names no file.
    try:
        yield
    except (OSError, RuntimeError) as error:
        message = f"{path}: the cube cannot be written ({error}); is the disk full? Nothing was replaced."
        raise LossledgerError(message) from error
