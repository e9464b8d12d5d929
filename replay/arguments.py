"""The command line of replay: what it understands, and the job that it asks for."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from recorder.errors import UsageError
from replay import dropout, lossdata, where
from replay.chunks import parse_windows
from replay.job import Job
from replay.ledger import SPLIT, WHOLE
from replay.precision import PRECISIONS
from replay.quadrature import ADAPTIVE, RULES
from replay.settings import digest_of_table

if TYPE_CHECKING:
    from recorder.runformat import Run

PROGRAM = "python -m replay"


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command line.

    Returns
    -------
    argparse.ArgumentParser
        Of all options.
    """
    parsing = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Recompute Loss Change Allocation for every recorded step of a run. A rerun continues where the "
        "last one stopped.",
        allow_abbrev=False,
    )
    parsing.add_argument("--run", type=Path, required=True, metavar="RUN", help="the recorded run")
    parsing.add_argument(
        "--loss-data",
        action="append",
        metavar="NAME",
        help="batch, probe:N, valid:N, fresh:N or file:PATH, with NAME= before it to call it otherwise; may be given "
        f"several times (default: {' and '.join(lossdata.DEFAULT)})",
    )
    parsing.add_argument(
        "--rule", default=ADAPTIVE.name, choices=sorted(RULES), help="quadrature rule (default %(default)s)"
    )
    parsing.add_argument(
        "--rtol",
        type=float,
        default=1e-3,
        help="the books of a step balance if |residual| <= rtol*|change| + atol + rounding (default %(default)s)",
    )
    parsing.add_argument("--atol", type=float, default=0.0, help="in nats (default %(default)s)")
    parsing.add_argument(
        "--check-every",
        type=int,
        default=1,
        metavar="N",
        help="with rules that have no node at an end of the step (gauss2, gauss3, midpoint, euler): measure the losses "
        "there, and take the residual, at every N-th step only (default %(default)s)",
    )
    parsing.add_argument("--steps", metavar="START:STOP", help="only the shards that hold these steps")
    parsing.add_argument("--chunk", type=int, default=8, metavar="N", help="steps to a shard (default %(default)s)")
    parsing.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parsing.add_argument(
        "--dtype",
        choices=list(PRECISIONS),
        help="of loss and gradient; sums are in float64 (default: float32, float64 where training recorded that)",
    )
    parsing.add_argument(
        "--dropout",
        choices=[dropout.OFF, dropout.RECORDED],
        default=dropout.OFF,
        help="recorded: on loss data batch the model is in training mode and draws what the training drew; on other "
        "loss data dropout is always off (default %(default)s)",
    )
    parsing.add_argument(
        "--per-parameter",
        metavar="WINDOWS",
        help="keep also the LCA of every single entry, summed over windows of steps such as 0:100,100:1000, or over "
        "all; a window takes 8 bytes an entry for each loss data",
    )
    parsing.add_argument(
        "--tied-weights",
        choices=[SPLIT, WHOLE],
        default=SPLIT,
        help="split: where one tensor has several uses, such as embedding and output projection, tell the LCA of each "
        "use; whole: the tensor as one parameter (default %(default)s)",
    )
    parsing.add_argument("--workload", metavar="MODULE:FUNCTION", help="what rebuilds the training; or 'recorded'")
    parsing.add_argument("--data", metavar="FOLDER", help="where fairseq's binarised data is now, if it has moved")
    parsing.add_argument(
        "--follow",
        action="store_true",
        help="go on while the training is still recording, chunk by chunk, and end when it has ended",
    )
    parsing.add_argument(
        "--prune",
        nargs="?",
        type=int,
        const=0,
        metavar="KEEP",
        help="delete recorded segments once the shards of all this loss data are safe: what they were recorded for is "
        "computed, and nothing else can be computed from them later. The first segments, the last one and KEEP steps "
        "before its end stay (default 0; as many as lie between two checkpoints let a restarted training be verified)",
    )
    parsing.add_argument(
        "--dry-run",
        action="store_true",
        help="check, say what is to be done and, from a trial of three steps, how long it will take; write nothing",
    )
    parsing.add_argument("--overwrite", action="store_true", help="compute finished shards of these settings again")
    parsing.add_argument("--json", action="store_true", help="the result as JSON on standard output")
    where.add_arguments(parsing)
    return parsing


