"""``python -m replay``: recompute LCA for every recorded step of a run."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import sys
import time
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence

from recorder import commandline
from recorder.errors import UsageError
from recorder.manifest import MANIFEST_FILE, Manifest
from recorder.ranges import describe_ranges
from recorder.runformat import Run
from replay import arguments, dropout, dryrun, where
from replay.adoption import takable, take_over
from replay.arguments import PROGRAM
from replay.conclusion import conclude
from replay.follow import Following, wait_for_first_step
from replay.job import Job, Receipt, Task, plan
from replay.log import Log
from replay.opening import open_run
from replay.outcomes import Outcome, gather
from replay.passes import check_recipe, check_table
from replay.progress import with_progress
from replay.pruning import prune_finished
from replay.selfcheck import check_update
from replay.separation import opened_by_use
from replay.serial import run_serially
from replay.shardfolder import FOLDER
from replay.stale import remove_stale
from replay.tablemark import mark_table
from replay.where import Where
from replay.work import Replayer

PRUNE_SECONDS = 10.0
"""Between two deletions of segments while the work goes on."""


def _wanted(text: str | None, run: Run, tasks: Sequence[Task]) -> list[Task]:
    if text is None:
        return list(tasks)
    start, separator, stop = text.partition(":")
    if not separator or not all(part == "" or (part.isascii() and part.isdigit()) for part in (start, stop)):
        message = f"--steps expects START:STOP, got {text!r}"
        raise UsageError(message)
    first, last = int(start or 0), int(stop) if stop else None
    updates = {task: (run.updates(task.start)[0], run.updates(task.stop - 1)[1]) for task in tasks}
    return [task for task, (start, stop) in updates.items() if stop > first and (last is None or start < last)]


def _without(tasks: Sequence[Task], taken: Mapping[str, Collection[tuple[int, int]]]) -> list[Task]:
    # A dry run takes nothing over; what a replay would take over is not to do.
    for name, ranges in taken.items():
        if ranges:
            commandline.say(
                f"the shards on {name} of {describe_ranges(sorted(ranges))} will be taken over, not computed"
            )
    left = [
        dataclasses.replace(
            task,
            loss_data=tuple(name for name in task.loss_data if (task.start, task.stop) not in taken.get(name, ())),
        )
        for task in tasks
    ]
    return [task for task in left if task.loss_data]


def _say_dropout(opened: Replayer) -> str:
    off = [name for name in opened.loss_data if opened.measuring.dropout_of(name) == dropout.OFF]
    recorded = [name for name in opened.loss_data if name not in off]
    return f"dropout as recorded on {', '.join(recorded)}" + (f", off on {', '.join(off)}" if off else "")


def _run_tasks(job: Job, tasks: Sequence[Task], chosen: Where, following: Following | None) -> Generator[Outcome]:
    one = chosen.workers == 1 or (len(tasks) == 1 and following is None)
    if one and not chosen.existing and not chosen.dashboard:
        return run_serially(job, tasks, following)
    # Imported only where it is needed: dask takes a second.
    from replay.cluster import run_in_cluster

    return run_in_cluster(job, tasks, chosen, following)


def _replay(options: argparse.Namespace) -> int:
    arguments.check(options)
    if options.follow and (options.run / MANIFEST_FILE).exists():
        arguments.check_path(options, Manifest.read(options.run))
    if options.follow:
        wait_for_first_step(options.run)
    while True:
        run = open_run(options.run)
        job = arguments.job(options, run)
        chosen = where.chosen(options, job)
        opened, tied = opened_by_use(job, run)
        why_anew = _sit(options, opened, chosen, tied)
        if not why_anew:
            break
        commandline.say(f"{run.path}: {why_anew}; the run is opened anew")
    return commandline.DONE if options.dry_run else conclude(opened, as_json=options.json)


def _sit(options: argparse.Namespace, opened: Replayer, chosen: Where, tied: Sequence[str]) -> str:
    # Everything from one opening of the run; in words, why it must be opened anew.
    run, job = opened.run, opened.job
    outdated = dryrun.stale(opened) if options.dry_run else {}
    if not options.dry_run:
        opened.make_folders()
        remove_stale(opened)
        take_over(opened)
        mark_table(run.path, next(iter(opened.folders.values())).settings.parameter_table)
    consecutive = run.consecutive
    for of_entries in opened.entries.values():
        of_entries.refuse_pruned(run.pruned, consecutive)
    ours = chosen.ours(_wanted(options.steps, run, plan(job, opened.folders, run, entries=opened.entries, again=True)))
    still = run.manifest.state == "recording"
    to_do = plan(
        job,
        opened.folders,
        run,
        entries=opened.entries,
        outdated=outdated,
        again=options.overwrite,
        whole=options.follow and still,
    )
    if options.dry_run and not options.overwrite:
        to_do = _without(to_do, takable(opened))
    tasks = [task for task in to_do if (task.start, task.stop) in ours]
    steps = sum(task.stop - task.start for task in tasks)
    commandline.say(
        f"{run.path}: {run.describe()}; loss data {', '.join(opened.folders)}; {job.rule} rule; {steps} {run.noun}s to "
        f"do in {len(tasks)} shards"
    )
    check_table(run, opened.surface.shapes)
    if options.dropout == dropout.RECORDED:
        commandline.say(f"{run.path}: {_say_dropout(opened)}")
    report = check_update(run, opened.workload, data=opened.collates)
    # Only of what is to be computed: a rerun that finds everything done has nothing to check.
    work_on = set(opened.loss_data) if options.follow else {name for task in tasks for name in task.loss_data}
    commandline.say(f"self-check: {'; '.join([report.text, *tied, *check_recipe(opened, work_on)])}")
    if options.dry_run:
        dryrun.tell(opened, ours, tasks, chosen, outdated=outdated, again=options.overwrite, as_json=options.json)
        return ""
    for of_entries in opened.entries.values():
        if options.overwrite:
            of_entries.remove_sums_of((task.start, task.stop) for task in tasks)
        of_entries.add_up()
    following = Following(opened, chosen, tasks) if options.follow else None
    if tasks or following:
        _work(options, opened, tasks, chosen, following)
    if following is not None and following.why_anew:
        return following.why_anew
    if options.follow:
        commandline.say(f"{run.path}: the recording has ended ({opened.run.manifest.state})")
    if options.prune is not None:
        _prune(opened, options.prune)
    return ""


def _work(
    options: argparse.Namespace,
    opened: Replayer,
    tasks: Sequence[Task],
    chosen: Where,
    following: Following | None,
) -> None:
    def is_there(task: Task) -> bool:
        left = plan(opened.job, opened.folders, opened.run, entries=opened.entries)
        # What is to be computed again was there before.
        return not options.overwrite and all((task.start, task.stop) != (other.start, other.stop) for other in left)

    job, log = opened.job, Log(opened.run.path / FOLDER)
    log.write(f"asked for {len(tasks)} shards: {job}; {chosen}; {_versions()}")
    try:
        with contextlib.closing(_run_tasks(job, tasks, chosen, following)) as outcomes:
            settled = _settling(with_progress(outcomes, tasks, opened.run.noun), opened, following, options.prune)
            gather(settled, tasks, log, is_there, opened.run.describe_steps)
        for of_entries in opened.entries.values():
            of_entries.add_up()
    except BaseException as error:
        log.write(f"ended by {type(error).__name__}: {error}")
        raise
    log.write("all finished")


def _settling(
    outcomes: Iterable[Outcome], opened: Replayer, following: Following | None, keep: int | None
) -> Iterator[Outcome]:
    pruned = time.monotonic()
    for outcome in outcomes:
        if isinstance(outcome, Receipt):
            for name in outcome.task.loss_data:
                opened.entries[name].add_up()
            if following is not None:
                following.settle(outcome.task)
        yield outcome
        if keep is not None and time.monotonic() - pruned > PRUNE_SECONDS:
            prune_finished(opened, keep)
            pruned = time.monotonic()


def _prune(opened: Replayer, keep: int) -> None:
    prune_finished(opened, keep)
    pruned = Run(opened.run.path).pruned
    if pruned:
        commandline.say(f"{opened.run.path}: pruned are {describe_ranges(pruned)}; their shards are there")


def _versions() -> str:
    packages = ("lossledger", "torch", "numpy", "dask", "distributed")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)


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
    options = arguments.parser().parse_args(argv)
    return commandline.guarded(PROGRAM, lambda: _replay(options))


if __name__ == "__main__":
    sys.exit(main())
