"""``python -m replay``: recompute LCA for every recorded step of a run."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import math
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from recorder import commandline
from recorder.errors import UsageError
from recorder.ranges import describe_ranges
from recorder.recovery import recover
from recorder.runformat import Run
from replay import dropout, dryrun, entries, lossdata, where
from replay.chunks import parse_windows
from replay.job import Job, Receipt, Task, plan
from replay.log import Log
from replay.outcomes import Outcome, gather
from replay.passes import check_recipe, check_table
from replay.precision import PRECISIONS
from replay.progress import with_progress
from replay.quadrature import ADAPTIVE, RULES
from replay.selfcheck import check_update
from replay.serial import run_serially
from replay.shards import FOLDER
from replay.summary import summarise
from replay.where import Where
from replay.work import Replayer, replayer

PROGRAM = "python -m replay"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Recompute Loss Change Allocation for every recorded step of a run. A rerun continues where the "
        "last one stopped.",
        allow_abbrev=False,
    )
    parser.add_argument("--run", type=Path, required=True, metavar="RUN", help="the recorded run")
    parser.add_argument(
        "--loss-data",
        action="append",
        metavar="NAME",
        help="batch, probe:N, valid:N, fresh:N or file:PATH, with NAME= before it to call it otherwise; may be given "
        f"several times (default: {' and '.join(lossdata.DEFAULT)})",
    )
    parser.add_argument(
        "--rule", default=ADAPTIVE.name, choices=sorted(RULES), help="quadrature rule (default %(default)s)"
    )
    parser.add_argument(
        "--rtol",
        type=float,
        default=1e-3,
        help="the books of a step balance if |residual| <= rtol*|change| + atol + rounding (default %(default)s)",
    )
    parser.add_argument("--atol", type=float, default=0.0, help="in nats (default %(default)s)")
    parser.add_argument(
        "--check-every",
        type=int,
        default=1,
        metavar="N",
        help="with rules that have no node at an end of the step (gauss2, gauss3, midpoint, euler): measure the losses "
        "there, and take the residual, at every N-th step only (default %(default)s)",
    )
    parser.add_argument("--steps", metavar="START:STOP", help="only the shards that hold these steps")
    parser.add_argument("--chunk", type=int, default=8, metavar="N", help="steps to a shard (default %(default)s)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument(
        "--dtype",
        choices=list(PRECISIONS),
        help="of loss and gradient; sums are in float64 (default: float32, float64 where training recorded that)",
    )
    parser.add_argument(
        "--dropout",
        choices=[dropout.OFF, dropout.RECORDED],
        default=dropout.OFF,
        help="recorded: on loss data batch the model is in training mode and draws what the training drew; on other "
        "loss data dropout is always off (default %(default)s)",
    )
    parser.add_argument(
        "--per-parameter",
        metavar="WINDOWS",
        help="keep also the LCA of every single entry, summed over windows of steps such as 0:100,100:1000, or over "
        "all; a window takes 8 bytes an entry for each loss data",
    )
    parser.add_argument("--workload", metavar="MODULE:FUNCTION", help="what rebuilds the training; or 'recorded'")
    parser.add_argument("--data", metavar="FOLDER", help="where fairseq's binarised data is now, if it has moved")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check, say what is to be done and, from a trial of three steps, how long it will take; write nothing",
    )
    parser.add_argument("--overwrite", action="store_true", help="compute finished shards of these settings again")
    parser.add_argument("--json", action="store_true", help="the result as JSON on standard output")
    where.add_arguments(parser)
    return parser


def _job(options: argparse.Namespace, run: Run) -> Job:
    texts = tuple(options.loss_data or lossdata.DEFAULT)
    requests = [lossdata.parse(text) for text in texts]
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
    on_gpu = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    device = "cuda" if on_gpu else "cpu"
    if options.dropout == dropout.RECORDED:
        if "batch" not in {request.kind for request in requests}:
            message = (
                f"--dropout recorded: random states are recorded for the training's own batches, and the loss data is "
                f"{', '.join(names)}; add --loss-data batch"
            )
            raise UsageError(message)
        dropout.refuse_if_not_recorded(run, device)
    return Job(
        run=str(options.run),
        run_id=run.manifest.run_id,
        loss_data=texts,
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
        windows=() if options.per_parameter is None else parse_windows(options.per_parameter, run.ever_recorded),
    )


def _wanted(text: str | None, tasks: Sequence[Task]) -> list[Task]:
    if text is None:
        return list(tasks)
    start, separator, stop = text.partition(":")
    if not separator or not all(part == "" or (part.isascii() and part.isdigit()) for part in (start, stop)):
        message = f"--steps expects START:STOP, got {text!r}"
        raise UsageError(message)
    first, last = int(start or 0), int(stop) if stop else None
    return [task for task in tasks if task.stop > first and (last is None or task.start < last)]


def _open(run: Path) -> Run:
    recovered = recover(run)
    if recovered:
        commandline.say(f"{run}: recovered {recovered}, which a killed training left in the making")
    opened = Run(run)
    if not opened.steps:
        message = f"{run} holds no recorded step yet (state: {opened.manifest.state})"
        raise UsageError(message)
    if opened.manifest.unrecorded_changes:
        message = (
            f"{run}: {', '.join(opened.manifest.unrecorded_changes)} changed in training although no step records "
            "them: buffers such as the statistics of batch normalisation, or parameters of an optimizer that was not "
            "watched. Without them the loss cannot be replayed"
        )
        raise UsageError(message)
    return opened


def _remove_stale(run: Run, opened: Replayer) -> None:
    stale = [(folder, entry) for folder in opened.folders.values() for entry in folder.stale(run.attempts_within)]
    for folder, (start, stop) in stale:
        folder.remove(start, stop)
    sums = sum(
        entries.remove_stale(folder.path, run.ever_recorded, run.attempts_within) for folder in opened.folders.values()
    )
    if sums:
        commandline.say(f"{run.path}: {sums} files of entries summed over steps that were recorded anew are removed")
    if stale:
        commandline.say(f"{run.path}: {len(stale)} shards of steps that were recorded anew are removed")


def _say_dropout(opened: Replayer) -> str:
    off = [name for name in opened.loss_data if opened.dropout_of(name) == dropout.OFF]
    recorded = [name for name in opened.loss_data if name not in off]
    return f"dropout as recorded on {', '.join(recorded)}" + (f", off on {', '.join(off)}" if off else "")


def _run_tasks(job: Job, tasks: Sequence[Task], chosen: Where) -> Generator[Outcome]:
    if not chosen.existing and not chosen.dashboard and (chosen.workers == 1 or len(tasks) == 1):
        return run_serially(job, tasks)
    # Imported only where it is needed: dask takes a second.
    from replay.cluster import run_in_cluster

    return run_in_cluster(job, tasks, chosen)


def _replay(options: argparse.Namespace) -> int:
    run = _open(options.run)
    job = _job(options, run)
    chosen = where.chosen(options, job)
    opened = replayer(job)
    outdated = dryrun.stale(opened) if options.dry_run else {}
    if not options.dry_run:
        opened.make_folders()
        _remove_stale(run, opened)
    consecutive = run.consecutive
    for of_entries in opened.entries.values():
        of_entries.refuse_pruned(consecutive)
    whole = plan(job, opened.folders, consecutive, entries=opened.entries, again=True)
    ours = chosen.ours(_wanted(options.steps, whole))
    to_do = plan(job, opened.folders, consecutive, entries=opened.entries, outdated=outdated, again=options.overwrite)
    tasks = [task for task in to_do if (task.start, task.stop) in ours]
    steps = sum(task.stop - task.start for task in tasks)
    commandline.say(
        f"{run.path}: {describe_ranges(consecutive)} recorded; loss data {', '.join(opened.folders)}; "
        f"{job.rule} rule; {steps} steps to do in {len(tasks)} shards"
    )
    check_table(run, opened.surface.shapes)
    if options.dropout == dropout.RECORDED:
        commandline.say(f"{run.path}: {_say_dropout(opened)}")
    report = check_update(run, opened.workload, data=opened.collates)
    # Only of what is to be computed: a rerun that finds everything done has nothing to check.
    work_on = {name for task in tasks for name in task.loss_data}
    commandline.say(f"self-check: {'; '.join([report.text, *check_recipe(opened, work_on)])}")
    if options.dry_run:
        return dryrun.tell(
            opened, ours, tasks, chosen, outdated=outdated, again=options.overwrite, as_json=options.json
        )
    for of_entries in opened.entries.values():
        if options.overwrite:
            of_entries.remove_sums_of((task.start, task.stop) for task in tasks)
        of_entries.add_up()
    if tasks:
        _work(options, opened, tasks, chosen)
    return _conclude(options, opened)


def _work(options: argparse.Namespace, opened: Replayer, tasks: Sequence[Task], chosen: Where) -> None:
    def is_there(task: Task) -> bool:
        left = plan(opened.job, opened.folders, opened.run.consecutive, entries=opened.entries)
        # What is to be computed again was there before.
        return not options.overwrite and all((task.start, task.stop) != (other.start, other.stop) for other in left)

    job, log = opened.job, Log(opened.run.path / FOLDER)
    log.write(f"asked for {len(tasks)} shards: {job}; {chosen}; {_versions()}")
    try:
        with contextlib.closing(_run_tasks(job, tasks, chosen)) as outcomes:
            steps = sum(task.stop - task.start for task in tasks)
            gather(_adding_up(with_progress(outcomes, steps), opened), tasks, log, is_there)
    except BaseException as error:
        log.write(f"ended by {type(error).__name__}: {error}")
        raise
    log.write("all finished")


def _adding_up(outcomes: Iterable[Outcome], opened: Replayer) -> Iterator[Outcome]:
    for outcome in outcomes:
        if isinstance(outcome, Receipt):
            for name in outcome.task.loss_data:
                opened.entries[name].add_up()
        yield outcome


def _versions() -> str:
    packages = ("lossledger", "torch", "numpy", "dask", "distributed")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)


def _conclude(options: argparse.Namespace, opened: Replayer) -> int:
    summaries = {name: summarise(folder) for name, folder in opened.folders.items() if folder.finished()}
    for name, summary in summaries.items():
        for line in summary.lines(name):
            commandline.say(line)
    files = {name: [str(path) for path in opened.entries[name].finished()] for name in summaries}
    for name in summaries:
        for (start, stop), there, of in opened.entries[name].unfinished():
            commandline.say(
                f"{name}: entries of steps {start}:{stop} are there for {there} of {of} chunks; replay the others too"
            )
    if options.json:
        commandline.result(
            json.dumps(
                {
                    name: {
                        "shards": str(opened.folders[name].path),
                        "steps": summary.steps,
                        "status": {status.name.lower(): count for status, count in summary.counts.items()},
                        # JSON has no NaN.
                        "worst_residual": summary.residual_worst if math.isfinite(summary.residual_worst) else None,
                        **({"entries": files[name]} if opened.job.windows else {}),
                    }
                    for name, summary in summaries.items()
                }
            )
        )
    else:
        for name in summaries:
            commandline.result(str(opened.folders[name].path))
            for file in files[name]:
                commandline.result(file)
    balanced = all(summary.balanced for summary in summaries.values())
    return commandline.DONE if balanced else commandline.TOLERANCE_NOT_MET


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
    options = _parser().parse_args(argv)
    return commandline.guarded(PROGRAM, lambda: _replay(options))


if __name__ == "__main__":
    sys.exit(main())
