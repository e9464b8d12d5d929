"""What rounding does to the residual of a step: ``python -m benchmarks.rounding``; README.md says how to read it.

The steps of a small language model, each allocated in every precision and once more in float64: where the residuals
differ, it is by rounding. In float64 only the first hundredth of each step is taken, where the rule's own error, which
falls with the fifth power of a step's length, is nothing beside the rounding.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.replayruns import LanguageModelling
from benchmarks.report import machine, table
from recorder import commandline
from replay.allocate import allocate
from replay.allocation import Allocation
from replay.between import Between
from replay.evaluation import Theta
from replay.gradients import LossSurface
from replay.precision import PRECISIONS
from replay.quadrature import RULES
from replay.tolerance import Tolerance

PROGRAM = "python -m benchmarks.rounding"

PART_IN_FLOAT64 = 0.01
"""Of every step."""

_CPU = torch.device("cpu")
_FREE = Tolerance(rtol=0.0, atol=0.0)


def steps_of(task: LanguageModelling, steps: int, sequences: int) -> Iterator[tuple[Theta, Theta, Any]]:
    """Train with Adam, learning rate 1e-3 after a warm-up of 20 updates.

    Parameters
    ----------
    task
        Model and data.
    steps, sequences
        Updates, and sequences of each.

    Yields
    ------
    tuple
        Of every update the parameters before and after it, float32, and its batch.
    """
    torch.manual_seed(1)
    model, draw = task.model(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: min((update + 1) / 20, 1))
    available = len(task.indices("train"))
    end = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    for _ in range(steps):
        chosen = torch.randperm(available, generator=draw)[:sequences]
        batch = task.batch(chosen.tolist(), split="train", epoch=1)
        loss, count = task.loss(model, batch)
        (loss / count).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        start, end = end, {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
        yield start, end, batch


def measure(task: LanguageModelling, steps: int, sequences: int) -> dict[str, Any]:
    """Allocate every step in every precision.

    Parameters
    ----------
    task, steps, sequences
        As for `steps_of`.

    Returns
    -------
    dict
        ``loss`` and ``change`` of every step in nats, and for every precision by name what rounding moved the
        residual by, in nats; float64 of shape (steps,).
    """
    names = [name for name, _ in task.model().named_parameters()]
    surfaces = {name: LossSurface(task, names, {}, _CPU, precision) for name, precision in PRECISIONS.items()}

    def allocated(precision: str, start: Theta, end: Theta, batch: Any) -> Allocation:
        surface, batches = surfaces[precision], [batch]
        return allocate(
            start, end, RULES["simpson"],
            evaluate=lambda theta: surface.evaluate(theta, batches),
            loss=lambda theta: surface.loss(theta, batches),
            tolerance=_FREE,
        )  # fmt: skip

    found: dict[str, list[float]] = {name: [] for name in ("loss", "change", *PRECISIONS)}
    for start, end, batch in steps_of(task, steps, sequences):
        double = PRECISIONS["float64"]
        wide_start, wide_end = double.converted(start), double.converted(end)
        exact = allocated("float64", wide_start, wide_end, batch)
        found["loss"].append(max(exact.loss_start, exact.loss_end))
        found["change"].append(exact.change)
        for name, precision in PRECISIONS.items():
            if precision is double:
                part = dict(Between(wide_start, wide_end, PART_IN_FLOAT64))
                found[name].append(allocated(name, wide_start, part, batch).residual)
            else:
                found[name].append(allocated(name, start, end, batch).residual - exact.residual)
    return {name: np.array(values) for name, values in found.items()}


def _rows(task: LanguageModelling, sequences: int, found: Mapping[str, Any]) -> Iterator[tuple[object, ...]]:
    predictions = sequences * task.length
    for name, precision in PRECISIONS.items():
        share = abs(found[name]) / found["loss"]
        floor = precision.rounding.over(predictions)
        yield (
            name,
            predictions,
            f"{found['loss'].mean():.2f}",
            f"{np.median(abs(found['change'])):.1e}",
            f"{np.median(share):.1e}",
            f"{share.max():.1e}",
            f"{share.max() / precision.epsilon:.3g} ε",
            f"{floor:.1e}",
            f"**{floor / share.max():.1f}**",
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
        Exit code.
    """
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Measure what rounding does to residuals.")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="updates (default %(default)s)")
    parser.add_argument(
        "--sequences", type=int, nargs="+", default=[1, 4, 16, 64], metavar="N",
        help="of 31 predictions each, in an update (default 1 4 16 64)",
    )  # fmt: skip
    return commandline.guarded(PROGRAM, partial(_run, parser.parse_args(arguments)))


def _run(options: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    task = LanguageModelling(vocabulary=1000, layers=2, width=64, length=31)
    rows: list[tuple[object, ...]] = []
    for sequences in options.sequences:
        commandline.say(f"measuring {options.steps} updates of {sequences} sequences")
        rows += _rows(task, sequences, measure(task, options.steps, sequences))
    head = (
        "numbers", "predictions", "loss, nat", "change, median", "rounding / loss, median", "worst", "worst in ε",
        "floor / loss", "floor / worst",
    )  # fmt: skip
    commandline.result("\n\n".join(["# What rounding does to residuals", f"{machine()}.", table(head, sorted(rows))]))
    return commandline.DONE


if __name__ == "__main__":
    sys.exit(main())
