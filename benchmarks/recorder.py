"""What recording every step costs a training: ``python -m benchmarks.recorder``; README.md says how to read it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks import overhead, report, storedshare
from benchmarks.overhead import Overhead
from benchmarks.storedshare import StoredShare
from benchmarks.trainings import GpuTraining, LanguageModelTraining, PacedTraining, tokens_of
from recorder import commandline
from recorder.errors import UsageError

PROGRAM = "python -m benchmarks.recorder"

STEPS = {"a": 96, "b": 96, "c": 256, "d": 128}
"""Steps of each training, unless the user says otherwise."""

BLOCK = 12
"""Steps in a row of one training."""

SETTLED = 500
"""Updates before the steps whose size is measured."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Measure what recording every step costs a training.")
    parser.add_argument("--case", choices=[*report.TITLES, "all"], default="all", help="see benchmarks/README.md")
    parser.add_argument("--steps", type=int, help=f"steps of each training (default {STEPS})")
    parser.add_argument("--seed", type=int, default=1, help="decides the order of the blocks of steps")
    parser.add_argument(
        "--text", type=Path, metavar="FOLDER", help="with train.*, plain or .gz (default: made-up text)"
    )
    parser.add_argument("--scratch", type=Path, metavar="FOLDER", help="on the disk to record to (default: temporary)")
    parser.add_argument("--json", action="store_true", help="for a machine")
    return parser


def _measure(options: argparse.Namespace, scratch: Path) -> dict[str, Overhead | list[StoredShare] | None]:
    results: dict[str, Overhead | list[StoredShare] | None] = {}
    for case in report.TITLES if options.case == "all" else [options.case]:
        commandline.say(f"measuring {case}: {report.TITLES[case]}")
        folder = scratch / case
        folder.mkdir()
        results[case] = _measure_case(case, options, folder)
    return results


def _measure_case(case: str, options: argparse.Namespace, scratch: Path) -> Overhead | list[StoredShare] | None:
    steps = options.steps or STEPS[case]
    compare = partial(overhead.measure, steps=steps, block=min(BLOCK, steps), seed=options.seed, scratch=scratch)
    match case:
        case "a":
            noise = PacedTraining.noise()
            return compare(lambda: PacedTraining(noise))
        case "b":
            text = tokens_of(options.text, 4000, scratch)
            return compare(lambda: LanguageModelTraining(text, vocabulary=4000, layers=12, sequences=32))
        case "c":
            return compare(GpuTraining) if torch.cuda.is_available() else None
        case _:
            text = tokens_of(options.text, 8000, scratch)
            training = LanguageModelTraining(text, vocabulary=8000, layers=6, sequences=8)
            return storedshare.measure(training, first=SETTLED, steps=steps, scratch=scratch)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print.

    Parameters
    ----------
    arguments
        The command line; the process's own by default.

    Returns
    -------
    int
        Exit code, 0 also where something is not reached: a busy machine says little.
    """
    return commandline.guarded(PROGRAM, partial(_run, _parser().parse_args(arguments)))


def _run(options: argparse.Namespace) -> int:
    if options.steps is not None and options.steps < storedshare.FEWEST_STEPS:
        message = f"--steps is at least {storedshare.FEWEST_STEPS}, not {options.steps}"
        raise UsageError(message)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        results = _measure(options, Path(scratch))
    if options.json:
        plain = {
            case: [dataclasses.asdict(row) for row in result]
            if isinstance(result, list)
            else result and dataclasses.asdict(result)
            for case, result in results.items()
        }
        commandline.result(json.dumps({"machine": report.machine(), "cases": plain}, indent=2))
    else:
        commandline.result(report.text(results))
    return commandline.DONE


if __name__ == "__main__":
    sys.exit(main())