def check(options: argparse.Namespace) -> None:
    """Check what can be checked without the run.

    Parameters
    ----------
    options
        As parsed.

    Raises
    ------
    UsageError
        If options exclude each other or are out of range.
    """
    requests = _requests(options)
    names = [request.name for request in requests]
    if len(set(names)) < len(names):
        message = f"--loss-data: {max(names, key=names.count)!r} is asked for twice; replay them one after the other"
        raise UsageError(message)
    for name in ("chunk", "threads", "workers", "check_every"):
        value = getattr(options, name)
        if value is not None and value < 1:
            message = f"--{name.replace('_', '-')} is at least 1, not {value}"
            raise UsageError(message)
    rule = RULES[options.rule]
    if options.check_every > 1 and rule.starts_at_start and rule.ends_at_end:
        message = (
            f"--check-every {options.check_every}: the {options.rule} rule has the losses at both ends of a step "
            "without further cost, so that every step is checked; leave it out, or choose a rule such as gauss2"
        )
        raise UsageError(message)
    for name in ("rtol", "atol"):
        value = getattr(options, name)
        if not (math.isfinite(value) and value >= 0):
            message = f"--{name} is a number from 0 up, not {value}"
            raise UsageError(message)
    if options.device == "cuda" and not torch.cuda.is_available():
        message = "--device cuda: torch finds no CUDA device here; pass --device cpu"
        raise UsageError(message)
    _check_following(options)


def _requests(options: argparse.Namespace) -> list[lossdata.Request]:
    return [lossdata.parse(text) for text in options.loss_data or lossdata.DEFAULT]


def job(options: argparse.Namespace, run: Run) -> Job:
    """Put together what is to be done.

    Parameters
    ----------
    options
        As parsed and checked.
    run
        The run.

    Returns
    -------
    Job
        The job.

    Raises
    ------
    UsageError
        If the options ask for what the run does not hold.
    """
    requests = _requests(options)
    on_gpu = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    device = "cuda" if on_gpu else "cpu"
    if options.dropout == dropout.RECORDED:
        if "batch" not in {request.kind for request in requests}:
            message = (
                f"--dropout recorded: random states are recorded for the training's own batches, and the loss data is "
                f"{', '.join(request.name for request in requests)}; add --loss-data batch"
            )
            raise UsageError(message)
        dropout.refuse_if_not_recorded(run, device)
    tied = tuple(row.name for row in run.manifest.parameters if row.uses)
    asked = options.per_parameter
    windows = () if asked is None else parse_windows(asked, run.ever_recorded, growing=options.follow)
    return Job(
        run=str(options.run),
        run_id=run.manifest.run_id,
        loss_data=tuple(options.loss_data or lossdata.DEFAULT),
        rule=options.rule,
        rtol=options.rtol,
        atol=options.atol,
        chunk=options.chunk,
        device=device,
        dtype=options.dtype,
        threads=options.threads,
        check_every=options.check_every,
        workload=options.workload,
        data=None if options.data is None else str(Path(options.data).resolve()),
        dropout=options.dropout,
        windows=windows,
        table=digest_of_table(run.manifest.parameters),
        whole=tied if options.tied_weights == WHOLE else (),
    )


def _check_following(options: argparse.Namespace) -> None:
    if options.prune is not None and options.prune < 0:
        message = f"--prune keeps 0 steps or more, not {options.prune}"
        raise UsageError(message)
    follow, prune = options.follow, options.prune is not None
    side_by_side = "commands side by side would wait for each other's shards; prune with one command after them"
    refused = [
        ("--follow", follow, "--steps", options.steps is not None, "nobody knows yet which steps will come"),
        ("--follow", follow, "--dry-run", options.dry_run, "nobody knows yet which steps will come"),
        ("--follow", follow, "--overwrite", options.overwrite, "compute shards again when the training has ended"),
        ("--prune", prune, "--shard", options.shard is not None, side_by_side),
        ("--prune", prune, "--dry-run", options.dry_run, "a dry run changes nothing"),
    ]
    for first, one, second, other, reason in refused:
        if one and other:
            message = f"{first} and {second} exclude each other: {reason}"
            raise UsageError(message)
