"""From a live module to the parameter table: names, aliases, uses of tied weights; by naming rules the rest."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from recorder.namingrules import NamingRule, naming_rules, parse_naming_rules
from recorder.placing import Place, find_places
from recorder.table import Parameter

if TYPE_CHECKING:
    import torch
    from torch import nn


__all__ = [
    "NamingRule",
    "UnmappedParameterWarning",
    "naming_rules",
    "parameter_table",
    "parse_naming_rules",
    "warn_of_unmapped",
]


class UnmappedParameterWarning(UserWarning):
    """A trained parameter matched no naming rule and went to component ``other``."""


def parameter_table(
    model: nn.Module,
    rules: Sequence[NamingRule] | None = None,
    *,
    masters: Mapping[str, torch.Tensor] | None = None,
) -> tuple[Parameter, ...]:
    """Tabulate every trainable tensor of a model, tied weights once with their aliases.

    Parameters
    ----------
    model
        The live module; head counts are read from it, never guessed.
    rules
        The naming rules, the first that applies decides; by default those of `naming_rules`. Of a rule that is not
        `optional` a `FormatError` tells where it does not fit the model.
    masters
        Parameter name to the tensor that is recorded for it, where that is not the model's own; the row then has its
        dtype, and the model's beside it where that is another.

    Returns
    -------
    tuple of Parameter
        In the order of ``model.named_parameters()``. Frozen tensors (``requires_grad`` false) are ``untrained``. Tied
        tensors whose names belong to several cells have their `uses`.
    """
    masters = masters or {}
    names: dict[int, list[str]] = {}
    tensors = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    shapes = {name: tuple(tensors[key].shape) for key, of_tensor in names.items() for name in of_tensor}
    places = find_places(model, shapes, naming_rules() if rules is None else rules)
    table = []
    for key, of_tensor in names.items():
        tensor = tensors[key]
        dtype, model_dtype = _dtype_name(masters.get(of_tensor[0], tensor)), _dtype_name(tensor)
        row = Parameter(
            name=of_tensor[0],
            aliases=tuple(of_tensor[1:]),
            shape=tuple(tensor.shape),
            dtype=dtype,
            model_dtype=None if model_dtype == dtype else model_dtype,
            status="trained" if tensor.requires_grad else "untrained",
        )
        table.append(placed(row, _uses(model, of_tensor, places)))
    return tuple(table)


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _uses(model: nn.Module, names: Sequence[str], places: Mapping[str, Place]) -> list[tuple[Place, list[str]]]:
    # Several names of one module (a layer that stands in the model twice) are one slot, and so one use.
    slots: dict[tuple[int, str], list[str]] = {}
    for name in names:
        module, _, attribute = name.rpartition(".")
        slots.setdefault((id(model.get_submodule(module)), attribute), []).append(name)
    return uses_among(slots.values(), names, places)


def uses_among(
    slots: Iterable[Sequence[str]], names: Sequence[str], places: Mapping[str, Place], *, by_layer: bool = True
) -> list[tuple[Place, list[str]]]:
    """Find the uses of one tensor, from the places of its names.

    Parameters
    ----------
    slots
        Its names, those that stand for one module's attribute together.
    names
        The same, in the model's order.
    places
        Name to place.
    by_layer
        Whether two slots with the same components in different layers are two uses.

    Returns
    -------
    list of (Place, list of str)
        Every use with its names, the one of the first name first. Names of component ``other`` go along with it.
    """
    uses: dict[tuple[str, ...], tuple[Place, list[str]]] = {}
    unknown: list[str] = []
    for slot in slots:
        place = next((places[name] for name in slot if places[name].component != "other"), None)
        if place is None:
            unknown.extend(slot)
        else:
            uses.setdefault(place.cell if by_layer else place.cell[1:], (place, []))[1].extend(slot)
    (first, known), *others = uses.values() or [(places[names[0]], [])]
    return [(first, [name for name in names if name in {*known, *unknown}]), *others]


def placed(row: Parameter, uses: Sequence[tuple[Place, Sequence[str]]]) -> Parameter:
    """Put a row into its place.

    Parameters
    ----------
    row
        The row, without uses.
    uses
        As `uses_among` gives them.

    Returns
    -------
    Parameter
        The row, with its uses where there are several.
    """
    rows = [
        dataclasses.replace(
            row,
            name=name,
            aliases=tuple(aliases),
            tied_to=None if name == row.name else row.name,
            **place.fields(),
        )
        for place, (name, *aliases) in uses
    ]
    return dataclasses.replace(rows[0], aliases=row.aliases, uses=tuple(rows) if len(rows) > 1 else ())


def warn_of_unmapped(table: Iterable[Parameter]) -> None:
    """Name the trained parameters that no rule covers, in one warning.

    Parameters
    ----------
    table
        The parameter table once it is known which parameters are trained.
    """
    unmapped = [parameter.name for parameter in table if parameter.trained and parameter.component == "other"]
    if unmapped:
        message = (
            f"{len(unmapped)} parameters match no naming rule and go to component 'other' (python -m recorder map RUN "
            f"prints the table, --map FILE or map= of recorder.watch takes rules of yours): {', '.join(unmapped)}"
        )
        warnings.warn(message, UnmappedParameterWarning, stacklevel=2)
