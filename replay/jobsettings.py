"""What decides the bits of a job's shards on one loss data, and what a cube of them says of the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from recorder.recipe import current_recipe
from replay import kernels
from replay.settings import Settings, digest_of_table

if TYPE_CHECKING:
    import torch

    from recorder.manifest import Manifest
    from recorder.table import Parameter
    from replay.job import Job
    from replay.lossdata import LossData
    from replay.precision import Precision


def settings_of(
    job: Job,
    manifest: Manifest,
    parameters: Iterable[Parameter],
    data: LossData,
    *,
    dropout: str,
    precision: Precision,
    device: torch.device,
) -> Settings:
    """Put together the settings of a job's shards.

    Parameters
    ----------
    job
        What to do.
    manifest
        The run's.
    parameters
        The rows of the ledger.
    data
        The loss data.
    dropout
        How it is measured: ``off`` or ``recorded``.
    precision
        In which numbers.
    device
        Where.

    Returns
    -------
    Settings
        With the recipe of this process.
    """
    return Settings(
        run_id=manifest.run_id,
        parameter_table=digest_of_table(parameters),
        path=manifest.path,
        loss_data=data.name,
        loss_data_settings=data.settings,
        rule=job.rule,
        rtol=job.rtol,
        atol=job.atol,
        dropout=dropout,
        chunk=job.chunk,
        recipe={
            **current_recipe(device),
            "dtype": precision.name,
            "micro_batch": data.micro_batch,
            "attention": kernels.attention(device),
        },
        check_every=job.check_every,
    )


def provenance_of(manifest: Manifest) -> dict[str, Any]:
    """Take from a manifest what a cube carries along.

    Parameters
    ----------
    manifest
        The run's.

    Returns
    -------
    dict
        A JSON object.
    """
    found = manifest.correction
    return {
        "run": dict(manifest.provenance),
        "trainer": dataclasses.asdict(manifest.trainer),
        "recipe": dict(manifest.recipe),
        "buffers": list(manifest.buffers),
        **({} if found is None else {"map": {"source": found.source, "text": found.text, "created": found.created}}),
    }
