"""``python -m recorder map``: a run's parameter table as it is understood, and corrected."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recorder import commandline
from recorder.correction import Corrected, as_recorded, correct, keep, origin_of_table
from recorder.errors import UsageError
from recorder.manifest import Manifest
from recorder.maplines import components_in_words, lines, place_in_words, shape_in_words
from recorder.mapskeleton import is_unsaid, skeleton
from recorder.namingrules import naming_rules
from recorder.pruned import pruned_segments
from recorder.table import Parameter, split_by_use
from recorder.usermap import UserMap, read_map, unmatched

_GAP = "  "


def add_arguments(commands: Any) -> None:
    """Say what the command takes.

    Parameters
    ----------
    commands
        The program's subparsers.
    """
    parser = commands.add_parser("map", help="print which parameter is which, and correct it")
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument(
        "--map",
        type=Path,
        metavar="FILE",
        help="a TOML file of naming rules: correct the table as it was recorded, and keep that in the run. "
        "An earlier correction is replaced",
    )
    parser.add_argument(
        "--refresh", action="store_true", help="also try this lossledger's own rules, where no live module is needed"
    )
    parser.add_argument("--as-recorded", action="store_true", help="take every correction back")
    parser.add_argument("--dry-run", action="store_true", help="show the corrected table and keep nothing")
    parser.add_argument("--full", action="store_true", help="a line for every parameter")
    parser.add_argument(
        "--skeleton", action="store_true", help="print the table as a TOML file that --map takes, and nothing else"
    )
    parser.add_argument("--json", action="store_true", help="for a machine")


def run_map(options: argparse.Namespace) -> int:
    """Print a run's table; correct it if asked.

    Parameters
    ----------
    options
        The parsed arguments.

    Returns
    -------
    int
        The exit code.

    Raises
    ------
    UsageError
        If flags exclude each other, the map is not understood, or the run is being recorded.
    """
    if options.as_recorded and (options.map or options.refresh):
        message = "--as-recorded takes corrections back; give it without --map and --refresh"
        raise UsageError(message)
    manifest = Manifest.read(options.run)
    asked = options.as_recorded or options.map is not None or options.refresh
    user_map = None if options.map is None else read_map(options.map)
    corrected = _corrected(manifest, user_map, options) if asked else Corrected(parameters=manifest.parameters)
    rows = corrected.parameters
    if asked and not options.dry_run and rows != manifest.parameters:
        source = "the rules of lossledger" if user_map is None else user_map.source
        keep(options.run, rows, source=source, text="" if user_map is None else user_map.text)
        manifest = dataclasses.replace(Manifest.read(options.run), parameters=manifest.parameters)
    if options.skeleton:
        commandline.result(skeleton(rows).rstrip("\n"))
    elif options.json:
        commandline.result(json.dumps(_facts(options.run, manifest, rows)))
    else:
        for line in _report(manifest, rows, full=options.full):
            commandline.result(line.rstrip())
    for line in _notes(options, manifest, corrected) if asked else []:
        commandline.say(line)
    for line in [] if options.skeleton else _advice(options.run, rows):
        commandline.say(line)
    return commandline.DONE


def _corrected(manifest: Manifest, user_map: UserMap | None, options: argparse.Namespace) -> Corrected:
    recorded = as_recorded(manifest)
    if options.as_recorded:
        return Corrected(parameters=recorded)
    own = () if user_map is None else user_map.rules
    for line in unmatched(own, [name for row in recorded for name in (row.name, *row.aliases)]):
        commandline.say(f"warning: {line}")
    return correct(recorded, (*own, *(naming_rules() if options.refresh else ())))


def _report(manifest: Manifest, rows: Sequence[Parameter], *, full: bool) -> list[str]:
    trained = [row for row in rows if row.trained]
    unsaid = [row for row in trained if is_unsaid(row)]
    said = [row for row in trained if not is_unsaid(row)]
    found = [f"{len(rows)} parameters, {_entries(rows):,} entries; {origin_of_table(manifest)}"]
    found += ["", *_table(said, full=full)] if said else []
    tied = [row for row in rows if row.aliases]
    if tied:
        found += ["", "tied:"]
        for row in tied:
            uses = ", ".join(f"{components_in_words(use)} as {use.name}" for use in row.uses)
            found.append(f"{_GAP}{row.name} = {' = '.join(row.aliases)}" + (f"; uses: {uses}" if uses else ""))
    for status, title in {"untrained": "untrained", "not_recorded": "not recorded"}.items():
        of_status = [row for row in rows if row.status == status]
        if of_status:
            found += ["", f"{title}:", *_table(of_status, full=full)]
    found += ["", *_totals(rows)]
    changed = _changes(manifest.parameters, rows)
    if changed:
        found += ["", "changed:", *_columns(changed)]
    if unsaid:
        found += ["", f"other, {_entries(unsaid):,} entries that no rule places:", *_table(unsaid, full=full)]
        found += ["", skeleton(rows, only_other=True)]
    return found


def _table(rows: Sequence[Parameter], *, full: bool) -> list[str]:
    shown = lines(rows, alike=(lambda row: row.name) if full else (lambda row: None))
    return _columns(
        [
            (line.name, line.layers, components_in_words(line.first), str(line.first.shape), shape_in_words(line))
            for line in shown
        ]
    )


def _columns(cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        _GAP + _GAP.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    ]


def _entries(rows: Sequence[Parameter]) -> int:
    return sum(row.size for row in rows)


def _by_component(rows: Sequence[Parameter]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for row in split_by_use(row for row in rows if row.trained):
        for part in row.parts:
            totals[part.component] = totals.get(part.component, 0) + row.size // max(row.units, 1) * part.units
    return dict(sorted(totals.items(), key=lambda item: (item[0] == "other", -item[1])))


def _by_stack(rows: Sequence[Parameter]) -> dict[str, dict[str, int]]:
    totals: dict[str, dict[str, int]] = {}
    depths: dict[str, set[int]] = {}
    for row in split_by_use(row for row in rows if row.trained):
        of_stack = totals.setdefault(row.stack, {"layers": 0, "entries": 0})
        depths.setdefault(row.stack, set()).add(row.depth)
        of_stack["entries"] += row.size
        of_stack["layers"] = len(depths[row.stack] - {-1})
    return totals


def _totals(rows: Sequence[Parameter]) -> list[str]:
    all_entries = sum(_by_component(rows).values()) or 1
    shared = sum(row.size for row in split_by_use(row for row in rows if row.trained) if row.tied_to is not None)
    twice = f" ({shared:,} entries of tied weights count once for each use)" if shared else ""
    totals = [(name, "", entries) for name, entries in _by_component(rows).items()]
    totals += [(name, _layers(facts["layers"]), facts["entries"]) for name, facts in _by_stack(rows).items()]
    return [
        f"trained entries by component and by stack{twice}:",
        *_columns([(name, layers, f"{entries:,}", f"{entries / all_entries:.1%}") for name, layers, entries in totals]),
    ]


def _layers(number: int) -> str:
    return f"{number} layer{'s' * (number > 1)}" if number else ""


def _changes(before: Sequence[Parameter], after: Sequence[Parameter]) -> list[tuple[str, str]]:
    was = {row.name: row for row in before}
    moved = [row for row in after if was[row.name] != row]
    shown = lines(moved, alike=lambda row: place_in_words(was[row.name]))
    return [(line.name, f"{place_in_words(was[line.first.name])} -> {place_in_words(line.first)}") for line in shown]


def _facts(run: Path, manifest: Manifest, rows: Sequence[Parameter]) -> dict[str, Any]:
    was = {row.name: row for row in manifest.parameters}
    return {
        "run": str(run),
        "parameters": [row.to_dict() for row in rows],
        "components": _by_component(rows),
        "stacks": _by_stack(rows),
        "other": [row.name for row in rows if row.trained and is_unsaid(row)],
        "correction": None if manifest.correction is None else dataclasses.asdict(manifest.correction),
        "changed": [row.name for row in rows if was[row.name] != row],
    }


def _advice(run: Path, rows: Sequence[Parameter]) -> list[str]:
    unsaid = [row for row in rows if row.trained and is_unsaid(row)]
    if not unsaid:
        return []
    line = (
        f"{len(unsaid)} parameters are in 'other'. To say what they are, save the rules above as a file (or the whole "
        f"table: python -m recorder map {run} --skeleton > map.toml), correct it, and run: "
        f"python -m recorder map {run} --map map.toml"
    )
    return [line]


def _notes(options: argparse.Namespace, manifest: Manifest, corrected: Corrected) -> list[str]:
    run, rows = options.run, corrected.parameters
    notes = []
    if corrected.undecided:
        _, why = next(iter(corrected.undecided.items()))
        notes.append(
            f"{len(corrected.undecided)} names stay as they were recorded, for their rules ask for the live model; "
            f"the first: {why}"
        )
    was = {row.name: row for row in manifest.parameters}
    moved = [row for row in rows if was[row.name] != row]
    if not moved:
        return [*notes, f"{run}: nothing changes"]
    notes.append(
        f"{run}: {len(moved)} of {len(rows)} parameters {'would move' if options.dry_run else 'are moved'}"
        f"{'; nothing is kept (--dry-run)' if options.dry_run else ''}"
    )
    anew = [row.name for row in moved if row.trained and _units(was[row.name]) != _units(row)]
    if anew:
        pruned = "; the steps that were pruned can not" if pruned_segments(run) else ""
        notes.append(
            f"the units or the uses of {len(anew)} of them change, first {anew[0]!r}: "
            f"python -m replay --run {run} computes all again{pruned}"
        )
    else:
        notes.append(
            f"no unit axis changes: python -m replay --run {run}, called as before, takes over what was computed "
            "already; then python -m reduce"
        )
    return notes


def _units(row: Parameter) -> Mapping[str, int]:
    return {use.name: use.unit_axis for use in row.uses or (row,)}
