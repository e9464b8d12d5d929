"""Files that list examples, for ``--loss-data file:PATH``."""

from __future__ import annotations

import csv
from pathlib import Path

from recorder.errors import UsageError

INDEX, GROUP = "index", "group"


def read_examples(path: Path) -> dict[str | None, list[int]]:
    """Read which examples a file lists, and in which groups.

    Parameters
    ----------
    path
        A data set index on every line; or comma-separated values whose first line names the columns, ``index`` among
        them, and ``group`` where there are groups. Empty lines are passed over.

    Returns
    -------
    dict
        Group to its indices, groups in order of their names; the only key is None where there are no groups.

    Raises
    ------
    UsageError
        If the file cannot be read, lists nothing, an example twice, or something that is no index.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        message = f"{path}: cannot be read as a list of examples ({error})"
        raise UsageError(message) from error
    rows = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    columns = [INDEX]
    if rows and not _is_index(rows[0][1]):
        columns = [name.strip() for name in next(csv.reader([rows.pop(0)[1]]))]
        if INDEX not in columns:
            message = f"{path}: expected a column {INDEX!r} (and {GROUP!r} for groups), found {', '.join(columns)}"
            raise UsageError(message)
    groups: dict[str | None, list[int]] = {}
    seen: set[int] = set()
    for number, line in rows:
        values = dict(zip(columns, (value.strip() for value in next(csv.reader([line]))), strict=False))
        index, group = values.get(INDEX, ""), values.get(GROUP)
        if not _is_index(index) or (GROUP in columns and not group):
            message = f"{path}, line {number}: expected {' and '.join(columns)}, found {line!r}"
            raise UsageError(message)
        if int(index) in seen:
            message = f"{path}, line {number}: example {index} is listed twice"
            raise UsageError(message)
        seen.add(int(index))
        groups.setdefault(group, []).append(int(index))
    if not groups:
        message = f"{path}: lists no example"
        raise UsageError(message)
    return {group: groups[group] for group in sorted(groups, key=str)}


def _is_index(text: str) -> bool:
    text = text.strip()
    return text.isascii() and text.isdigit()
