"""Which parameters to record: shell patterns over their names, to include and to exclude.

Ground floor: imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from recorder.errors import UsageError

EXCLUDE = "!"
"""A pattern that begins with it takes its names out again."""

_FEW = 3
_SIMILAR = 0.4  # a pattern is shorter than the names it means, so less than difflib's 0.6 must do


def select_names(names: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """Select names by patterns, in order: of the patterns that match a name, the last one decides.

    Parameters
    ----------
    names
        All names.
    patterns
        Shell patterns, case-sensitive; ``*`` matches dots too. ``!PATTERN`` excludes. If the first one excludes,
        everything is included to begin with, else nothing. Without any pattern everything is selected.

    Returns
    -------
    set of str
        The selected names; it may be empty.

    Raises
    ------
    UsageError
        If a pattern matches no name.

    Examples
    --------
    >>> sorted(select_names(["fc1.weight", "fc1.bias", "fc2.weight"], ["*.weight", "!fc2.*"]))
    ['fc1.weight']
    >>> sorted(select_names(["fc1.weight", "fc1.bias", "fc2.weight"], ["!fc1.*", "*.bias"]))
    ['fc1.bias', 'fc2.weight']
    """
    selected = set(names) if not patterns or patterns[0].startswith(EXCLUDE) else set()
    for pattern in patterns:
        matched = {name for name in names if fnmatchcase(name, pattern.removeprefix(EXCLUDE))}
        if not matched:
            raise UsageError(_no_match(pattern, names))
        if pattern.startswith(EXCLUDE):
            selected -= matched
        else:
            selected |= matched
    return selected


def _no_match(pattern: str, names: Sequence[str]) -> str:
    close = get_close_matches(pattern.removeprefix(EXCLUDE), names, n=_FEW, cutoff=_SIMILAR)
    offer = (
        f"did you mean {' or '.join(map(repr, close))}?"
        if close
        else f"there are {len(names)} names: {', '.join(map(repr, names[:_FEW]))}{', ...' * (len(names) > _FEW)}"
    )
    return f"the pattern {pattern!r} matches no parameter; {offer}"
