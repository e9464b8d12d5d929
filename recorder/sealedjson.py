"""A JSON object in a file whose last entry is the checksum of all that stands before it."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recorder import durable
from recorder.errors import DamagedFileError, FormatError

_SEAL = ',\n "crc32": "'


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON object and its checksum, durably, replacing an older one.

    Parameters
    ----------
    path
        The file.
    document
        At least one entry; no NaN and no infinity.
    """
    durable.write_text(path, _sealed(json.dumps(document, indent=1, allow_nan=False).removesuffix("\n}")))


def read(path: Path, kind: tuple[str, int]) -> dict[str, Any]:
    """Read a JSON object.

    Parameters
    ----------
    path
        The file.
    kind
        The ``format`` and ``version`` that it should have. Of another one the checksum is not looked at: it is for the
        caller to refuse it.

    Returns
    -------
    dict
        With the checksum as its last entry.

    Raises
    ------
    FormatError
        If it is no JSON object.
    DamagedFileError
        If it fails its checksum.
    """
    try:
        text = path.read_text(encoding="utf-8")
        document = json.loads(text)
    except (OSError, ValueError) as error:
        message = f"{path}: cannot be read as JSON ({error})"
        raise FormatError(message) from error
    if not isinstance(document, dict):
        message = f"{path}: expected a JSON object, found {type(document).__name__}"
        raise FormatError(message)
    ours = (document.get("format"), document.get("version")) == kind
    if ours and text != _sealed(text.rpartition(_SEAL)[0]):
        message = f"{path}: is damaged: it fails its own CRC-32. Restore it from a copy"
        raise DamagedFileError(message)
    return document


def _sealed(text: str) -> str:
    # The last entry covers all that stands before it, so that a flipped bit anywhere shows.
    return f'{text}{_SEAL}{zlib.crc32(text.encode()):08x}"\n}}\n'
