"""A user's own map: which parameter of their model is which, as a file of naming rules or as a function.

Its rules are tried before those of the package, and one that does not fit the model is an error. The language is that
of the package's own files (docs/maps.md).
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recorder.errors import FormatError, UsageError
from recorder.namingrules import NamingRule, naming_rule, naming_rules, parse_naming_rules
from recorder.parameters import parameter_table
from recorder.placing import Place, plain_name
from recorder.processes import this_process

if TYPE_CHECKING:
    import torch
    from torch import nn

    from recorder.table import Parameter

    PlaceFunction = Callable[[str, torch.nn.Parameter, nn.Module], Mapping[str, Any] | Place | None]
    Map = str | Path | Sequence[NamingRule] | PlaceFunction

_NAMED = 3
_SIMILAR = 0.4  # a pattern is no name, so less than difflib's 0.6 must do


class UnmatchedRuleWarning(UserWarning):
    """A rule of a user's map decides no parameter of the model."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class UserMap:
    """A map as the user gave it.

    Parameters
    ----------
    source
        In words, where it is from.
    text
        The file's text; empty of a function and of rules.
    rules
        Its rules; none of a function.
    function
        The function, if it is one.
    """

    source: str
    text: str = ""
    rules: tuple[NamingRule, ...] = ()
    function: PlaceFunction | None = None

    def rules_for(self, model: nn.Module) -> tuple[NamingRule, ...]:
        """Give the map's rules for a live model; a function is asked about every name.

        Parameters
        ----------
        model
            The live module.

        Returns
        -------
        tuple of NamingRule
            To be tried before those of the package.
        """
        if self.function is None:
            return self.rules
        named = model.named_parameters(remove_duplicate=False)
        found = [(name, self.function(name, parameter, model)) for name, parameter in named]
        return tuple(
            _rule_of(name, place, f"{self.source}, for parameter {name!r}")
            for name, place in found
            if place is not None
        )

    def provenance(self) -> dict[str, str]:
        """Return what a run keeps of the map.

        Returns
        -------
        dict
            ``source``, ``text`` and ``created``: ISO 8601, UTC.
        """
        created = datetime.now(UTC).isoformat(timespec="seconds")
        return {"source": self.source, "text": self.text, "created": created}


def read_map(given: Map | UserMap) -> UserMap:
    """Take a map in any of the ways in which users give one.

    Parameters
    ----------
    given
        The path of a TOML file; naming rules; or a function of a parameter's name, the parameter and the model that
        returns its place: a mapping with the fields of a rule but for ``pattern``, a `Place`, or None where it leaves
        the parameter to the package's rules.

    Returns
    -------
    UserMap
        The map.

    Raises
    ------
    UsageError
        If there is no such file, it holds no rule, or a rule is not understood.
    """
    if isinstance(given, UserMap):
        return given
    if callable(given):
        return UserMap(source=f"the function {_name_of(given)}", function=given)
    if not isinstance(given, str | Path):
        rules = tuple(given)
        if not all(isinstance(rule, NamingRule) for rule in rules):
            message = f"map: expected the path of a TOML file, naming rules or a function, found {given!r}"
            raise UsageError(message)
        return UserMap(source="naming rules", rules=rules)
    try:
        text = Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        message = f"the map {given} cannot be read: {reason}"
        raise UsageError(message) from error
    try:
        rules = parse_naming_rules(text, str(given))
    except FormatError as error:
        raise UsageError(str(error)) from error
    if not rules:
        message = f"the map {given} holds no rule: expected tables [[rule]] with pattern and component"
        raise UsageError(message)
    return UserMap(source=str(given), text=text, rules=rules)


def table_of(
    model: nn.Module, given: UserMap | None, *, masters: Mapping[str, torch.Tensor] | None = None
) -> tuple[Parameter, ...]:
    """Tabulate a model's parameters by a user's map, and where that says nothing by the package's rules.

    Parameters
    ----------
    model
        The live module.
    given
        The map; None where there is none.
    masters
        As for `recorder.parameters.parameter_table`.

    Returns
    -------
    tuple of Parameter
        The parameter table. Rules that decide no parameter are named in an `UnmatchedRuleWarning`.

    Raises
    ------
    UsageError
        If a rule of the map does not fit the model.
    """
    if given is None:
        return parameter_table(model, masters=masters)
    try:
        rules = given.rules_for(model)
        table = parameter_table(model, (*rules, *naming_rules()), masters=masters)
    except FormatError as error:
        raise UsageError(str(error)) from error
    rank, _ = this_process()
    if given.function is None and rank == 0:
        for line in unmatched(rules, (name for row in table for name in (row.name, *row.aliases))):
            warnings.warn(line, UnmatchedRuleWarning, stacklevel=2)
    return table


def unmatched(rules: Sequence[NamingRule], names: Iterable[str]) -> list[str]:
    """Find the rules that decide no parameter.

    Parameters
    ----------
    rules
        In the order in which they are tried.
    names
        Of all parameters, those of tied ones too.

    Returns
    -------
    list of str
        A line for each, with the names that may have been meant, or the rule that comes before it.
    """
    plain = [plain_name(name) for name in names]
    undecided, lines = dict.fromkeys(plain), []
    for position, rule in enumerate(rules):
        matched = [name for name in plain if rule.pattern.fullmatch(name)]
        decided = [name for name in matched if name in undecided]
        if not matched:
            close = get_close_matches(rule.pattern.pattern.replace("\\", ""), plain, n=_NAMED, cutoff=_SIMILAR)
            offer = (
                f"did you mean {' or '.join(map(repr, close))}?" if close else f"there is, for example, {plain[0]!r}"
            )
            lines.append(f"{rule.source}: the pattern {rule.pattern.pattern!r} matches no parameter; {offer}")
        elif not decided:
            first = next(other for other in rules[:position] if other.pattern.fullmatch(matched[0]))
            lines.append(f"{rule.source} decides no parameter: {first.source} matches {matched[0]!r} before it")
        # A rule that asks for classes may leave its names to those after it.
        for name in () if rule.classes else decided:
            del undecided[name]
    return lines


def _rule_of(name: str, place: Any, source: str) -> NamingRule:
    if isinstance(place, Place):
        parts = [{"component": part.component, "units": part.units, "heads": part.heads} for part in place.fused]
        place = {
            **({"parts": parts} if parts else {"component": place.component, "heads": place.heads}),
            **({} if place.depth < 0 else {"stack": place.stack, "depth": place.depth}),
            "unit_axis": place.unit_axis,
            "repeats": place.repeats,
        }
    if not isinstance(place, Mapping):
        message = (
            f"{source}: expected a mapping such as {{'component': 'key', 'heads': 8}}, a Place or None, found {place!r}"
        )
        raise UsageError(message)
    row = _without_nothing(place)
    if isinstance(row.get("parts"), list | tuple):
        row["parts"] = [_without_nothing(part) if isinstance(part, Mapping) else part for part in row["parts"]]
    try:
        return naming_rule({**row, "pattern": re.escape(plain_name(name))}, source)
    except FormatError as error:
        raise UsageError(str(error)) from error


def _without_nothing(fields: Mapping[str, Any]) -> dict[str, Any]:
    # No heads are 0 heads in a row of the table, and no such field in a rule.
    return {name: value for name, value in fields.items() if value is not None and (name, value) != ("heads", 0)}


def _name_of(function: Any) -> str:
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", type(function).__qualname__)
    return f"{module}.{name}"
