"""``python -m recorder import``: a run made of checkpoints that exist already."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from recorder import commandline
from recorder.chordrun import open_run


def add_arguments(commands: Any) -> None:
    """Say what the command takes.

    Parameters
    ----------
    commands
        The program's subparsers.
    """
    parser = commands.add_parser(
        "import",
        help="make a run of checkpoints that exist already",
        description="Make a run of path chord of checkpoints that exist already: what is allocated later is the change "
        "of the loss along the straight line from each to the next. No code that they bring along runs. Safetensors "
        "files are linked, others written anew. The same command again continues, or adds checkpoints that have come "
        "since. See docs/checkpoints.md.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "source",
        type=Path,
        nargs="?",
        metavar="SOURCE",
        help="a folder of checkpoints, a repository in Hugging Face's cache, or a list of lines N,PATH (.csv, .txt)",
    )
    parser.add_argument("--run", type=Path, required=True, metavar="RUN", help="folder of the run to make")
    parser.add_argument(
        "--workload", required=True, metavar="MODULE:FUNCTION", help="what builds the model, the data and the loss"
    )
    parser.add_argument(
        "--kind",
        choices=["fairseq", "huggingface", "lightning", "distributed", "files"],
        help="what kind of checkpoints (default: told from their names)",
    )
    parser.add_argument(
        "--step",
        action="append",
        default=[],
        metavar="N=PATH",
        help="the checkpoint after N updates: a file of weights, or the folder of one checkpoint; may be repeated",
    )
    parser.add_argument(
        "--prefix", help="what the checkpoints' names have before the model's, such as model. (default: found)"
    )
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="PATTERN",
        help="tensors of the checkpoints that the model need not have, by a shell pattern; may be repeated",
    )


def run_import(options: argparse.Namespace) -> int:
    """Import the checkpoints, and say what the run now holds.

    Parameters
    ----------
    options
        The parsed arguments.

    Returns
    -------
    int
        The exit code.
    """
    # Imported only where it is needed, with torch and the user's workload.
    from recorder.importing.importer import import_checkpoints
    from recorder.importing.wish import Wish
    from recorder.loading import named_workload

    wish = Wish(
        source=options.source,
        run=options.run,
        workload=options.workload,
        kind=options.kind,
        named=tuple(options.step),
        prefix=options.prefix,
        ignored=tuple(options.ignore),
    )
    import_checkpoints(
        wish, named_workload(options.workload), lambda sentence: commandline.say(f"{options.run}: {sentence}")
    )
    commandline.say(f"{options.run}: {open_run(options.run).describe()}")
    commandline.result(str(options.run))
    return commandline.DONE
