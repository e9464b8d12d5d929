"""``python -m recorder info``: what a run holds."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

from recorder import commandline
from recorder.chordrun import ChordRun, open_run
from recorder.correction import origin_of_table
from recorder.manifest import Attempt
from recorder.ranges import describe_ranges
from recorder.runformat import Run
from recorder.segments import list_segments


def add_arguments(commands: Any) -> None:
    """Say what the command takes.

    Parameters
    ----------
    commands
        The program's subparsers.
    """
    parser = commands.add_parser("info", help="say what a run holds")
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--json", action="store_true", help="for a machine")


def run_info(options: argparse.Namespace) -> int:
    """Print what a run holds.

    Parameters
    ----------
    options
        The parsed arguments.

    Returns
    -------
    int
        The exit code.
    """
    run = open_run(options.run)
    manifest = run.manifest
    size = sum(file.stat().st_size for file in run.path.rglob("*") if file.is_file())
    rows = manifest.parameters
    facts: dict[str, Any] = {
        "run": str(run.path),
        "run_id": manifest.run_id,
        "state": manifest.state,
        "path": manifest.path,
        "trainer": f"{manifest.trainer.name} {manifest.trainer.version}".strip(),
        "steps": describe_ranges(run.consecutive),
        "pruned_steps": describe_ranges(run.pruned),
        "selected_steps": manifest.steps,
        "segments": len(run.segments),
        "bytes": size,
        "trained_parameters": sum(row.size for row in manifest.trained),
        "untrained_parameters": sum(row.size for row in rows if row.status == "untrained"),
        "not_recorded_parameters": sum(row.size for row in rows if row.status == "not_recorded"),
        "buffers": len(manifest.buffers),
        "batches": manifest.batches,
        "map": origin_of_table(manifest),
        "created": manifest.provenance.get("created"),
    }
    attempts = [_describe_attempt(run, entry) for entry in manifest.attempts]
    if isinstance(run, ChordRun):
        facts = _of_checkpoints(facts, run)
        attempts = []
    if options.json:
        commandline.result(json.dumps({**facts, "attempts": attempts}))
        return commandline.DONE
    for name, value in facts.items():
        text = f"{value:,}" if isinstance(value, int) else str(value)
        commandline.result(f"{name.replace('_', ' '):25}{text}")
    for entry in attempts:
        heading = f"attempt {entry['number']}"
        commandline.result(
            f"{heading:25}from step {entry['first_step']}, {entry['state']}; joined: {entry['joined']}; "
            f"recorded {entry['recorded']}, of which count {entry['in_use']}"
        )
    return commandline.DONE


def _of_checkpoints(facts: dict[str, Any], run: ChordRun) -> dict[str, Any]:
    # What has no meaning for checkpoints gives way to what has.
    files = Counter(file.kind for record in run.records() for file in record.files)
    own = {
        "steps": run.describe_steps(run.consecutive),
        "checkpoints": list(run.manifest.checkpoints),
        "files": ", ".join(
            f"{count} by {kind}" if "link" in kind else f"{count} {kind}" for kind, count in files.items()
        ),
        "source": run.manifest.provenance.get("source"),
    }
    without = {"pruned_steps", "selected_steps", "segments", "batches"}
    return {name: value for name, value in (facts | own).items() if name not in without}


def _describe_attempt(run: Run, attempt: Attempt) -> dict[str, Any]:
    own = [(name.start, name.stop) for name in list_segments(run.path) if name[::3] == (attempt.number, 0)]
    in_use = [(start, stop) for number, start, stop in run.attempts if number == attempt.number]
    return {
        **dataclasses.asdict(attempt),
        "recorded": describe_ranges(own),
        "in_use": describe_ranges(in_use),
    }
