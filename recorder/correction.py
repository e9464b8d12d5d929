"""A run's parameter table corrected afterwards, from names and shapes alone: places change, what was recorded never.

A correction starts from the table as it was recorded, so that a file of rules says all of it: another correction
replaces it, and the recorded table can be had back. The manifest keeps it (docs/formats/run.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from recorder.errors import FormatError, UsageError
from recorder.lock import RunLock
from recorder.manifest import Correction, Manifest
from recorder.namingrules import NamingRule
from recorder.parameters import placed, uses_among
from recorder.placing import Place, apart, place_by, plain_name
from recorder.table import Parameter, place_of, with_place


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Corrected:
    """A table as rules understand it.

    Parameters
    ----------
    parameters
        Its rows.
    undecided
        Name to what a rule of the package says of a parameter that it cannot place without the live module.
    """

    parameters: tuple[Parameter, ...]
    undecided: Mapping[str, str] = dataclasses.field(default_factory=dict)


def as_recorded(manifest: Manifest) -> tuple[Parameter, ...]:
    """Give a run's table with the places that were recorded.

    Parameters
    ----------
    manifest
        The run's manifest.

    Returns
    -------
    tuple of Parameter
        Its rows; the same where nothing was corrected.
    """
    if manifest.correction is None:
        return manifest.parameters
    recorded = manifest.correction.recorded
    return tuple(with_place(row, recorded[row.name]) if row.name in recorded else row for row in manifest.parameters)


def correct(parameters: Sequence[Parameter], rules: Sequence[NamingRule]) -> Corrected:
    """Place the rows of a table by rules, without the live model.

    What no rule decides stays where it is. Two names of a tied tensor are one use where their components are the same:
    whether they stand for one module or for two cannot be told from names.

    Parameters
    ----------
    parameters
        The table as it was recorded.
    rules
        The first whose pattern matches decides. One that is `NamingRule.optional` leaves a parameter where it is if it
        asks for the live module.

    Returns
    -------
    Corrected
        The table. A `UsageError` tells if another rule asks for the live module, or does not fit a parameter.
    """
    shapes = {name: row.shape for row in parameters for name in (row.name, *row.aliases)}
    decided: dict[str, Place] = {}
    undecided: dict[str, str] = {}
    for name, shape in shapes.items():
        try:
            place = _place(name, shape, [rule for rule in rules if rule.pattern.fullmatch(plain_name(name))])
        except FormatError as error:
            undecided[name] = str(error)
        else:
            if place is not None:
                decided[name] = place
    decided = apart(decided)
    return Corrected(parameters=tuple(_row(row, decided) for row in parameters), undecided=undecided)


def _place(name: str, shape: tuple[int, ...], rules: Sequence[NamingRule]) -> Place | None:
    said: list[Place] = []
    for rule in rules:
        try:
            place = place_by(rule if not rule.optional else dataclasses.replace(rule, classes={}), None, name, shape)
        except FormatError as error:
            if not rule.optional:
                raise UsageError(str(error)) from error
            raise
        if place is not None:
            said.append(place)
        # Whether a class is there cannot be seen: what all rules say that might apply is certain all the same.
        if place is not None and not (rule.optional and rule.classes):
            return place if set(said) == {place} else _unclear(name, rules)
    return _unclear(name, rules) if said else None


def _unclear(name: str, rules: Sequence[NamingRule]) -> Place:
    message = f"{rules[0].source}, for parameter {name!r}: asks for classes of modules, which only the live model knows"
    raise FormatError(message)


def _row(row: Parameter, decided: Mapping[str, Place]) -> Parameter:
    names = (row.name, *row.aliases)
    if not any(name in decided for name in names):
        return row
    places = {name: Place() for name in names} | {row.name: _recorded(row)}
    for use in row.uses:
        places |= dict.fromkeys((use.name, *use.aliases), _recorded(use))
    slots: list[tuple[str, ...]] = []
    for slot in [(use.name, *use.aliases) for use in row.uses] or [(name,) for name in names]:
        of_slot = {decided[name].cell: decided[name] for name in slot if name in decided}
        if len(of_slot) > 1:  # names that stood for one use, and are told apart now
            slots.extend((name,) for name in slot)
            places |= {name: decided[name] for name in slot if name in decided}
        else:
            slots.append(slot)
            places |= {name: place for place in of_slot.values() for name in slot}
    uses = uses_among(slots, names, places, by_layer=bool(row.uses))
    return placed(dataclasses.replace(row, uses=()), uses)


def _recorded(row: Parameter) -> Place:
    fields = {field.name for field in dataclasses.fields(Place)} - {"tower"}
    return Place(**{name: getattr(row, name) for name in fields})


def keep(run: Path, parameters: Sequence[Parameter], *, source: str, text: str) -> None:
    """Keep a corrected table in a run.

    Parameters
    ----------
    run
        The run's folder.
    parameters
        The table; its places are taken, and nothing else of it. Where they are those that were recorded, the run has
        no correction any more.
    source, text
        What it is from, for the manifest.

    Raises
    ------
    UsageError
        If the run is being recorded.
    """
    try:
        lock = RunLock(run)
    except UsageError as error:
        message = (
            f"{run} cannot be corrected: it is being recorded into, or may not be written to. Wait until the recording "
            "ends, or give the map to the training (map= of recorder.watch, --record-map of fairseq-train)"
        )
        raise UsageError(message) from error
    try:
        # As it is now: a training may have ended since the table was made.
        manifest = Manifest.read(run)
        places = {row.name: place_of(row) for row in parameters}
        recorded = {row.name: place_of(row) for row in as_recorded(manifest)}
        moved = {name: place for name, place in recorded.items() if places[name] != place}
        correction = Correction(
            source=source, text=text, created=datetime.now(UTC).isoformat(timespec="seconds"), recorded=moved
        )
        dataclasses.replace(
            manifest,
            parameters=tuple(with_place(row, places[row.name]) for row in manifest.parameters),
            correction=correction if moved else None,
        ).write(run)
    finally:
        lock.release()


def origin_of_table(manifest: Manifest) -> str:
    """Say what a run's table is from.

    Parameters
    ----------
    manifest
        The run's manifest.

    Returns
    -------
    str
        A map given to the recording, a correction, or neither.
    """
    if manifest.correction is not None:
        return f"corrected {manifest.correction.created} by {manifest.correction.source}"
    given = manifest.provenance.get("map")
    return f"recorded with {given['source']}" if given else "as recorded"
