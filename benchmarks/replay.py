"""What replay costs beside its gradients: ``python -m benchmarks.replay``; README.md says how to read it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import replaycost, replayreport, replayruns, replaystacked, replayworkers
from benchmarks.replaycost import Variant
from benchmarks.replayreport import Result
from benchmarks.replaystacked import Stacked
from benchmarks.report import machine
from recorder import commandline
from recorder.errors import UsageError

PROGRAM = "python -m benchmarks.replay"

REACH = 1.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One training, and how it is replayed.

    Parameters
    ----------
    title
        What it is.
    factory
        Makes its workload.
    examples, lr, adam
        As for `benchmarks.replayruns.record`.
    chunk, turns
        Steps of a turn, and turns of each variant.
    variants
        What is measured.
    device
        Where.
    """

    title: str
    factory: Callable[[], Any]
    examples: int
    lr: float
    adam: bool
    chunk: int
    turns: int
    variants: tuple[Variant, ...]
    device: str = "cpu"


def _of_language_model(examples: int, reach: float | None) -> tuple[Variant, ...]:
    return (
        Variant(loss_data="batch", rule="simpson", reach=reach),
        Variant(loss_data=f"probe:{examples}", rule="simpson"),
        Variant(loss_data="batch", rule="gauss2"),
        Variant(loss_data="batch", rule="gauss2", check_every=4),
        Variant(loss_data="batch", rule="adaptive"),
    )


CASES = {
    "large": Case(
        title="a causal language model of 12 layers, width 512, 42 million parameters, 1,000 tokens an update",
        factory=replayruns.large, examples=8, lr=5e-4, adam=True, chunk=4, turns=2,
        variants=_of_language_model(8, REACH),
    ),
    "small": Case(
        title="a causal language model of 2 layers, width 64, 0.2 million parameters, 248 tokens an update",
        factory=replayruns.small, examples=8, lr=5e-4, adam=True, chunk=32, turns=6,
        variants=_of_language_model(8, None),
    ),
    "digits": Case(
        title="the original program's work: 8x8 digits, three fully connected layers, SGD 0.5, loss of all the data",
        factory=replayruns.digits, examples=250, lr=0.5, adam=False, chunk=50, turns=6,
        variants=(Variant(loss_data="probe:1797", rule="adaptive"), Variant(loss_data="probe:1797", rule="simpson")),
    ),
    "gpu": Case(
        title="the large one on a GPU, 32,000 tokens an update",
        factory=replayruns.large, examples=256, lr=5e-4, adam=True, chunk=8, turns=4, device="cuda",
        variants=_of_language_model(256, REACH),
    ),
}  # fmt: skip

STACKED, WORKERS = "stacked", "workers"

TITLES = {
    **{name: case.title for name, case in CASES.items()},
    STACKED: "several gradients at once with torch.func, against one by one",
    WORKERS: "two worker processes of one thread each, against one",
}

POINTS = (2, 3, 8, 16)
"""Gradients at once: of a step's rule, and of several steps."""

STACKED_TURNS = 16

WORKERS_STEPS, WORKERS_TURNS = 400, 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Measure what replay costs beside its gradients.")
    parser.add_argument("--case", choices=[*TITLES, "all"], default="all", help="see benchmarks/README.md")
    parser.add_argument(
        "--chunk", type=int, metavar="N", help="steps of a turn, with workers all (default: of the case)"
    )
    parser.add_argument("--turns", type=int, metavar="N", help="turns of each variant (default: of the case)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="torch's, of both loops (default 1)")
    parser.add_argument("--seed", type=int, default=1, help="decides the order of the turns")
    parser.add_argument("--scratch", type=Path, metavar="FOLDER", help="on the disk to use (default: temporary)")
    parser.add_argument("--json", action="store_true", help="for a machine")
    return parser


def _measure(name: str, options: argparse.Namespace, scratch: Path) -> Result:
    torch.set_num_threads(options.threads)
    if name == STACKED:
        return _stacked(options)
    if name == WORKERS:
        return _workers(options, scratch)
    case = CASES[name]
    if case.device == "cuda" and not torch.cuda.is_available():
        return None
    chunk, turns = options.chunk or case.chunk, options.turns or case.turns
    run = scratch / "run"
    replayruns.record(
        run, case.factory, steps=chunk * turns + 1, examples=case.examples, lr=case.lr, adam=case.adam,
        device=case.device,
    )  # fmt: skip
    return replaycost.measure(run, case.variants, chunk=chunk, turns=turns, threads=options.threads, device=case.device)


def _stacked(options: argparse.Namespace) -> list[Stacked]:
    order = random.Random(options.seed)  # noqa: S311 (no secret)
    return [
        replaystacked.measure(
            name, CASES[name].factory(), examples=CASES[name].examples, points=points,
            turns=options.turns or STACKED_TURNS, order=order,
        )
        for name in ("digits", "small")
        for points in POINTS
    ]  # fmt: skip


def _workers(options: argparse.Namespace, scratch: Path) -> Result:
    steps, run = options.chunk or WORKERS_STEPS, scratch / "run"
    if steps < 4 * replayworkers.CHUNK:
        message = f"--case {WORKERS} takes at least {4 * replayworkers.CHUNK} steps, not {steps}"
        raise UsageError(message)
    # Small enough for each core's own cache: what two workers share is the memory, and it is not what is measured.
    replayruns.record(run, replayruns.small, steps=steps, examples=32, lr=5e-4, adam=True, device="cpu")
    return replayworkers.measure(run, steps=steps, turns=options.turns or WORKERS_TURNS, seed=options.seed)


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
    for name in ("chunk", "turns", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            message = f"--{name} is at least 1, not {value}"
            raise UsageError(message)
    results: dict[str, Result] = {}
    for name in TITLES if options.case == "all" else [options.case]:
        commandline.say(f"measuring {name}: {TITLES[name]}")
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
            results[name] = _measure(name, options, Path(scratch))
        commandline.say(f"measured {name} in {time.perf_counter() - began:.0f} s")
    if options.json:
        plain = {name: replayreport.plain(result) for name, result in results.items()}
        commandline.result(json.dumps({"machine": machine(), "threads": options.threads, "cases": plain}, indent=2))
    else:
        commandline.result(replayreport.text(results, TITLES, options.threads))
    return commandline.DONE


if __name__ == "__main__":
    sys.exit(main())
