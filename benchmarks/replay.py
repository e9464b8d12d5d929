"""What replay costs beside its gradients: ``python -m benchmarks.replay``; README.md says how to read it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import replaycost, replayreport, replayruns
from benchmarks.replaycost import Cost, Variant
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Measure what replay costs beside its gradients.")
    parser.add_argument("--case", choices=[*CASES, "all"], default="all", help="see benchmarks/README.md")
    parser.add_argument("--chunk", type=int, metavar="N", help="steps of a turn (default: of the case)")
    parser.add_argument("--turns", type=int, metavar="N", help="turns of each variant (default: of the case)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="torch's, of both loops (default 1)")
    parser.add_argument("--seed", type=int, default=1, help="decides the order of the turns")
    parser.add_argument("--scratch", type=Path, metavar="FOLDER", help="on the disk to use (default: temporary)")
    parser.add_argument("--json", action="store_true", help="for a machine")
    return parser


def _measure(case: Case, options: argparse.Namespace, scratch: Path) -> list[Cost] | None:
    if case.device == "cuda" and not torch.cuda.is_available():
        return None
    chunk, turns = options.chunk or case.chunk, options.turns or case.turns
    torch.set_num_threads(options.threads)
    run = scratch / "run"
    replayruns.record(
        run, case.factory, steps=chunk * turns + 1, examples=case.examples, lr=case.lr, adam=case.adam,
        device=case.device,
    )  # fmt: skip
    return replaycost.measure(
        run, case.variants, chunk=chunk, turns=turns, threads=options.threads, device=case.device, seed=options.seed
    )


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
    results: dict[str, list[Cost] | None] = {}
    for name in CASES if options.case == "all" else [options.case]:
        commandline.say(f"measuring {name}: {CASES[name].title}")
        with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
            results[name] = _measure(CASES[name], options, Path(scratch))
    if options.json:
        plain = {name: costs and [dataclasses.asdict(cost) for cost in costs] for name, costs in results.items()}
        commandline.result(json.dumps({"machine": machine(), "threads": options.threads, "cases": plain}, indent=2))
    else:
        titles = {name: case.title for name, case in CASES.items()}
        commandline.result(replayreport.text(results, titles, options.threads))
    return commandline.DONE


if __name__ == "__main__":
    sys.exit(main())
