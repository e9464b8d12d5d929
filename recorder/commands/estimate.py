"""``python -m recorder estimate``: what a recording would cost."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from recorder import commandline
from recorder.commands.sizes import size
from recorder.estimate import estimate
from recorder.selection import StepSelection


def add_arguments(commands: Any) -> None:
    """Say what the command takes.

    Parameters
    ----------
    commands
        The program's subparsers.
    """
    parser = commands.add_parser("estimate", help="say what a recording would cost: bytes, disk, time")
    parser.add_argument("--parameters", type=size, required=True, metavar="N", help="recorded parameters, such as 60M")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--updates", type=size, metavar="N", help="updates of the training, such as 125k")
    parser.add_argument("--steps", default="all", help="which of them, such as 0:1000,1000::100")
    parser.add_argument("--step-seconds", type=float, metavar="S", help="duration of an update without recorder")
    parser.add_argument(
        "--dir", type=Path, default=Path(), metavar="RUN", help="where the run would stand (default here)"
    )
    parser.add_argument("--json", action="store_true", help="for a machine")


def run_estimate(options: argparse.Namespace) -> int:
    """Print bytes, disk and time of the recording.

    Parameters
    ----------
    options
        The parsed arguments.

    Returns
    -------
    int
        The exit code.
    """
    cost = estimate(
        {options.dtype: options.parameters},
        selection=StepSelection(options.steps),
        updates=options.updates,
        folder=options.dir,
    )
    slowdown = None if options.step_seconds is None else cost.slowdown(options.step_seconds)
    if options.json:
        facts = {**dataclasses.asdict(cost), "total_bytes": cost.total_bytes, "slowdown": slowdown}
        commandline.result(json.dumps(facts))
    else:
        commandline.result(cost.text())
        if slowdown is not None:
            commandline.result(
                f"expected slowdown of a training of {options.step_seconds:g} s a step: a factor of {slowdown:.3f}"
            )
    return commandline.DONE
