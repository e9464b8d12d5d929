"""A parameter table in lines that a person can read: names that differ by a number alone stand in one line.

    encoder.layers.{0-5}.self_attn.k_proj.weight

is a line of six parameters. Ground floor: imports no torch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence

from recorder.placing import plain_name
from recorder.ranges import joined_ranges
from recorder.table import MODEL_LAYER, Parameter

Segment = str | tuple[int, ...]
"""Of a name, between its dots: a word, or the numbers that stand there."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """Parameters that are alike in all but numbers of their names.

    Parameters
    ----------
    segments
        Their name.
    layer_at
        Which of the segments counts their layers; None where none does.
    rows
        The parameters.
    """

    segments: tuple[Segment, ...]
    layer_at: int | None
    rows: tuple[Parameter, ...]

    @property
    def first(self) -> Parameter:
        """One that stands for all."""
        return self.rows[0]

    @property
    def name(self) -> str:
        """Their name, with ``{0-5}`` where there are several numbers."""
        return ".".join(segment if isinstance(segment, str) else in_words(segment) for segment in self.segments)

    @property
    def layers(self) -> str:
        """Their layers, such as ``encoder.0-5``."""
        if self.first.depth < 0:
            return self.first.layer
        depths = in_words(sorted({row.depth for row in self.rows}))
        return f"{self.first.stack}.{depths.strip('{}')}"


def in_words(numbers: Sequence[int]) -> str:
    """Write numbers as they stand in a line.

    Parameters
    ----------
    numbers
        Ascending.

    Returns
    -------
    str
        The number alone, or ranges in braces.

    Examples
    --------
    >>> in_words([3]), in_words([0, 1, 2, 5])
    ('3', '{0-2,5}')
    """
    if len(numbers) == 1:
        return str(numbers[0])
    ranges = joined_ranges([(number, number + 1) for number in numbers])
    texts = [str(start) if stop == start + 1 else f"{start}-{stop - 1}" for start, stop in ranges]
    return f"{{{','.join(texts)}}}"


def lines(rows: Sequence[Parameter], *, alike: Callable[[Parameter], object] = lambda row: None) -> list[Line]:
    """Put the rows of a table into lines.

    Parameters
    ----------
    rows
        The rows. Those of component ``other`` without a layer are told apart by every number but the one that seems to
        count layers: what they are is still to be said.
    alike
        What must also be the same for rows of one line.

    Returns
    -------
    list of Line
        In the order of their first rows; every row in exactly one.
    """
    positions = _layer_positions(rows)
    found = [Line(segments=_segments(row.name), layer_at=positions[row.name], rows=(row,)) for row in rows]
    found = _joined(found, lambda line: line.layer_at, alike)
    longest = max((len(line.segments) for line in found), default=0)
    for position in range(longest):
        found = _joined(found, functools.partial(_other_position, position), alike)
    return found


def _other_position(position: int, line: Line) -> int | None:
    placed = line.first.component != "other" or line.first.depth >= 0
    return position if placed and position != line.layer_at else None


def _segments(name: str) -> tuple[Segment, ...]:
    parts = plain_name(name).split(".")
    return tuple((int(part),) if part.isascii() and part.isdecimal() else part for part in parts)


def _joined(
    found: Iterable[Line], position_of: Callable[[Line], int | None], alike: Callable[[Parameter], object]
) -> list[Line]:
    # Lines that differ in the numbers at one position alone become one.
    together: dict[object, list[Line]] = {}
    for number, line in enumerate(found):
        at = position_of(line)
        key: object = number
        if at is not None and at < len(line.segments) and not isinstance(line.segments[at], str):
            counts = at == line.layer_at
            rest = (*line.segments[:at], None, *line.segments[at + 1 :])
            depths = None if counts else tuple(sorted({row.depth for row in line.rows}))
            key = (at, line.layer_at, rest, depths, _kind(line.first), alike(line.first))
        together.setdefault(key, []).append(line)
    return [_one(group, position_of(group[0])) for group in together.values()]


def _one(group: Sequence[Line], at: int | None) -> Line:
    if len(group) == 1 or at is None:
        return group[0]
    first = group[0]
    numbers = sorted({number for line in group for number in line.segments[at] if isinstance(number, int)})
    segments = (*first.segments[:at], tuple(numbers), *first.segments[at + 1 :])
    return dataclasses.replace(first, segments=segments, rows=tuple(row for line in group for row in line.rows))


def _kind(row: Parameter) -> tuple[object, ...]:
    # All that a line says but name and depth; a tied tensor stands for itself.
    tied = row.name if row.aliases or row.uses else ""
    return (
        *(row.stack, row.depth < 0, row.component, row.shape, row.dtype, row.status),
        *(row.unit_axis, row.heads, row.fused, row.repeats, tied),
    )


def _layer_positions(rows: Sequence[Parameter]) -> dict[str, int | None]:
    alike: dict[tuple[object, ...], list[Parameter]] = {}
    for row in rows:
        blank = tuple(segment if isinstance(segment, str) else 0 for segment in _segments(row.name))
        alike.setdefault((blank, row.depth < 0, row.component), []).append(row)
    modules = _prefixes_of_layers(rows)
    found: dict[str, int | None] = {}
    for group in alike.values():
        segments = [_segments(row.name) for row in group]
        numbered = [at for at, segment in enumerate(segments[0]) if not isinstance(segment, str)]
        if group[0].depth >= 0:
            counting = [at for at in numbered if all(s[at] == (r.depth,) for s, r in zip(segments, group, strict=True))]
        elif group[0].component == "other":
            counting = [at for at in numbered if all(s[:at] in modules for s in segments)]
        else:
            counting = []
        found |= dict.fromkeys((row.name for row in group), counting[0] if counting else None)
    return found


def _prefixes_of_layers(rows: Iterable[Parameter]) -> set[tuple[Segment, ...]]:
    # A numbered module that holds modules is taken for a layer: h.0 of h.0.attn.weight, not net.0 of net.0.bias.
    prefixes = set()
    for row in rows:
        segments = _segments(row.name)
        for at, segment in enumerate(segments):
            named = any(isinstance(before, str) for before in segments[:at])
            if not isinstance(segment, str) and named and len(segments) - at > 2:
                prefixes.add(segments[:at])
                break
    return prefixes


def shape_in_words(line: Line) -> str:
    """Say what the units of a line's parameters are.

    Parameters
    ----------
    line
        The line.

    Returns
    -------
    str
        Such as ``8 heads of 64 rows``; of a fused parameter that of every part.
    """
    row = line.first
    if not row.shape:
        return "1 number"
    one, several = {0: ("row", "rows"), 1: ("column", "columns")}.get(row.unit_axis, ("slice", "slices"))
    if len(row.shape) == 1:
        one, several = "entry", "entries"
    if row.fused:
        parts = [
            f"{part.component} "
            + (f"{part.heads} heads of {part.units // part.heads}" if part.heads else f"{part.units}")
            for part in row.parts
        ]
        turns = f", in {row.repeats} turns" if row.repeats > 1 else ""
        return f"{several}: {', '.join(parts)}{turns}"
    number = row.units // (row.heads or 1)
    of_heads = f"{row.heads} heads of " if row.heads else ""
    axis = f" of axis {row.unit_axis}" if row.unit_axis > 1 else ""
    return f"{of_heads}{number} {one if number == 1 else several}{axis}"


def components_in_words(row: Parameter) -> str:
    """Name the components of a row.

    Parameters
    ----------
    row
        The row.

    Returns
    -------
    str
        One, or those of its parts.
    """
    return "+".join(dict.fromkeys(part.component for part in row.parts))


def place_in_words(row: Parameter) -> str:
    """Say where a row belongs, shortly.

    Parameters
    ----------
    row
        The row.

    Returns
    -------
    str
        Layer if it has one, component, axis, heads.
    """
    layer = "" if row.layer == MODEL_LAYER else f"{row.stack} "
    heads = "+".join(str(part.heads) for part in row.parts if part.heads)
    axis = f", axis {row.unit_axis}" if row.unit_axis else ""
    tied = f"; uses {', '.join(components_in_words(use) for use in row.uses)}" if row.uses else ""
    return f"{layer}{components_in_words(row)}{axis}{f', {heads} heads' if heads else ''}{tied}"
