"""The run's manifest: what is recorded once, in `RUN/manifest.json`.

Part of the run format (`recorder.runformat`, docs/formats/run.md). Ground floor: imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recorder import sealedjson
from recorder.errors import FormatError, UsageError
from recorder.table import Parameter

FORMAT = "lossledger-run"
VERSION = 1
MANIFEST_FILE = "manifest.json"

RECORDED, CHORD = "recorded", "chord"
"""The paths of a run: every update as the optimizer made it, or straight lines between checkpoints far apart."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Trainer:
    """Which program trained, and what replay needs to rebuild it.

    Parameters
    ----------
    name
        ``torch`` for a loop with `recorder.watch`, or the trainer's library; of a run of path ``chord``, what kind of
        checkpoints it was made of.
    version
        Of that library.
    arguments
        Its command line, where it has one.
    directory
        Where it ran: relative paths in `arguments` start here.
    """

    name: str
    version: str
    arguments: tuple[str, ...] = ()
    directory: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerFacts:
    """What the optimizer was.

    Parameters
    ----------
    name
        Qualified class name.
    groups
        For every parameter group its hyperparameters (JSON types) and, under ``parameters``, the names it updates.
    fresh
        Whether it had no state when the recording began.
    """

    name: str
    groups: tuple[Mapping[str, Any], ...]
    fresh: bool


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One process (or group of processes) that recorded into the run: the first, or one restarted from a checkpoint.

    Parameters
    ----------
    number
        From 1.
    first_step
        Its first step. Steps of earlier attempts from there on are replaced, and kept.
    joined
        How its first parameters were found to be those that the run holds: ``first``, ``verified``, or
        ``not verified: <why>``.
    state
        ``recording``, ``complete``, or ``incomplete: <why>``.
    processes
        Number of processes of the data-parallel training, each with micro-batches of its own.
    created
        When it began: ISO 8601, UTC.
    stop
        One more than its last recorded step, told when it ends; None while it records, and of a killed one.
    """

    number: int
    first_step: int
    joined: str
    state: str
    processes: int = 1
    created: str = ""
    stop: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Correction:
    """The user's later word on which parameter is which.

    Parameters
    ----------
    source
        In words, where it is from: the map's file, or the package's rules.
    text
        The file's text; empty where there was none.
    created
        When: ISO 8601, UTC.
    recorded
        Name to place of every parameter that it moved, as that was recorded: fields of its row.
    """

    source: str
    text: str
    created: str
    recorded: Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What is recorded once for a run.

    Parameters
    ----------
    run_id
        Identity of the run: 32 hexadecimal digits.
    path
        ``recorded``: every step's parameters are the optimizer's own. ``chord``: they are checkpoints, and what lies
        between them is not known.
    workload
        ``module:function`` that rebuilds model, batches and loss; None where the trainer's arguments do.
    trainer
        The training program.
    optimizer
        The optimizer.
    recipe
        What the training's bits depend on (`recorder.recipe.current_recipe`).
    batches
        ``store`` or ``indices``: whether the tensors of every micro-batch were stored.
    steps
        Which steps are recorded (`recorder.selection.StepSelection`).
    parameters
        The parameter table.
    attempts
        All attempts, in order; the last one is, or was, recording.
    buffers
        Names of the model's buffers that each θ is recorded with.
    files
        Name to CRC-32 of every file in ``trainer/``.
    unrecorded_changes
        Names of tensors that changed during training although no step records them: buffers, and parameters of an
        optimizer that was not watched.
    checkpoints
        Of a run of path ``chord``: after how many updates each of its checkpoints was taken, ascending.
    provenance
        Versions and time of creation.
    correction
        Where the places in `parameters` are not those that were recorded: what they are from, and the recorded ones.
    """

    run_id: str
    path: str
    workload: str | None
    trainer: Trainer
    optimizer: OptimizerFacts
    recipe: Mapping[str, Any]
    batches: str
    parameters: tuple[Parameter, ...]
    attempts: tuple[Attempt, ...]
    steps: str = "all"
    buffers: tuple[str, ...] = ()
    files: Mapping[str, int] = dataclasses.field(default_factory=dict)
    unrecorded_changes: tuple[str, ...] = ()
    checkpoints: tuple[int, ...] = ()
    provenance: Mapping[str, Any]
    correction: Correction | None = None

    @property
    def trained(self) -> tuple[Parameter, ...]:
        """The parameters that are in the ledger."""
        return tuple(parameter for parameter in self.parameters if parameter.trained)

    @property
    def attempt(self) -> Attempt:
        """The last attempt."""
        return self.attempts[-1]

    @property
    def state(self) -> str:
        """The state of the last attempt."""
        return self.attempt.state

    def to_dict(self) -> dict[str, Any]:
        """Return the manifest as plain JSON types.

        Returns
        -------
        dict
            With ``format`` and ``version`` first; ``checkpoints`` and ``correction`` only where there are any.
        """
        document = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        document["parameters"] = [row.to_dict() for row in self.parameters]
        # Versions that did not know a field refuse it.
        for name in ("checkpoints", "correction"):
            if not getattr(self, name):
                del document[name]
        return document

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], source: str) -> Manifest:
        """Build a manifest from a JSON document.

        Parameters
        ----------
        document
            What `to_dict` gave.
        source
            Where it is from, for error messages.

        Returns
        -------
        Manifest
            The manifest.

        Raises
        ------
        FormatError
            If it is of another format or version, or a field is missing or unknown. All problems are named.
        """
        if document.get("format") != FORMAT or document.get("version") != VERSION:
            message = (
                f"{source}: expected format {FORMAT} version {VERSION}, found {document.get('format')!r} "
                f"version {document.get('version')!r}"
            )
            raise FormatError(message)
        fields = {key: value for key, value in document.items() if key not in {"format", "version", "crc32"}}
        known = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - set(known))
        optional = {
            name
            for name, field in known.items()
            if field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        }
        missing = sorted(set(known) - set(fields) - optional)
        if unknown or missing:
            message = f"{source}: missing fields {missing}, unknown fields {unknown}"
            raise FormatError(message)
        try:
            trainer = dict(fields["trainer"])
            trainer["arguments"] = tuple(trainer.get("arguments", ()))
            optimizer = dict(fields["optimizer"])
            optimizer["groups"] = tuple(optimizer["groups"])
            fields["trainer"] = Trainer(**trainer)
            fields["optimizer"] = OptimizerFacts(**optimizer)
        except (KeyError, TypeError) as error:
            message = f"{source}: trainer or optimizer is not understood ({error})"
            raise FormatError(message) from error
        try:
            fields["parameters"] = tuple(Parameter.from_dict(row) for row in fields["parameters"])
            fields["attempts"] = tuple(Attempt(**row) for row in fields["attempts"])
            if fields.get("correction") is not None:
                fields["correction"] = Correction(**fields["correction"])
            for name in ("buffers", "unrecorded_changes", "checkpoints"):
                fields[name] = tuple(fields.get(name, ()))
        except (AttributeError, TypeError) as error:
            message = f"{source}: parameter table, attempts, correction or buffers are not understood ({error})"
            raise FormatError(message) from error
        manifest = cls(**fields)
        if manifest.path not in {RECORDED, CHORD} or (manifest.path == CHORD) != bool(manifest.checkpoints):
            message = (
                f"{source}: expected path {RECORDED!r}, or {CHORD!r} with checkpoints, found {manifest.path!r} with "
                f"{len(manifest.checkpoints)}"
            )
            raise FormatError(message)
        return manifest

    def write(self, run: Path) -> None:
        """Write the manifest into its run, durably, replacing an older one.

        Parameters
        ----------
        run
            The run's folder.
        """
        sealedjson.write(run / MANIFEST_FILE, self.to_dict())

    @classmethod
    def read(cls, run: Path) -> Manifest:
        """Read the manifest of a run.

        Parameters
        ----------
        run
            The run's folder.

        Returns
        -------
        Manifest
            The manifest. A `FormatError` or a `DamagedFileError` tells if it is none, or damaged.

        Raises
        ------
        UsageError
            If there is no such folder, or it is no run.
        """
        run = Path(run)
        file = run / MANIFEST_FILE
        if not run.is_dir():
            message = f"no such run folder: {run}"
            raise UsageError(message)
        if not file.is_file():
            message = f"{run} is no run: it holds no {MANIFEST_FILE}. A run is the folder given to recorder.watch"
            raise UsageError(message)
        return cls.from_dict(sealedjson.read(file, (FORMAT, VERSION)), str(file))
