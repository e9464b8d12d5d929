"""The cube as a table: every variable and coordinate with its dimensions, type, units and name.

The contract in prose is docs/formats/cube.md. `reduce.cube` writes, opens and validates files by this table.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from replay.shards import Status

VERSION = 1
VERSION_ATTRIBUTE = "lossledger_cube_version"

STATUSES = (*(status.name.lower() for status in Status), "missing")
"""Meaning of the numbers in `status`, from 0; the last is a step that was not replayed on that loss data."""

MISSING = STATUSES.index("missing")

_CELL = ("data", "step", "layer", "component")
_HEAD = ("data", "step", "layer", "attention_component", "head")
_ENTRY = ("data", "step")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """A variable or coordinate of the cube.

    Parameters
    ----------
    dims
        Names of its dimensions.
    dtype
        Its type; ``str`` for text.
    units, long_name
        What plots print beside it.
    flags
        Meanings of the values 0, 1, ... where they stand for words.
    """

    dims: tuple[str, ...]
    dtype: type
    units: str
    long_name: str
    flags: tuple[str, ...] = ()

    @property
    def attributes(self) -> dict[str, Any]:
        """The CF attributes of the netCDF variable."""
        attributes: dict[str, Any] = {"long_name": self.long_name, "units": self.units}
        if self.flags:
            attributes["flag_values"] = np.arange(len(self.flags), dtype=self.dtype)
            attributes["flag_meanings"] = " ".join(self.flags)
        return attributes


def _field(dims: tuple[str, ...], dtype: type, units: str, long_name: str) -> Field:
    return Field(dims=dims, dtype=dtype, units=units, long_name=long_name)


COORDINATES = {
    "data": _field(("data",), str, "1", "loss data"),
    "step": _field(("step",), np.int64, "1", "optimizer step"),
    "step_end": _field(("step",), np.int64, "1", "optimizer step at the end of the interval"),
    "layer": _field(("layer",), str, "1", "layer"),
    "stack": _field(("layer",), str, "1", "stack of the layer"),
    "depth": _field(("layer",), np.int64, "1", "depth of the layer in its stack"),
    "component": _field(("component",), str, "1", "component"),
    "attention_component": _field(("attention_component",), str, "1", "attention component"),
    "head": _field(("head",), np.int64, "1", "attention head"),
    "epoch": _field(("step",), np.int64, "1", "epoch"),
    "lr": _field(("step",), np.float64, "1", "learning rate"),
    "predictions": _field(("step",), np.int64, "1", "predictions in the update's batch"),
}

VARIABLES = {
    "lca": _field(_CELL, np.float64, "nat", "loss change allocation"),
    "lca_positive": _field(_CELL, np.float64, "nat", "loss change allocation of the entries that hurt"),
    "hurting": _field(_CELL, np.float64, "1", "share of entries that hurt"),
    "lca_head": _field(_HEAD, np.float64, "nat", "loss change allocation of the head"),
    "lca_standard_error": _field(_CELL, np.float64, "nat", "standard error of loss change allocation"),
    "total_standard_error": _field(_ENTRY, np.float64, "nat", "standard error of LCA summed over all cells"),
    "loss_start": _field(_ENTRY, np.float64, "nat", "loss before the step"),
    "loss_end": _field(_ENTRY, np.float64, "nat", "loss after the step"),
    "residual": _field(_ENTRY, np.float64, "nat", "sum of LCA minus measured change of the loss"),
    "tolerance": _field(_ENTRY, np.float64, "nat", "largest residual of a balanced entry"),
    "status": Field(dims=_ENTRY, dtype=np.int8, units="1", long_name="how the entry came about", flags=STATUSES),
    "evaluations": _field(_ENTRY, np.int64, "1", "gradient evaluations"),
    "n_parameters": _field(("layer", "component"), np.int64, "1", "entries in the cell"),
    "n_not_recorded": _field(("layer", "component"), np.int64, "1", "entries of the cell that were not recorded"),
    "n_tied": _field(
        ("layer", "component"), np.int64, "1", "entries of the cell that another cell has for another use"
    ),
}

FIELDS = {**COORDINATES, **VARIABLES}

SINCE: Mapping[str, Callable[[Any], Any]] = {"step_end": lambda step: step + 1}
"""Coordinates that cubes of this version did not have at first, and what they are in those: functions of `step`."""

ALONG_STEP = {name: field for name, field in FIELDS.items() if "step" in field.dims}


def _describe_buffers(names: Sequence[str]) -> str:
    if not names:
        return "none changed in training"
    return f"held along every step at their values before it: {', '.join(names)}"


def attributes(*, path: str, provenance: Mapping[str, Any], command: str) -> dict[str, Any]:
    """Return the global attributes of a cube.

    Parameters
    ----------
    path
        ``recorded`` or ``chord``.
    provenance
        Any JSON object.
    command
        The command line that makes the cube.

    Returns
    -------
    dict
        Attribute name to text or number, the types that netCDF can hold.
    """
    try:
        version = importlib.metadata.version("lossledger")
    except importlib.metadata.PackageNotFoundError:
        version = "(not installed)"
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "Conventions": "CF-1.11",
        "title": "Loss Change Allocation of a training run",
        "source": f"lossledger {version}",
        "history": f"{now} {command}",
        "references": (
            "Lan et al., NeurIPS 2019, https://doi.org/10.48550/arXiv.1909.01440; "
            "Vázquez et al., COLING 2022, https://aclanthology.org/2022.coling-1.424"
        ),
        "path": path,
        "buffers": _describe_buffers(provenance.get("buffers", ())),
        VERSION_ATTRIBUTE: VERSION,
        "provenance": json.dumps(provenance, sort_keys=True),
    }
