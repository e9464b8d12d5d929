"""``settings.json``: what all shards of a folder were computed with, and the parameter table they are of.

Part of the shard format (docs/formats/shards.md); imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from recorder import durable
from recorder.errors import FormatError
from recorder.table import Parameter
from replay.settings import VERSION, Settings
from replay.shardfile import FORMAT

SETTINGS_FILE = "settings.json"


def write_settings(
    folder: Path, settings: Settings, parameters: Iterable[Parameter], provenance: Mapping[str, Any]
) -> None:
    """Write a folder's settings; the same ones that are there already are not written again.

    Parameters
    ----------
    folder
        ``RUN/shards/<settings-hash>``, which exists.
    settings
        What its shards are computed with.
    parameters
        The run's parameter table, untrained parameters included.
    provenance
        The run's manifest entries that a cube carries along: any JSON object.
    """
    document = {
        "format": FORMAT,
        "version": VERSION,
        "settings": dataclasses.asdict(settings),
        "parameters": [parameter.to_dict() for parameter in parameters],
        "provenance": provenance,
    }
    text = json.dumps(document, indent=1, sort_keys=True) + "\n"
    file = folder / SETTINGS_FILE
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        durable.write_text(file, text)


def read_settings(folder: Path) -> tuple[Settings, list[Parameter], Mapping[str, Any]]:
    """Read a folder's settings.

    Parameters
    ----------
    folder
        ``RUN/shards/<settings-hash>``.

    Returns
    -------
    settings : Settings
        What its shards were computed with.
    parameters : list of Parameter
        The run's parameter table, untrained parameters included.
    provenance : mapping
        The run's manifest entries that a cube carries along.

    Raises
    ------
    FormatError
        If the file is missing, of another version, or not understood.
    """
    file = folder / SETTINGS_FILE
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = f"{file}: cannot be read as the settings of a folder of shards ({error})"
        raise FormatError(message) from error
    if not isinstance(document, dict):
        message = f"{file}: expected a JSON object, found {type(document).__name__}"
        raise FormatError(message)
    if document.get("format") != FORMAT or document.get("version") != VERSION:
        message = (
            f"{file}: expected format {FORMAT} version {VERSION}, found {document.get('format')!r} "
            f"version {document.get('version')!r}. Run python -m replay again with this lossledger."
        )
        raise FormatError(message)
    try:
        settings = Settings(**document["settings"])
        parameters = [Parameter.from_dict(row) for row in document["parameters"]]
        provenance = document["provenance"]
    except (KeyError, TypeError) as error:
        message = f"{file}: a field of the settings is missing or unknown ({error})"
        raise FormatError(message) from error
    return settings, parameters, provenance
