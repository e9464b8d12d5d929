"""A parameter table written as naming rules: to be corrected by hand and read back.

What has its place gets a rule that puts it there again. What fell to ``other`` gets one that says so, with the layer
that its name suggests; the component is left to the user. Ground floor: imports no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

from recorder.maplines import Line, lines
from recorder.placing import plain_name
from recorder.table import COMPONENTS, Parameter

_HEAD = f"""\
# Which parameter is which. A rule holds for the parameters whose whole name matches `pattern`; the first one decides.
#   component   one of {" ".join(COMPONENTS)}
#   stack       the layers that `depth`, a group of the pattern or a field, counts; neither of both outside any layer
#   unit_axis   the axis whose slices are units: 0 for rows, 1 for columns (of out and W2)
#   heads       number of attention heads, each so many consecutive units; none where there is no such field
#   parts       instead of component, where one tensor holds several, in the order of its units:
#               parts = [{{component = "query", heads = 8}}, {{component = "key", heads = 8}}, ...]
"""
_STACKS = ("encoder", "decoder")


def skeleton(parameters: Sequence[Parameter], *, only_other: bool = False) -> str:
    """Write the rules that make a table.

    Parameters
    ----------
    parameters
        The table.
    only_other
        Leave out what has its place.

    Returns
    -------
    str
        TOML, as `recorder.namingrules.parse_naming_rules` reads it.
    """
    names = [plain_name(name) for row in parameters for name in (row.name, *row.aliases)]
    unsaid = [row for row in parameters if is_unsaid(row)]
    said = [] if only_other else [row for row in parameters if not is_unsaid(row)]
    stacks = _stacks(parameters)
    found = [rule for line in lines(unsaid) for rule in _rules_of_unsaid(line, names, stacks)]
    found += [rule for line in lines(said) for rule in _rules_of_said(line, names)]
    return "\n".join([_HEAD, *found])


def is_unsaid(row: Parameter) -> bool:
    """Tell whether nobody has said what a parameter is.

    Parameters
    ----------
    row
        Its row.

    Returns
    -------
    bool
        Whether it, and each of its uses, is of component ``other``.
    """
    return all(use.component == "other" for use in row.uses or (row,))


def _stacks(parameters: Sequence[Parameter]) -> dict[tuple[object, ...], str]:
    # What stands before the number of a layer, and the stack that it was said to be.
    placed = [line for line in lines([row for row in parameters if row.depth >= 0]) if line.layer_at is not None]
    return {line.segments[: line.layer_at]: line.first.stack for line in placed}


def _rules_of_unsaid(line: Line, names: Sequence[str], stacks: dict[tuple[object, ...], str]) -> Iterator[str]:
    yield _rule(line, names, stacks)
    for name in line.first.aliases:
        comment = f"{name}   the same tensor as {line.first.name}: a use of its own, if it has a component of its own"
        yield _text([comment], re.escape(plain_name(name)), {"component": "other"})


def _rules_of_said(line: Line, names: Sequence[str]) -> Iterator[str]:
    if not line.first.aliases:
        yield _rule(line, names, {})
        return
    # A tied tensor is a line of its own: one rule for each use, whatever its names are.
    for use in line.first.uses or (line.first,):
        pattern = "|".join(re.escape(plain_name(name)) for name in (use.name, *use.aliases))
        yield _text([f"a use of {line.first.name}"], pattern, _fields(use))


def _rule(line: Line, names: Sequence[str], stacks: dict[tuple[object, ...], str]) -> str:
    row, unsaid = line.first, is_unsaid(line.first)
    count = "1 tensor" if len(line.rows) == 1 else f"{len(line.rows)} tensors"
    comments = [f"{line.name}   {count} of shape {row.shape}"]
    fields = _fields(row)
    if unsaid and row.depth < 0 and line.layer_at is not None:
        before = line.segments[: line.layer_at]
        words = [word for word in before if isinstance(word, str)]
        of_words = [word for word in words if word in _STACKS] or words[-1:]
        fields["stack"] = stacks.get(before) or of_words[0]
    counted = line.layer_at is not None and "stack" in fields
    if counted:
        fields.pop("depth", None)
    return _text(comments, _pattern(line, names, counted=counted), fields)


def _fields(row: Parameter) -> dict[str, str]:
    fields = {"stack": row.stack, "depth": str(row.depth)} if row.depth >= 0 else {}
    if row.fused:
        parts = [
            f'{{component = "{part.component}", units = {part.units}'
            + (f", heads = {part.heads}}}" if part.heads else "}")
            for part in row.fused
        ]
        fields["parts"] = f"[{', '.join(parts)}]"
    else:
        fields["component"] = row.component
    numbers = {"unit_axis": (row.unit_axis, 0), "heads": (row.heads, 0), "repeats": (row.repeats, 1)}
    return fields | {name: str(value) for name, (value, default) in numbers.items() if value != default}


def _pattern(line: Line, names: Sequence[str], *, counted: bool) -> str:
    rows = {plain_name(row.name) for row in line.rows}

    def written(*, exact: bool) -> str:
        texts = []
        for at, segment in enumerate(line.segments):
            if isinstance(segment, str):
                texts.append(re.escape(segment))
                continue
            numbers = "|".join(map(str, segment))
            any_number = numbers if exact or len(segment) == 1 else r"\d+"
            if counted and at == line.layer_at:
                texts.append(f"(?P<depth>{any_number})")
            else:
                texts.append(f"(?:{any_number})" if "|" in any_number else any_number)
        return r"\.".join(texts)

    loose = written(exact=False)
    return loose if {name for name in names if re.fullmatch(loose, name)} == rows else written(exact=True)


def _text(comments: Sequence[str], pattern: str, fields: dict[str, str]) -> str:
    plain = {"component", "stack"}
    entries = {name: json.dumps(value) if name in plain else value for name, value in fields.items()}
    entries = {"pattern": f"'{pattern}'" if "'" not in pattern else json.dumps(pattern)} | entries
    order = ("pattern", "component", "parts", "repeats", "stack", "depth", "unit_axis", "heads")
    return (
        "\n".join(
            [
                *(f"# {comment}" for comment in comments),
                "[[rule]]",
                *(f"{name} = {entries[name]}" for name in order if name in entries),
            ]
        )
        + "\n"
    )
