"""From a live module to the parameter table: names, aliases, and by a table of rules layer, component and heads.

The rules are data: one TOML file for each model family in the folder naming/. Nothing else in lossledger reads
meaning from a parameter's name.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from recorder.errors import FormatError
from recorder.table import MODEL_LAYER, Parameter

if TYPE_CHECKING:
    import torch
    from torch import nn


class UnmappedParameterWarning(UserWarning):
    """A trained parameter matched no naming rule and went to component ``other``."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NamingRule:
    """One line of a family's table: which names it covers, and what they are.

    Parameters
    ----------
    pattern
        Matched against the whole name. Its groups ``stack`` and ``depth`` give the layer; ``attention`` names the
        module that has the attribute `heads`.
    component
        One of `recorder.table.COMPONENTS`.
    unit_axis
        The axis whose slices are units.
    heads
        Attribute of the attention module that holds its number of heads; None where the parameter has none.
    """

    pattern: re.Pattern[str]
    component: str
    unit_axis: int = 0
    heads: str | None = None


def naming_rules() -> tuple[NamingRule, ...]:
    """Read the rules of every family, in the order in which they are tried.

    Returns
    -------
    tuple of NamingRule
        The rules of all files in naming/.
    """
    files = sorted(
        (entry for entry in resources.files("recorder").joinpath("naming").iterdir() if entry.name.endswith(".toml")),
        key=lambda entry: entry.name,
    )
    return tuple(rule for file in files for rule in parse_naming_rules(file.read_text(encoding="utf-8"), file.name))


def parse_naming_rules(text: str, source: str) -> tuple[NamingRule, ...]:
    """Parse a table of naming rules.

    Parameters
    ----------
    text
        TOML, as described at the head of naming/fairseq.toml.
    source
        Where the text is from, for error messages.

    Returns
    -------
    tuple of NamingRule
        The rules in the file's order.

    Raises
    ------
    FormatError
        If a rule has an unknown field, lacks one, or its pattern is no regular expression.
    """
    document = tomllib.loads(text)
    fragments: dict[str, str] = document.get("fragments", {})
    rules = []
    for number, row in enumerate(document.get("rule", []), start=1):
        pattern = row.pop("pattern", "")
        for name, fragment in fragments.items():
            pattern = pattern.replace(f"{{{name}}}", fragment)
        try:
            rules.append(NamingRule(pattern=re.compile(pattern), **row))
        except (re.error, TypeError) as error:
            message = f"{source}: naming rule {number} is not understood: {error}"
            raise FormatError(message) from error
    return tuple(rules)


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
        The naming rules; by default those of `naming_rules`.
    masters
        Parameter name to the tensor that is recorded for it, where that is not the model's own; the row then has its
        dtype, and the model's beside it where that is another.

    Returns
    -------
    tuple of Parameter
        In the order of ``model.named_parameters()``. Frozen tensors (``requires_grad`` false) are ``untrained``.
    """
    rules = naming_rules() if rules is None else rules
    masters = masters or {}
    names: dict[int, list[str]] = {}
    tensors = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    table = []
    for key, (name, *aliases) in names.items():
        tensor = tensors[key]
        dtype, model_dtype = _dtype_name(masters.get(name, tensor)), _dtype_name(tensor)
        table.append(
            Parameter(
                name=name,
                aliases=tuple(aliases),
                shape=tuple(tensor.shape),
                dtype=dtype,
                model_dtype=None if model_dtype == dtype else model_dtype,
                status="trained" if tensor.requires_grad else "untrained",
                **_place(model, name, rules),
            )
        )
    return tuple(table)


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _place(model: nn.Module, name: str, rules: Iterable[NamingRule]) -> dict[str, Any]:
    for rule in rules:
        match = rule.pattern.fullmatch(name)
        if match is None:
            continue
        groups = match.groupdict()
        place: dict[str, Any] = {"component": rule.component, "unit_axis": rule.unit_axis}
        if groups.get("depth") is not None:
            stack, depth = groups["stack"], int(groups["depth"])
            place |= {"layer": f"{stack}.{depth}", "stack": stack, "depth": depth}
        if rule.heads is not None:
            place["heads"] = int(getattr(model.get_submodule(groups["attention"]), rule.heads))
        return place
    return {"component": "other", "layer": MODEL_LAYER}


def warn_of_unmapped(table: Iterable[Parameter]) -> None:
    """Name the trained parameters that no rule covers, in one warning.

    Parameters
    ----------
    table
        The parameter table once it is known which parameters are trained.
    """
    unmapped = [parameter.name for parameter in table if parameter.trained and parameter.component == "other"]
    if unmapped:
        message = f"{len(unmapped)} parameters match no naming rule and go to component 'other': {', '.join(unmapped)}"
        warnings.warn(message, UnmappedParameterWarning, stacklevel=2)
