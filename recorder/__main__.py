"""``python -m recorder``: record a training, import checkpoints; what a run holds, if it is whole, what it costs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from recorder import commandline
from recorder.commands import PROGRAM, estimate, fairseqtrain, importcheckpoints, info, mapping, verify


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Record every optimizer step of a training.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for room in (fairseqtrain, importcheckpoints, info, verify, mapping, estimate):
        room.add_arguments(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv
        The arguments without the program; None for those of the process.

    Returns
    -------
    int
        The exit code.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    if options.command == "fairseq-train":
        return commandline.guarded(PROGRAM, lambda: fairseqtrain.run_fairseq_train(options, rest))
    if rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    commands = {
        "info": info.run_info,
        "verify": verify.run_verify,
        "map": mapping.run_map,
        "estimate": estimate.run_estimate,
        "import": importcheckpoints.run_import,
    }
    return commandline.guarded(PROGRAM, lambda: commands[options.command](options))


if __name__ == "__main__":
    sys.exit(main())
