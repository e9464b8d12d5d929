"""The command line of reduce: from a run's shards to its cube."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from recorder import commandline
from reduce import cube, pipeline, sources, summary

PROGRAM = "python -m reduce"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Add the shards of a replayed run up into one netCDF cube."
    )
    parser.add_argument("--run", type=Path, required=True, help="the run's folder, after python -m replay")
    parser.add_argument("--out", type=Path, help=f"the cube's file (default: RUN/{cube.FILE_NAME})")
    parser.add_argument(
        "--settings",
        nargs="+",
        action="extend",
        default=[],
        metavar="HASH",
        help="which shards to take for a loss data that was replayed with several settings",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --out even if it is a file that is no cube")
    return parser


def _reduce(arguments: argparse.Namespace, command: str) -> int:
    out = arguments.out or arguments.run / cube.FILE_NAME
    plan = pipeline.plan(arguments.run, arguments.settings)
    cube.check_destination(out, overwrite=arguments.overwrite)
    for line in sources.passed_over(arguments.run, plan.chosen):
        commandline.say(line)
    for source in plan.chosen:
        if gap := sources.missing(source, plan.steps, plan.updates):
            commandline.say(f"{source.loss_data}: not replayed: steps {gap}; NaN there, with status missing")
    console = Console(stderr=True)
    columns = (TextColumn("reduce"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task("reduce", total=len(plan.steps))
        pipeline.write(plan, out, command=command, advance=lambda steps: progress.advance(task, steps))
    with cube.open_cube(out) as dataset:
        for line in summary.lines(dataset):
            commandline.say(line)
    commandline.result(str(out))
    return commandline.DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``python -m reduce``.

    Parameters
    ----------
    argv
        The arguments; those of the process if not given.

    Returns
    -------
    int
        The exit code, see `recorder.commandline`.
    """
    arguments = _parser().parse_args(argv)
    command = shlex.join([*PROGRAM.split(), *(sys.argv[1:] if argv is None else argv)])
    return commandline.guarded(PROGRAM, lambda: _reduce(arguments, command))


if __name__ == "__main__":
    sys.exit(main())
