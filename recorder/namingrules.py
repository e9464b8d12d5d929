"""Naming rules: tables, one TOML file for each model family, that say which parameter is which.

The rules are data. Nothing else in lossledger reads meaning from a parameter's name. `recorder.placing` applies them
to a live model; docs/models.md explains their language.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from importlib import resources
from typing import Any

from recorder.errors import FormatError
from recorder.table import COMPONENTS, FUSED

MODEL_PREFIX = "model:"
"""Before an attribute's path: look it up on the model itself instead of on the attention module."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PartRule:
    """One part of a tensor that holds several components.

    Parameters
    ----------
    component
        One of `recorder.table.COMPONENTS`.
    heads
        As in `NamingRule`.
    units
        Number of its units, in all repetitions together, or where that number is to be found, as for heads. None:
        the parts share what the others leave in proportion to their heads, equally where they have none.
    """

    component: str
    heads: int | str | None = None
    units: int | str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NamingRule:
    """One line of a family's table: which names it covers, and what they are.

    Parameters
    ----------
    pattern
        Matched against the whole name, without the names that wrappers insert (`recorder.placing.WRAPPERS`). Its
        groups ``stack`` and ``depth`` give the layer; ``tower`` is what stands before, and tells layers of the same
        stack and depth apart in a model with several; ``attention`` names the module that knows the number of heads.
        A group that names a module may end with a dot.
    component
        One of `recorder.table.COMPONENTS`, or `recorder.table.FUSED` with `parts`.
    unit_axis
        The axis whose slices are units.
    heads
        The number of heads; or the path of an attribute of the attention module that holds it (``num_heads``,
        ``config.num_key_value_heads``), or of the model (``model:config.n_head``); None where the parameter has none.
    parts
        Where the tensor holds several components: which, in the order of its units.
    repeats
        How often the order of the parts repeats itself along the units, or where that number is to be found.
    stack, depth
        The layer's coordinates where the pattern has no such group, or that finds nothing.
    classes
        Group of the pattern to a regular expression: the rule applies only if the module that the group names is of
        a class, or has a base class, of such a name; plain (``Conv1D``) or with its module
        (``torch.nn.modules.linear.Linear``).
    source
        Which rule this is, for error messages.
    optional
        Whether the rule does not apply where the model lacks its attributes, or a tensor its shape: so for the rules
        of the package. Of those that a user wrote it is an error.
    """

    pattern: re.Pattern[str]
    component: str
    unit_axis: int = 0
    heads: int | str | None = None
    parts: tuple[PartRule, ...] = ()
    repeats: int | str = 1
    stack: str | None = None
    depth: int | None = None
    classes: Mapping[str, re.Pattern[str]] = dataclasses.field(default_factory=dict)
    source: str = "naming rule"
    optional: bool = False

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            message = f"{self.source} is not understood: {problem}"
            raise FormatError(message)

    def _problem(self) -> str:
        groups = set(self.pattern.groupindex)
        components = [part.component for part in self.parts] or [self.component]
        unknown = [component for component in components if component not in COMPONENTS]
        if unknown:
            return f"component {unknown[0]!r} is none of {', '.join(COMPONENTS)}{_similar(unknown[0], COMPONENTS)}"
        if (self.component == FUSED) != bool(self.parts) or (self.parts and self.heads is not None):
            return "expected either a component, with its heads, or parts, each with their own"
        if self.repeats != 1 and not self.parts:
            return "only parts can repeat"
        numbers = [self.heads, self.repeats, *(n for part in self.parts for n in (part.heads, part.units))]
        for number in numbers:
            if isinstance(number, int) and (isinstance(number, bool) or number < 1):
                return f"{number!r} is no number of heads, units or repetitions"
            if isinstance(number, str) and not number.startswith(MODEL_PREFIX) and "attention" not in groups:
                return (
                    f"its pattern has no group 'attention' to name the module with the attribute {number!r}; begin "
                    f"the path with {MODEL_PREFIX!r} if it is the model's"
                )
        stack, depth = ("stack" in groups or self.stack is not None), ("depth" in groups or self.depth is not None)
        if stack != depth or (self.depth or 0) < 0:
            return "expected a stack and a depth of 0 or more, from the pattern or the rule, or neither"
        missing = set(self.classes) - groups
        if missing:
            return f"its pattern has no group {sorted(missing)[0]!r}, which `classes` names"
        return ""


