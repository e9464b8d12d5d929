"""``python -m recorder fairseq-train``: stock fairseq-train with the recorder on."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recorder import commandline
from recorder.commands import PROGRAM
from recorder.commands.sizes import size
from recorder.manifest import MANIFEST_FILE
from recorder.ranges import describe_ranges
from recorder.runformat import Run
from recorder.usermap import read_map


def add_arguments(commands: Any) -> None:
    """Say what the command takes.

    Parameters
    ----------
    commands
        The program's subparsers.
    """
    parser = commands.add_parser(
        "fairseq-train",
        help="run stock fairseq-train with the recorder on",
        description="Run stock fairseq-train with the recorder on. Every other argument goes to fairseq-train.",
        usage=f"{PROGRAM} fairseq-train --record-dir RUN [--record-steps STEPS] "
        "[--record-...] <the arguments of fairseq-train>",
        allow_abbrev=False,
    )
    parser.add_argument("--record-dir", type=Path, required=True, metavar="RUN", help="folder of the run to make")
    parser.add_argument(
        "--record-batches",
        choices=["store", "indices"],
        default="store",
        help="store the tensors of every micro-batch (about 1%% of the parameters), or only indices and checksums",
    )
    parser.add_argument(
        "--record-steps",
        default="all",
        metavar="STEPS",
        help="which steps, such as 0:1000,1000::100 or log:1:100000:40:16 (default all)",
    )
    parser.add_argument(
        "--record-parameters",
        action="append",
        default=[],
        metavar="PATTERN",
        help="which parameters, by a shell pattern over their names; !PATTERN leaves out; may be repeated",
    )
    parser.add_argument(
        "--record-map", type=Path, metavar="FILE", help="which parameter is which: a TOML file of naming rules"
    )
    parser.add_argument("--record-quota", type=size, metavar="SIZE", help="recording ends when the run has this size")
    parser.add_argument(
        "--record-segment-steps",
        type=int,
        metavar="N",
        help="steps to a segment file: a damaged one costs so many (default 64, 128 for 16-bit parameters)",
    )


def run_fairseq_train(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Train, and say what was recorded.

    Parameters
    ----------
    options
        The parsed arguments of the recorder.
    arguments
        All others, which are fairseq's.

    Returns
    -------
    int
        The exit code.
    """
    from recorder.integrations.fairseq_train import train
    from recorder.processes import this_process

    settings = {
        name: getattr(options, f"record_{name}")
        for name in ("batches", "steps", "parameters", "quota", "segment_steps")
    }
    if options.record_map is not None:
        # Read now: a mistake in it is told before fairseq has read its data.
        settings["map"] = read_map(options.record_map)
    train(options.record_dir, arguments, settings)
    rank, _ = this_process()
    if rank:
        return commandline.DONE
    if not (options.record_dir / MANIFEST_FILE).exists():
        commandline.say(f"{PROGRAM}: the training made no update; {options.record_dir} holds nothing")
        return commandline.FAILED
    run = Run(options.record_dir)
    commandline.say(f"{PROGRAM}: recorded {describe_ranges(run.consecutive)} ({run.manifest.state})")
    commandline.result(str(options.record_dir))
    return commandline.DONE
