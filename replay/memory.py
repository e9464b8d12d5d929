"""How much memory a worker takes, told beforehand.

Beside what Python and its libraries take before a run is opened, the resident memory of a worker reaches

    P · (c + 3·r + [r ≠ c]·3·c + 2·r + 8·w)
    + U · (g·(n·c + 16·[refined]) + c/2 + f·c + 8·[sampled])  +  S  +  A  +  25 MB

where P is the number of trained entries, U the same with those of tied weights once for each use that is told apart,
r and c the bytes of an entry as it is recorded and computed, n the gradients that the rule looks at together, g the
loss data whose gradients are kept together (1, or the groups of a file and 1 more if others are there too), f the fixed
loss data whose gradient at the end of the last step is kept while another is at work, w the loss data of which single
entries are kept, S the rows of a shard, and A what a forward and backward pass over one micro-batch takes. In the
order of the terms: the model; θ at both ends of the step and the one read ahead, converted once more where the dtypes
differ; a coded step being read, once mapped from its file and once copied; entries being added up; the gradients, and
two sums in float64 of a step that the adaptive rule refines; gaps of the heap; the gradients kept; the update in
float64 while the spread of a sample is taken; and 25 MB of libraries' code and buffers that come with the first step,
the coder's among them.

Nothing of it grows with the number of steps. Measured peaks (`VmHWM` of Linux, models of 5 to 150 MB trained with Adam)
are within a fifth of it, on both sides: a coded step is smaller than θ, and gaps come and go by chance. A is the
training's own, so the dry run leaves it out and says so. A rule that refines is foretold as if it refined.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from recorder.table import Parameter
from replay.quadrature import AdaptiveRule

if TYPE_CHECKING:
    from replay.precision import Precision
    from replay.quadrature import Rule


BUFFERS = 25_000_000
"""Bytes of libraries' code and buffers that come with the first step."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """What a task's loss data make a worker hold.

    Parameters
    ----------
    together
        g, the loss data whose gradients are kept together.
    kept
        f, those whose gradient at the end of the last step is kept while another is at work.
    sampled
        Whether the spread of a sample is taken.
    summed
        w, the loss data of which single entries are kept.
    rows
        S, bytes of the task's shards.
    """

    together: int = 1
    kept: int = 0
    sampled: bool = False
    summed: int = 0
    rows: int = 0


def bytes_of_worker(trained: Sequence[Parameter], rule: Rule | AdaptiveRule, precision: Precision, held: Held) -> int:
    """Estimate what a worker takes beside its libraries and one pass over a micro-batch.

    Parameters
    ----------
    trained
        The rows in the ledger.
    rule
        The quadrature rule.
    precision
        In which numbers loss and gradient are computed.
    held
        What the task's loss data add.

    Returns
    -------
    int
        Bytes; of one worker.
    """
    parameters = [row for row in trained if row.tied_to is None]
    entries = sum(row.size for row in parameters)
    recorded: int = sum(row.size * getattr(torch, row.dtype).itemsize for row in parameters)
    computed = entries * precision.dtype.itemsize
    states = 3 * recorded + (3 * computed if recorded != computed else 0)
    # The uses of tied weights share their values, and have a gradient each.
    of_uses = sum(row.size for row in trained)
    gradient = of_uses * precision.dtype.itemsize
    refined = 16 * of_uses if isinstance(rule, AdaptiveRule) else 0
    gradients = held.together * (rule.least_evaluations * gradient + refined) + held.kept * gradient
    sums = 8 * held.sampled * of_uses + 8 * held.summed * entries
    return computed + states + 2 * recorded + gradients + gradient // 2 + sums + held.rows + BUFFERS