def naming_rules() -> tuple[NamingRule, ...]:
    """Read the rules of every family that lossledger knows, in the order in which they are tried.

    Returns
    -------
    tuple of NamingRule
        The rules of all files in naming/, all `optional`. Those that ask for a class come first: families share
        names, and where they do the class decides.
    """
    files = sorted(
        (entry for entry in resources.files("recorder").joinpath("naming").iterdir() if entry.name.endswith(".toml")),
        key=lambda entry: entry.name,
    )
    rules = (rule for file in files for rule in parse_naming_rules(file.read_text(encoding="utf-8"), file.name))
    return tuple(
        sorted((dataclasses.replace(rule, optional=True) for rule in rules), key=lambda rule: not rule.classes)
    )


def parse_naming_rules(text: str, source: str) -> tuple[NamingRule, ...]:
    """Parse a table of naming rules.

    Parameters
    ----------
    text
        TOML, as docs/models.md describes it.
    source
        Where the text is from, for error messages.

    Returns
    -------
    tuple of NamingRule
        The rules in the file's order.

    Raises
    ------
    FormatError
        If the text is no TOML, or a rule has an unknown field, lacks one, contradicts itself, or its pattern is no
        regular expression.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = f"{source} is no TOML: {error}"
        raise FormatError(message) from error
    unknown = sorted(set(document) - {"fragments", "rule"})
    fragments, rows = document.get("fragments", {}), document.get("rule", [])
    if unknown or not isinstance(fragments, dict) or not isinstance(rows, list):
        message = f"{source}: expected a table [fragments] and tables [[rule]], found {unknown or sorted(document)}"
        raise FormatError(message)
    return tuple(
        naming_rule(row, f"{source}: naming rule {number}", fragments) for number, row in enumerate(rows, start=1)
    )


_TYPES: dict[str, tuple[type, ...]] = {
    "pattern": (str,),
    "component": (str,),
    "unit_axis": (int,),
    "heads": (int, str),
    "units": (int, str),
    "parts": (list,),
    "repeats": (int, str),
    "stack": (str,),
    "depth": (int,),
    "classes": (dict,),
}
_WORDS = {str: "a text", int: "an integer", list: "an array of tables", dict: "a table"}


def naming_rule(row: Any, source: str, fragments: Mapping[str, str] | None = None) -> NamingRule:
    """Make a rule of a table.

    Parameters
    ----------
    row
        Field name to value, as TOML gives it.
    source
        Where it is from, for error messages.
    fragments
        What stands for ``{name}`` in its patterns.

    Returns
    -------
    NamingRule
        The rule.

    Raises
    ------
    FormatError
        As from `parse_naming_rules`.
    """
    fragments = fragments or {}
    problem = _missing(row)
    if problem:
        message = f"{source} is not understood: {problem}"
        raise FormatError(message)
    try:
        values = _checked(row, set(_TYPES) - {"units"})
        if "parts" in values:
            fields = {field.name for field in dataclasses.fields(PartRule)}
            values["parts"] = tuple(PartRule(**_checked(part, fields)) for part in values["parts"])
            values.setdefault("component", FUSED)
        values["pattern"] = re.compile(_filled_in(values["pattern"], fragments))
        classes = values.get("classes", {}).items()
        values["classes"] = {group: re.compile(_filled_in(name, fragments)) for group, name in classes}
        return NamingRule(**values, source=source)
    except (re.error, TypeError) as error:
        message = f"{source} is not understood: {error}"
        raise FormatError(message) from error


def _missing(row: Any) -> str:
    if isinstance(row, dict) and not set(row) - set(_TYPES):
        if "pattern" not in row:
            return "it has no field 'pattern'"
        if not {"component", "parts"} & set(row):
            return "it has no field 'component' (or 'parts', where one tensor holds several components)"
    return ""


def _checked(row: Any, fields: set[str]) -> dict[str, Any]:
    if not isinstance(row, dict):
        message = f"expected a table, found {row!r}"
        raise TypeError(message)
    for name, value in row.items():
        if name not in fields:
            message = f"field {name!r} is none of {', '.join(sorted(fields))}{_similar(name, fields)}"
            raise TypeError(message)
        if not isinstance(value, _TYPES[name]) or (isinstance(value, bool) and str not in _TYPES[name]):
            expected = " or ".join(_WORDS[kind] for kind in _TYPES[name])
            message = f"{name} = {value!r} is of the wrong type: expected {expected}"
            raise TypeError(message)
    return dict(row)


def _similar(word: str, words: Iterable[str]) -> str:
    close = get_close_matches(word, list(words), n=2)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def _filled_in(text: str, fragments: Mapping[str, str]) -> str:
    for name, fragment in fragments.items():
        text = text.replace(f"{{{name}}}", fragment)
    return text
