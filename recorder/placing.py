"""Where a parameter of a live model belongs, by the naming rules: layer, component, heads, parts.

Numbers of heads are read from the model's modules or their config, never guessed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from recorder.errors import FormatError
from recorder.namingrules import MODEL_PREFIX, NamingRule, PartRule
from recorder.table import FUSED, MODEL_LAYER, Parameter, Part

if TYPE_CHECKING:
    from torch import nn

_NOT_LIVE = "the live model is not here, only names and shapes: give numbers, such as heads = 8"

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Names that torch.compile, FSDP and activation checkpointing insert into a parameter's name; rules do not see them."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """The part of a row of the parameter table that naming rules decide.

    Parameters
    ----------
    component, unit_axis, heads, fused, repeats
        As in `recorder.table.Parameter`.
    stack, depth
        The layer's coordinates; `MODEL_LAYER` and -1 outside any layer.
    tower
        What stands before the stack in the parameter's name.
    """

    component: str = "other"
    unit_axis: int = 0
    heads: int = 0
    fused: tuple[Part, ...] = ()
    repeats: int = 1
    stack: str = MODEL_LAYER
    depth: int = -1
    tower: str = ""

    @property
    def layer(self) -> str:
        """Name of the layer."""
        return MODEL_LAYER if self.depth < 0 else f"{self.stack}.{self.depth}"

    @property
    def cell(self) -> tuple[str, ...]:
        """What two names of one tensor must have in common to be one use: layer and components."""
        return (self.layer, *(part.component for part in self.fused or (self,)))

    def fields(self) -> dict[str, Any]:
        """Return them as the fields of a row.

        Returns
        -------
        dict
            Field name to value, `layer` included.
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "tower"}
        return fields | {"layer": self.layer}


def find_places(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]], rules: Sequence[NamingRule]
) -> dict[str, Place]:
    """Find the place of every named tensor of a model.

    Parameters
    ----------
    model
        The live module.
    shapes
        Name to shape, tied tensors under each of their names.
    rules
        The first that applies decides; component ``other`` where none does. A rule that is not `optional` must fit the
        model: a `FormatError` tells if it does not.

    Returns
    -------
    dict
        Name to place. Where layers of one stack stand in different towers, the tower is part of the stack's name.
    """
    return apart({name: _place(model, name, shape, rules) for name, shape in shapes.items()})


def apart(places: Mapping[str, Place]) -> dict[str, Place]:
    """Tell layers of one stack apart that stand in different towers.

    Parameters
    ----------
    places
        Name to place, of a whole model.

    Returns
    -------
    dict
        Name to place. Where there are several towers, the tower is part of the stack's name.
    """
    towers: dict[str, set[str]] = {}
    for place in places.values():
        if place.depth >= 0:
            towers.setdefault(place.stack, set()).add(place.tower)
    return {
        name: dataclasses.replace(place, stack=f"{place.tower}.{place.stack}", tower="")
        if place.tower and len(towers.get(place.stack, ())) > 1
        else place
        for name, place in places.items()
    }


def _place(model: nn.Module, name: str, shape: tuple[int, ...], rules: Sequence[NamingRule]) -> Place:
    for rule in rules:
        try:
            place = place_by(rule, model, name, shape)
        except FormatError:
            if not rule.optional:
                raise
        else:
            if place is not None:
                return place
    return Place()


