"""The end of an import: the manifest, and what the user should know of what was found."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import platform
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import torch

from recorder import tensorfile
from recorder.checkpoints import HARD_LINK, SYMBOLIC_LINK, WRITTEN, Record
from recorder.errors import UsageError
from recorder.manifest import CHORD, Attempt, Manifest, OptimizerFacts, Trainer

if TYPE_CHECKING:
    from recorder.importing.found import Source
    from recorder.importing.weights import Facts
    from recorder.importing.wish import Wish
    from recorder.table import Parameter

_MOST_NAMED = 6


def manifest_of(
    wish: Wish,
    source: Source,
    model: torch.nn.Module,
    table: Sequence[Parameter],
    facts: Mapping[str, Facts],
    records: Sequence[Record],
    before: Manifest | None,
) -> Manifest:
    """Make the manifest of a finished import.

    Parameters
    ----------
    wish
        What the user asked for.
    source
        What was found.
    model, table
        The model that the workload builds, and its parameter table.
    facts
        Name of a parameter to shape and dtype in the checkpoints.
    records
        The checkpoints, in the order of updates.
    before
        The manifest of an earlier import into the run; None if there is none.

    Returns
    -------
    Manifest
        Not written yet.

    Raises
    ------
    UsageError
        If nothing differs between any two checkpoints.
    """
    parameters = tuple(_row(parameter, facts[parameter.name], records) for parameter in table)
    if not any(row.trained for row in parameters):
        message = (
            f"{wish.place}: all {len(records)} checkpoints are the same, bit for bit: there is nothing to allocate"
        )
        raise UsageError(message)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    stops = tuple(record.step for record in records)
    created = before.attempt.created if before else now
    attempt = Attempt(number=1, first_step=stops[0], joined="first", state="complete", created=created, stop=stops[-1])
    provenance = {
        "created": created,
        "imported": now,
        "source": "" if wish.source is None else str(wish.source.absolute()),
        "kind": source.kind,
        "checkpoints": list(stops),
        "lossledger": importlib.metadata.version("lossledger"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return Manifest(
        run_id=before.run_id if before else uuid.uuid4().hex,
        path=CHORD,
        workload=wish.workload,
        trainer=Trainer(name=f"checkpoints ({source.kind})", version=""),
        optimizer=OptimizerFacts(name="", groups=(), fresh=True),
        recipe={},
        batches="none",
        parameters=parameters,
        attempts=(attempt,),
        buffers=_buffers(model, records),
        checkpoints=stops,
        provenance=provenance,
    )


def _row(parameter: Parameter, facts: Facts, records: Sequence[Record]) -> Parameter:
    # A tensor that is the same in all checkpoints was moved by no update, whatever the model says of gradients now; one
    # that differs was trained, also where the workload freezes it.
    moved = len({record.tensors[parameter.name].crc32 for record in records}) > 1
    of_model = None if facts.dtype == parameter.computed_dtype else parameter.computed_dtype
    changes: dict[str, Any] = {"dtype": facts.dtype, "model_dtype": of_model}
    return dataclasses.replace(
        parameter,
        **changes,
        status="trained" if moved else "untrained",
        uses=tuple(dataclasses.replace(use, **changes) for use in parameter.uses),
    )


def _buffers(model: torch.nn.Module, records: Sequence[Record]) -> tuple[str, ...]:
    # Those that the workload's model would not have by itself at every checkpoint.
    built = dict(model.named_buffers(remove_duplicate=False))
    return tuple(
        name
        for name, tensor in built.items()
        if name in records[0].tensors
        and {record.tensors[name].crc32 for record in records} != {tensorfile.checksum(tensor.cpu())}
    )


def sentences(records: Sequence[Record], manifest: Manifest) -> list[str]:
    """Say what the user should know of what was imported.

    Parameters
    ----------
    records
        The checkpoints, in the order of updates.
    manifest
        Of the run.

    Returns
    -------
    list of str
        One sentence for each thing.
    """
    told_of = []
    kinds_of_files: dict[str, int] = {}
    for file in itertools.chain.from_iterable(record.files for record in records):
        kinds_of_files[file.kind] = kinds_of_files.get(file.kind, 0) + 1
    words = {WRITTEN: "written", HARD_LINK: "linked", SYMBOLIC_LINK: "linked by name to another file system"}
    told = ", ".join(f"{count} files {words[kind]}" for kind, count in kinds_of_files.items())
    keep = "; keep the source" if SYMBOLIC_LINK in kinds_of_files else ""
    told_of.append(f"{len(records)} checkpoints after {_numbers(manifest.checkpoints)} updates: {told}{keep}")
    same = [
        f"{before.step} and {after.step}"
        for before, after in itertools.pairwise(records)
        if _contents(before) == _contents(after)
    ]
    if same:
        told_of.append(
            f"identical neighbours: after {'; '.join(same[:_MOST_NAMED])} updates the checkpoints are the same, "
            "bit for bit. They are kept, and their LCA is 0; is one of them a copy under a wrong number?"
        )
    still = [row for row in manifest.parameters if not row.trained]
    if still:
        names = ", ".join(row.name for row in still[:_MOST_NAMED]) + (", ..." if len(still) > _MOST_NAMED else "")
        told_of.append(
            f"{len(still)} parameters ({sum(row.size for row in still):,} entries) are the same in all checkpoints, so "
            f"they count as untrained: {names}"
        )
    unmapped = [row.name for row in manifest.trained if row.component == "other"]
    if unmapped:
        names = ", ".join(unmapped[:_MOST_NAMED]) + (", ..." if len(unmapped) > _MOST_NAMED else "")
        told_of.append(f"{len(unmapped)} parameters match no naming rule and go to component 'other': {names}")
    other = sorted({(row.model_dtype, row.dtype) for row in manifest.parameters if row.model_dtype})
    told_of += [f"the model is built in {of_model}, the checkpoints are in {dtype}" for of_model, dtype in other]
    if manifest.buffers:
        told_of.append(f"buffers taken from the checkpoints: {', '.join(manifest.buffers[:_MOST_NAMED])}")
    return told_of


def _contents(record: Record) -> dict[str, int]:
    return {name: stored.crc32 for name, stored in record.tensors.items()}


def _numbers(stops: Sequence[int]) -> str:
    if len(stops) <= _MOST_NAMED:
        return ", ".join(map(str, stops))
    return f"{stops[0]}, {stops[1]}, ... {stops[-1]}"
