"""The end of a replay: the books of each loss data, and the files."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

from recorder import commandline
from replay.summary import summarise

if TYPE_CHECKING:
    from replay.work import Replayer


def conclude(opened: Replayer, *, as_json: bool) -> int:
    """Say how good the books are and where the shards are.

    Parameters
    ----------
    opened
        The run, replayed.
    as_json
        The result as JSON.

    Returns
    -------
    int
        The exit code: whether all entries met the tolerance.
    """
    summaries = {name: summarise(folder) for name, folder in opened.folders.items() if folder.finished()}
    for name, summary in summaries.items():
        for line in summary.lines(name):
            commandline.say(line)
    files = {name: [str(path) for path in opened.entries[name].finished()] for name in summaries}
    for name in summaries:
        for (start, stop), there, of in opened.entries[name].unfinished():
            first, last = opened.run.updates(start)[0], opened.run.updates(stop - 1)[1]
            commandline.say(
                f"{name}: entries of steps {first}:{last} are there for {there} of {of} chunks; replay the others too"
            )
        for start, stop in opened.job.windows:
            if not opened.entries[name].holds((start, stop)):
                commandline.say(f"{name}: no step of {start}:{stop} was recorded; no entries are kept of it")
    if as_json:
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
