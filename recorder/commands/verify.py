"""``python -m recorder verify``: whether a run is as it was written."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from recorder import commandline
from recorder.ranges import describe_ranges
from recorder.verify import set_aside, verify


def add_arguments(commands: Any) -> None:
    """Say what the command takes.

    Parameters
    ----------
    commands
        The program's subparsers.
    """
    parser = commands.add_parser("verify", help="read a whole run and say whether it is as it was written")
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--json", action="store_true", help="for a machine")
    parser.add_argument(
        "--set-aside", action="store_true", help="move damaged segments to RUN/damaged, so that the rest can be used"
    )


def run_verify(options: argparse.Namespace) -> int:
    """Read the whole run and print what is damaged.

    Parameters
    ----------
    options
        The parsed arguments.

    Returns
    -------
    int
        The exit code.
    """
    verdict = verify(options.run, lambda file: commandline.say(f"reading {file}"))
    if options.json:
        commandline.result(json.dumps(verdict.to_dict()))
    else:
        for damage in verdict.damages:
            lost = (
                f"; lost with it: {describe_ranges(damage.lost)}"
                if damage.lost
                else "; the run cannot be read without it"
            )
            commandline.result(f"{damage.file}: {damage.found}{lost}")
        pruned = f"; pruned: {describe_ranges(verdict.pruned)}" if verdict.pruned else ""
        left = f"; {verdict.unfinished} segments in the making" if verdict.unfinished else ""
        commandline.result(
            f"{verdict.run}: {verdict.files} files, {verdict.bytes:,} bytes read, {len(verdict.damages)} damaged; "
            f"usable: {describe_ranges(verdict.usable)}{pruned}{left}"
        )
    if options.set_aside:
        for file in set_aside(verdict):
            commandline.say(f"moved to {file}")
    return commandline.FAILED if verdict.damages else commandline.DONE
