"""``python -m recorder``: record a fairseq training, or say what a run holds."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from recorder import commandline
from recorder.manifest import MANIFEST_FILE
from recorder.ranges import describe_ranges
from recorder.runformat import Run
from recorder.session import SEGMENT_STEPS

PROGRAM = "python -m recorder"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Record every optimizer step of a training.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    fairseq = commands.add_parser(
        "fairseq-train",
        help="run stock fairseq-train with the recorder on",
        description="Run stock fairseq-train with the recorder on. Every other argument goes to fairseq-train.",
        usage=f"{PROGRAM} fairseq-train --record-dir RUN [--record-batches tensors|indices] "
        "[--record-segment-steps N] <the arguments of fairseq-train>",
        allow_abbrev=False,
    )
    fairseq.add_argument("--record-dir", type=Path, required=True, metavar="RUN", help="folder of the run to make")
    fairseq.add_argument(
        "--record-batches",
        choices=["tensors", "indices"],
        default="tensors",
        help="store the tensors of every micro-batch (about 1%% of the parameters), or only indices and checksums",
    )
    fairseq.add_argument(
        "--record-segment-steps",
        type=int,
        default=SEGMENT_STEPS,
        metavar="N",
        help="steps to a segment file; so many are held in memory, and lost by a kill (default %(default)s)",
    )
    info = commands.add_parser("info", help="say what a run holds")
    info.add_argument("run", type=Path, metavar="RUN")
    info.add_argument("--json", action="store_true", help="for a machine")
    return parser


def _fairseq_train(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    from recorder.integrations.fairseq_train import train

    train(
        options.record_dir,
        arguments,
        batches=options.record_batches,
        segment_steps=options.record_segment_steps,
    )
    if not (options.record_dir / MANIFEST_FILE).exists():
        commandline.say(f"{PROGRAM}: the training made no update; {options.record_dir} holds nothing")
        return commandline.FAILED
    run = Run(options.record_dir)
    commandline.say(f"{PROGRAM}: recorded {describe_ranges(run.segments)} ({run.manifest.state})")
    commandline.result(str(options.record_dir))
    return commandline.DONE


def _info(options: argparse.Namespace) -> int:
    run = Run(options.run)
    manifest = run.manifest
    size = sum(file.stat().st_size for file in run.path.rglob("*") if file.is_file())
    facts = {
        "run": str(run.path),
        "run_id": manifest.run_id,
        "state": manifest.state,
        "path": manifest.path,
        "trainer": f"{manifest.trainer.name} {manifest.trainer.version}",
        "steps": describe_ranges(run.segments),
        "segments": len(run.segments),
        "bytes": size,
        "trained_parameters": sum(parameter.size for parameter in manifest.trained),
        "untrained_parameters": sum(parameter.size for parameter in manifest.parameters if not parameter.trained),
        "batches": manifest.batches,
        "created": manifest.provenance.get("created"),
    }
    if options.json:
        commandline.result(json.dumps(facts))
    else:
        for name, value in facts.items():
            text = f"{value:,}" if isinstance(value, int) else str(value)
            commandline.result(f"{name.replace('_', ' '):22}{text}")
    return commandline.DONE


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
        return commandline.guarded(PROGRAM, lambda: _fairseq_train(options, rest))
    if rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    return commandline.guarded(PROGRAM, lambda: _info(options))


if __name__ == "__main__":
    sys.exit(main())
