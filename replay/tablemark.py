"""``RUN/shards/table.json``: which parameter table the run has now. Shards of another one are outdated.

Part of the shard format (docs/formats/shards.md); imports no torch.
"""

from __future__ import annotations

import json
from pathlib import Path

from recorder import durable
from replay.settings import VERSION
from replay.shardfile import FORMAT
from replay.shardfolder import FOLDER

TABLE_FILE = "table.json"


def mark_table(run: Path, table: str) -> None:
    """Note which parameter table the run has now: shards of another one are outdated.

    Parameters
    ----------
    run
        The run's folder.
    table
        The digest of the table.
    """
    if marked_table(run) != table:
        document = {"format": FORMAT, "version": VERSION, "parameter_table": table}
        durable.write_text(Path(run) / FOLDER / TABLE_FILE, json.dumps(document) + "\n")


def marked_table(run: Path) -> str | None:
    """Say which parameter table the run had when it was last replayed.

    Parameters
    ----------
    run
        The run's folder.

    Returns
    -------
    str or None
        The digest of the table; None where no replay has noted it.
    """
    try:
        document = json.loads((Path(run) / FOLDER / TABLE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    table = document.get("parameter_table") if isinstance(document, dict) else None
    return table if isinstance(table, str) else None
