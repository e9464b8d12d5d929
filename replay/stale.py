"""Shards of steps that a restarted training has recorded anew since: they are not of this run any more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from recorder import commandline
from recorder.ranges import overlap
from replay import entries

if TYPE_CHECKING:
    from replay.shardfolder import ShardFolder
    from replay.work import Replayer


def remove_stale(opened: Replayer) -> None:
    """Remove what was computed from steps that were recorded anew, and say so.

    Of a shard whose other steps were pruned those are kept: nothing could compute them again.

    Parameters
    ----------
    opened
        The run as it is now, and the folders of what was computed from it.
    """
    run = opened.run
    removed = cut = sums = 0
    for folder in opened.folders.values():
        for start, stop in folder.stale(run.attempts_within):
            end = _same_until(opened, folder, start, stop)
            if overlap(run.pruned, start, end):
                # The steps that are kept first: a kill between the two loses none of them.
                folder.write(start, end, folder.read(start, stop).before(end), run.attempts_within(start, end))
                folder.remove(start, stop)
                cut += 1
            else:
                folder.remove(start, stop)
                removed += 1
        sums += entries.remove_stale(folder.path, run.ever_recorded, run.attempts_within)
    if removed:
        commandline.say(f"{run.path}: {removed} shards of steps that were recorded anew are removed")
    if cut:
        commandline.say(f"{run.path}: {cut} shards keep what comes before the steps that were recorded anew")
    if sums:
        commandline.say(f"{run.path}: {sums} files of entries summed over steps that were recorded anew are removed")


def _same_until(opened: Replayer, folder: ShardFolder, start: int, stop: int) -> int:
    # The first step that another attempt has recorded since, or that is not there any more.
    then, now = (
        {t: number for number, first, last in attempts for t in range(first, last)}
        for attempts in (folder.attempts(start, stop), opened.run.attempts_within(start, stop))
    )
    return next((t for t in range(start, stop) if then.get(t) != now.get(t)), stop)
