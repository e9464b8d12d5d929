"""``--dry-run``: what a replay is going to take, counted from the run, then timed in a trial; nothing is written."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

from recorder import commandline
from recorder.manifest import CHORD
from replay import cost
from replay.forecast import Forecast, forecast
from replay.job import plan
from replay.quadrature import AdaptiveRule
from replay.readcost import Reading, readings
from replay.trial import try_steps

if TYPE_CHECKING:
    from replay.chunks import Range
    from replay.job import Task
    from replay.where import Where
    from replay.work import Replayer

Stale = Mapping[str, Collection[tuple[int, int]]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """What is known of a replay before anything is computed.

    Parameters
    ----------
    steps, chunks
        To do.
    shards
        Loss data to how many of the chunks that were asked for are done: ``done`` of ``of``.
    gradient_evaluations_at_least
        Exact but for the adaptive rule, which may need more.
    forward_passes
        For losses at ends of a step, without gradients. Those of the self-check are not among them.
    read_bytes, write_bytes, entries_bytes
        Of segments; of shards; of the sums of single entries, without the parts they are made of. All without the
        headers of files.
    free_bytes
        Where the run stands.
    worker_bytes
        Memory of a worker, beside Python's libraries and one pass over a micro-batch; None where nothing is to do.
    workers
        How many will work; None where a cluster has its own.
    """

    steps: int
    chunks: int
    shards: dict[str, dict[str, int]]
    gradient_evaluations_at_least: int
    forward_passes: int
    read_bytes: int
    write_bytes: int
    entries_bytes: int
    free_bytes: int
    worker_bytes: int | None
    workers: int | None


def stale(opened: Replayer) -> Stale:
    """List the shards of steps that were recorded anew: a replay removes them, a dry run counts them as missing.

    Parameters
    ----------
    opened
        The run, opened for replay.

    Returns
    -------
    mapping of str to collection of (int, int)
        Loss data to start and stop of each.
    """
    return {name: folder.stale(opened.run.attempts_within) for name, folder in opened.folders.items()}


def tell(
    opened: Replayer,
    asked_for: Collection[Range],
    tasks: Sequence[Task],
    where: Where,
    *,
    outdated: Stale,
    again: bool,
    as_json: bool,
) -> None:
    """Say what a replay is going to take.

    Parameters
    ----------
    opened
        The run, opened for replay.
    asked_for
        Start and stop of the chunks that the command line chooses, also of those that are done.
    tasks
        Those that are to do.
    where
        In which processes the work would be done.
    outdated
        As by `stale`.
    again
        Whether what is done is computed again.
    as_json
        One JSON object on standard output, for lines on standard error.
    """
    workers = None if where.existing else min(where.workers, max(len(tasks), 1))
    to_read = list(readings(opened.run, tasks, afresh=workers != 1))
    counts = Counts(
        steps=sum(task.stop - task.start for task in tasks),
        chunks=len(tasks),
        shards=_shards(opened, asked_for, outdated),
        gradient_evaluations_at_least=sum(cost.evaluations(opened, task) for task in tasks),
        forward_passes=sum(sum(cost.forward_passes(opened, task).values()) for task in tasks),
        read_bytes=sum(reading.bytes for reading in to_read),
        write_bytes=sum(cost.bytes_written(opened, task) for task in tasks),
        entries_bytes=_entries_bytes(opened, tasks, again=again or any(outdated.values())),
        free_bytes=shutil.disk_usage(opened.run.path).free,
        worker_bytes=max((cost.bytes_in_memory(opened, task) for task in tasks), default=None),
        workers=workers,
    )
    if not as_json:
        for line in _counted(counts, opened, again=again):
            commandline.say(line)
    to_write = counts.write_bytes + counts.entries_bytes
    if to_write > counts.free_bytes:
        commandline.say(
            f"warning: {opened.run.path}: {decimal(to_write)} are to be written and {decimal(counts.free_bytes)} are "
            "free: the replay will fail for want of space"
        )
    expected = _tried(opened, tasks, to_read, workers)
    if as_json:
        commandline.result(json.dumps(_document(opened, counts, expected)))
    elif expected is None:
        commandline.say(_line("trial", "none: there is nothing to do"))
    else:
        for line in _timed(expected, opened):
            commandline.say(line)


def _tried(opened: Replayer, tasks: Sequence[Task], to_read: Sequence[Reading], workers: int | None) -> Forecast | None:
    return forecast(opened, tasks, to_read, try_steps(opened, tasks), workers) if tasks else None


def _shards(opened: Replayer, asked_for: Collection[Range], outdated: Stale) -> dict[str, dict[str, int]]:
    left = plan(opened.job, opened.folders, opened.run, entries=opened.entries, outdated=outdated)
    missing = {(task.start, task.stop): task.loss_data for task in left}
    return {
        name: {"done": sum(name not in missing.get(chunk, ()) for chunk in asked_for), "of": len(asked_for)}
        for name in opened.folders
    }


def _entries_bytes(opened: Replayer, tasks: Sequence[Task], *, again: bool) -> int:
    return sum(
        of_entries.bytes_to_come([(task.start, task.stop) for task in tasks if name in task.loss_data], again=again)
        for name, of_entries in opened.entries.items()
    )


def _line(name: str, text: str) -> str:
    return f"{name:25}{text}"


def _counted(counts: Counts, opened: Replayer, *, again: bool) -> Iterator[str]:
    adaptive = isinstance(opened.rule, AdaptiveRule)
    most = "" if counts.workers == 1 else "at most "
    yield _line(
        f"{opened.run.noun}s to do",
        f"{counts.steps:,} in {counts.chunks:,} chunks" + (", done or not" if again else ""),
    )
    shards = (f"{name} {count['done']:,} of {count['of']:,}" for name, count in counts.shards.items())
    yield _line("shards done", ", ".join(shards))
    least = "at least " if adaptive else ""
    yield _line("gradient evaluations", f"{least}{counts.gradient_evaluations_at_least:,}")
    if counts.forward_passes:
        yield _line("forward passes", f"{counts.forward_passes:,} for losses alone")
    yield _line(
        "to read",
        f"{most}{decimal(counts.read_bytes)} of {'checkpoints' if opened.run.manifest.path == CHORD else 'segments'}",
    )
    entries = f" and {decimal(counts.entries_bytes)} of single entries" if counts.entries_bytes else ""
    yield _line("to write", f"{decimal(counts.write_bytes)} of shards{entries}; {decimal(counts.free_bytes)} are free")
    if counts.worker_bytes is not None:
        yield _line(
            "memory of a worker",
            f"about {decimal(counts.worker_bytes)}, beside Python's libraries and one pass over a micro-batch",
        )


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _timed(expected: Forecast, opened: Replayer) -> Iterator[str]:
    noun = opened.run.noun
    tried = [opened.run.updates(t)[0] for t in expected.trial.steps]
    steps = f"{noun} {tried[0]}" if len(tried) == 1 else f"{len(tried)} {noun}s, {', '.join(map(str, tried))}"
    yield _line(
        "trial",
        f"{steps}: {_brief(expected.evaluation_seconds)} an evaluation, {_brief(expected.step_seconds)} a {noun}",
    )
    if isinstance(opened.rule, AdaptiveRule):
        means = ", ".join(
            f"{name} {pace.evaluations:.1f}" for name, pace in expected.trial.paces.items() if pace.evaluations
        )
        yield _line(
            "evaluations expected",
            f"{expected.gradient_evaluations:,.0f}, if all are like these (by itself {_article(noun)} took {means})",
        )
    if expected.expected_seconds is None:
        yield _line(
            "expected time",
            f"{duration(expected.work_seconds)} of one worker, and {_brief(expected.opening_seconds)} for each to open "
            f"the run: {expected.evaluations_per_second:,.3g} evaluations/s a worker; divide by the cluster's workers",
        )
    else:
        workers = "1 worker" if expected.workers == 1 else f"{expected.workers} workers"
        yield _line(
            "expected time",
            f"{duration(expected.expected_seconds)} with {workers}, {expected.evaluations_per_second:,.3g} "
            f"evaluations/s, {_brief(expected.opening_seconds)} to open the run included",
        )


def _brief(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def duration(seconds: float) -> str:
    """Say a duration as people do.

    Parameters
    ----------
    seconds
        From 0 up.

    Returns
    -------
    str
        In its two largest units.

    Examples
    --------
    >>> [duration(seconds) for seconds in (0.04, 8.25, 200, 12000, 200000)]
    ['0.04 s', '8.2 s', '3 min 20 s', '3 h 20 min', '2 d 7 h']
    """
    if seconds < 59.5:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def _document(opened: Replayer, counts: Counts, expected: Forecast | None) -> dict[str, Any]:
    derived = ("evaluation_seconds", "step_seconds", "evaluations_per_second")
    names = (*(field.name for field in dataclasses.fields(Forecast)), *derived)
    timed = dict.fromkeys(names) if expected is None else {name: getattr(expected, name) for name in names}
    trial = None if expected is None else dataclasses.asdict(expected.trial)
    return {"run": str(opened.run.path), **timed, **dataclasses.asdict(counts), "trial": trial}