def plain_name(name: str) -> str:
    """Take out of a parameter's name what wrappers have inserted: what patterns are matched against.

    Parameters
    ----------
    name
        As in ``model.named_parameters()``.

    Returns
    -------
    str
        Without `WRAPPERS`.
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def place_by(rule: NamingRule, model: nn.Module | None, name: str, shape: tuple[int, ...]) -> Place | None:
    """Find the place of a tensor by one rule.

    Parameters
    ----------
    rule
        The rule.
    model
        The live module; None where only names and shapes are known.
    name, shape
        Of the tensor.

    Returns
    -------
    Place or None
        None where the rule does not apply.

    Raises
    ------
    FormatError
        If the rule does not fit the tensor, the model lacks an attribute that it names, or it asks for the live
        module and there is none.
    """
    match = rule.pattern.fullmatch(plain_name(name))
    if match is None:
        return None
    groups = match.groupdict()
    if rule.classes and model is None:
        message = f"{rule.source}, for parameter {name!r}: asks for classes of modules; {_NOT_LIVE}"
        raise FormatError(message)
    if not all(_is_a(_module(model, groups[group]), rule, group) for group in rule.classes):
        return None
    place = _applied(rule, _Surroundings(model, name, groups, rule.source), shape)
    try:
        Parameter(name=name, shape=shape, dtype="", **place.fields())
    except FormatError as error:
        message = f"{rule.source}: {error}"
        raise FormatError(message) from error
    return place


def _is_a(module: nn.Module | None, rule: NamingRule, group: str) -> bool:
    pattern, bases = rule.classes[group], type(module).__mro__
    return any(
        pattern.fullmatch(name) for base in bases for name in (base.__name__, f"{base.__module__}.{base.__name__}")
    )


def _module(model: nn.Module | None, path: str | None) -> nn.Module | None:
    module: nn.Module | None = None if path is None else model
    for part in (path or "").rstrip(".").split("."):
        module = _unwrapped(module)
        module = getattr(module, part, None) if part else module
    return _unwrapped(module)


def _unwrapped(module: nn.Module | None) -> nn.Module | None:
    wrapped = next((name for name in getattr(module, "_modules", {}) if name in WRAPPERS), None)
    return module if wrapped is None else _unwrapped(getattr(module, wrapped))


def _applied(rule: NamingRule, surroundings: _Surroundings, shape: tuple[int, ...]) -> Place:
    groups = surroundings.groups
    depth = groups.get("depth") or rule.depth
    stack = groups.get("stack") or rule.stack
    place = Place(component=rule.component, unit_axis=rule.unit_axis, heads=surroundings.number(rule.heads))
    if depth is not None and stack is not None:
        place = dataclasses.replace(place, stack=stack, depth=int(depth), tower=(groups.get("tower") or "").rstrip("."))
    if rule.component == FUSED:
        if not 0 <= rule.unit_axis < len(shape):
            message = f"{rule.source}: parameter {surroundings.name!r} of shape {shape} has no axis {rule.unit_axis}"
            raise FormatError(message)
        parts = _parts(rule.parts, surroundings, shape[rule.unit_axis])
        place = dataclasses.replace(place, fused=parts, repeats=surroundings.number(rule.repeats))
    return place


def _parts(rules: Sequence[PartRule], surroundings: _Surroundings, units: int) -> tuple[Part, ...]:
    heads = [surroundings.number(rule.heads) for rule in rules]
    given = [surroundings.number(rule.units) for rule in rules]
    # All heads of a tensor are of one size, so parts of many heads and of few (grouped queries) have units to match.
    shares = [0 if rule.units is not None else number for rule, number in zip(rules, heads, strict=True)]
    if not any(shares):
        shares = [int(rule.units is None) for rule in rules]
    left, shared = units - sum(given), sum(shares) or 1
    if left < 0 or left % shared or not all(share or number for share, number in zip(shares, given, strict=True)):
        message = (
            f"{surroundings.source}: the {units} units of parameter {surroundings.name!r} do not divide into parts of "
            f"{heads} heads and {given} units (0 where the rule gives none)"
        )
        raise FormatError(message)
    return tuple(
        Part(component=rule.component, units=number or left // shared * share, heads=of_part)
        for rule, number, share, of_part in zip(rules, given, shares, heads, strict=True)
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Surroundings:
    """Where a rule's numbers are looked up: the model, and what the pattern found in the parameter's name."""

    model: nn.Module | None
    name: str
    groups: Mapping[str, str | None]
    source: str

    def number(self, number: int | str | None) -> int:
        """Look up a number of a rule.

        Parameters
        ----------
        number
            The number itself, the path of an attribute, or None.

        Returns
        -------
        int
            The number; 0 for None.

        Raises
        ------
        FormatError
            If there is no such attribute, or it holds no positive integer.
        """
        if number is None or isinstance(number, int):
            return number or 0
        if self.model is None:
            message = f"{self.source}, for parameter {self.name!r}: {number!r} is an attribute; {_NOT_LIVE}"
            raise FormatError(message)
        path = number.removeprefix(MODEL_PREFIX)
        at = "" if path != number else self.groups["attention"]
        found: Any = _module(self.model, at)
        place = "the model" if path != number else f"module {at!r}"
        message = f"{self.source}, for parameter {self.name!r}: {place} ({type(found).__name__}) has no number {path!r}"
        for attribute in path.split("."):
            try:
                found = found[attribute] if isinstance(found, Mapping) else getattr(found, attribute)
            except (AttributeError, KeyError) as error:
                raise FormatError(message) from error
        if isinstance(found, bool) or not isinstance(found, int) or found < 1:
            message = f"{message}: it is {found!r}"
            raise FormatError(message)
        return found
