"""The settings of a replay: everything that decides the bits of its shards, and their hash.

Part of the shard format (docs/formats/shards.md); imports no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from recorder.table import Parameter

VERSION = 1
"""Of the shard format."""


def digest_of_table(parameters: Iterable[Parameter]) -> str:
    """Digest a parameter table.

    Parameters
    ----------
    parameters
        Its rows.

    Returns
    -------
    str
        Twelve hexadecimal digits of the SHA-256 of the rows as canonical JSON.
    """
    text = json.dumps([parameter.to_dict() for parameter in parameters], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Everything that decides the content of a folder of shards.

    Parameters
    ----------
    run_id
        The run's identity, from its manifest.
    parameter_table
        `digest_of_table` of the run's parameter table: it changes when a parameter receives its first gradient.
    path
        ``recorded`` or ``chord``: along which path the loss change was allocated.
    loss_data
        Name of the loss data, such as ``batch`` or ``probe``.
    loss_data_settings
        What decides its examples, such as ``{"examples": 512, "seed": 0, "crc32": ...}``.
    rule
        Name of the quadrature rule.
    rtol, atol
        The tolerance of status `Status.CONVERGED`, relative to the measured change of the loss and in nats.
    dropout
        ``off`` or ``recorded``.
    chunk
        Steps to a shard.
    recipe
        Device, dtype, threads and library versions: what the bits of a result depend on.
    check_every
        The losses at both ends, and with them the residual, are taken at steps that are multiples of this.
    """

    run_id: str
    parameter_table: str
    path: str
    loss_data: str
    loss_data_settings: Mapping[str, Any]
    rule: str
    rtol: float
    atol: float
    dropout: str
    chunk: int
    recipe: Mapping[str, Any]
    check_every: int = 1

    @property
    def hash(self) -> str:
        """Twelve hexadecimal digits of the SHA-256 of the settings as canonical JSON."""
        text = json.dumps({"version": VERSION, **dataclasses.asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]
