"""Whether checkpoints are of one training and of the model that the workload builds: names, shapes, dtypes of all."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from recorder.errors import UsageError
from recorder.importing.matching import Match, Model, match

if TYPE_CHECKING:
    from recorder.importing.found import Found, Source
    from recorder.importing.wish import Wish

FEWEST = 2
_MOST_NAMED = 6


def ordered(wish: Wish, source: Source) -> list[list[Found]]:
    """Order checkpoints by the number of updates.

    Parameters
    ----------
    wish
        What the user asks for.
    source
        What was found.

    Returns
    -------
    list of list of Found
        Several of one number stand together, until it is known whether they are copies of each other.

    Raises
    ------
    UsageError
        If they are of fewer than two numbers.
    """
    by_step: dict[int, list[Found]] = {}
    for found in source.checkpoints:
        by_step.setdefault(found.step, []).append(found)
    if len(by_step) < FEWEST:
        named = ", ".join(f"{found.path.name} after {found.step} updates" for found in source.checkpoints) or "none"
        message = (
            f"{wish.place}: expected checkpoints of {FEWEST} different numbers of updates or more, for what "
            f"is allocated is the change between two; found {named} (kind {source.kind})"
        )
        raise UsageError(message)
    return [by_step[step] for step in sorted(by_step)]


def matches_of(wish: Wish, checkpoints: Sequence[Sequence[Found]], model: Model) -> dict[Path, Match]:
    """Compare names, shapes and dtypes of all checkpoints with the model, before anything is written.

    Parameters
    ----------
    wish
        What the user asks for.
    checkpoints
        As `ordered` gives them.
    model
        What the model expects.

    Returns
    -------
    dict of Path to Match
        For every checkpoint which of its tensors is which of the model's.

    Raises
    ------
    UsageError
        If any does not fit: everything that was found in all of them, in one message.
    """
    matches: dict[Path, Match] = {}
    problems: dict[str, list[Found]] = {}
    dtypes: dict[str, dict[str, Found]] = {}
    for found in itertools.chain(*checkpoints):
        facts = found.open().facts
        one = matches[found.path] = match(model, facts, prefix=wish.prefix, ignored=wish.ignored)
        for problem in one.problems:
            problems.setdefault(problem, []).append(found)
        for name in model.parameters:
            if name in one.tensors:
                dtypes.setdefault(name, {}).setdefault(facts[one.tensors[name]].dtype, found)
    sentences = [f"in {_named(of, len(matches))}: {problem}" for problem, of in problems.items()]
    mixed = {name: of for name, of in dtypes.items() if len(of) > 1}
    if mixed:
        name, by_dtype = next(iter(mixed.items()))
        which = " and ".join(f"{dtype} in {found.path.name}" for dtype, found in by_dtype.items())
        sentences.append(
            f"{len(mixed)} parameters change their dtype between checkpoints, which would pass rounding off as "
            f"learning: {name!r} is {which}"
        )
    if sentences:
        message = (
            f"{wish.place}: the checkpoints are not of the model that {wish.workload} builds: "
            f"{'; '.join(sentences)}. Let the workload build the model that was trained"
        )
        raise UsageError(message)
    _check_buffers(wish, matches, model)
    return matches


def _check_buffers(wish: Wish, matches: Mapping[Path, Match], model: Model) -> None:
    for name in model.buffers:
        there = [path for path, one in matches.items() if name in one.tensors]
        if 0 < len(there) < len(matches):
            lacking = next(path for path in matches if path not in there)
            message = (
                f"{wish.place}: buffer {name!r} is in {there[0].name} and not in {lacking.name}; import "
                "checkpoints of one training"
            )
            raise UsageError(message)


def _named(of: Sequence[Found], all_of: int) -> str:
    if len(of) == all_of:
        return f"all {all_of} checkpoints"
    names = ", ".join(found.path.name for found in of[:_MOST_NAMED])
    return names + (f" and {len(of) - _MOST_NAMED} more" if len(of) > _MOST_NAMED else "")
