"""``python -m recorder``: record a training, import checkpoints; what a run holds, if it is whole, what it costs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recorder import commandline, mapcommand
from recorder.chordrun import ChordRun, open_run
from recorder.estimate import estimate
from recorder.manifest import MANIFEST_FILE, Attempt
from recorder.mapcommand import origin_of_table
from recorder.ranges import describe_ranges
from recorder.runformat import Run
from recorder.segments import list_segments
from recorder.selection import StepSelection
from recorder.usermap import read_map
from recorder.verify import set_aside, verify

PROGRAM = "python -m recorder"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Record every optimizer step of a training.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    fairseq = commands.add_parser(
        "fairseq-train",
        help="run stock fairseq-train with the recorder on",
        description="Run stock fairseq-train with the recorder on. Every other argument goes to fairseq-train.",
        usage=f"{PROGRAM} fairseq-train --record-dir RUN [--record-steps STEPS] "
        "[--record-...] <the arguments of fairseq-train>",
        allow_abbrev=False,
    )
    fairseq.add_argument("--record-dir", type=Path, required=True, metavar="RUN", help="folder of the run to make")
    fairseq.add_argument(
        "--record-batches",
        choices=["store", "indices"],
        default="store",
        help="store the tensors of every micro-batch (about 1%% of the parameters), or only indices and checksums",
    )
    _add_selection(fairseq, "--record-")
    fairseq.add_argument(
        "--record-map", type=Path, metavar="FILE", help="which parameter is which: a TOML file of naming rules"
    )
    fairseq.add_argument("--record-quota", type=_size, metavar="SIZE", help="recording ends when the run has this size")
    fairseq.add_argument(
        "--record-segment-steps",
        type=int,
        metavar="N",
        help="steps to a segment file: a damaged one costs so many (default 64, 128 for 16-bit parameters)",
    )
    _add_import(commands)
    info = commands.add_parser("info", help="say what a run holds")
    info.add_argument("run", type=Path, metavar="RUN")
    info.add_argument("--json", action="store_true", help="for a machine")
    verify = commands.add_parser("verify", help="read a whole run and say whether it is as it was written")
    verify.add_argument("run", type=Path, metavar="RUN")
    verify.add_argument("--json", action="store_true", help="for a machine")
    verify.add_argument(
        "--set-aside", action="store_true", help="move damaged segments to RUN/damaged, so that the rest can be used"
    )
    mapping = commands.add_parser("map", help="print which parameter is which, and correct it")
    mapcommand.add_arguments(mapping)
    cost = commands.add_parser("estimate", help="say what a recording would cost: bytes, disk, time")
    cost.add_argument("--parameters", type=_size, required=True, metavar="N", help="recorded parameters, such as 60M")
    cost.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    cost.add_argument("--updates", type=_size, metavar="N", help="updates of the training, such as 125k")
    cost.add_argument("--steps", default="all", help="which of them, such as 0:1000,1000::100")
    cost.add_argument("--step-seconds", type=float, metavar="S", help="duration of an update without recorder")
    cost.add_argument(
        "--dir", type=Path, default=Path(), metavar="RUN", help="where the run would stand (default here)"
    )
    cost.add_argument("--json", action="store_true", help="for a machine")
    return parser


def _add_import(commands: Any) -> None:
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


def _add_selection(parser: argparse.ArgumentParser, prefix: str) -> None:
    parser.add_argument(
        f"{prefix}steps",
        default="all",
        metavar="STEPS",
        help="which steps, such as 0:1000,1000::100 or log:1:100000:40:16 (default all)",
    )
    parser.add_argument(
        f"{prefix}parameters",
        action="append",
        default=[],
        metavar="PATTERN",
        help="which parameters, by a shell pattern over their names; !PATTERN leaves out; may be repeated",
    )


_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def _size(text: str) -> int:
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)([kMGT]?)B?", text)
    if match is None:
        message = f"expected a number such as 60M or 2.5GB, not {text!r}"
        raise argparse.ArgumentTypeError(message)
    return int(float(match[1]) * _UNITS[match[2]])


def _fairseq_train(options: argparse.Namespace, arguments: Sequence[str]) -> int:
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


def _import(options: argparse.Namespace) -> int:
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


def _info(options: argparse.Namespace) -> int:
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


def _verify(options: argparse.Namespace) -> int:
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


def _estimate(options: argparse.Namespace) -> int:
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
    commands = {
        "info": _info,
        "verify": _verify,
        "map": mapcommand.run_map,
        "estimate": _estimate,
        "import": _import,
    }
    return commandline.guarded(PROGRAM, lambda: commands[options.command](options))


if __name__ == "__main__":
    sys.exit(main())
