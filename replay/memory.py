"""How much memory a worker takes, told beforehand.

Beside what Python and its libraries take before a run is opened, a worker holds

    P · (c + 3·r + [r ≠ c]·3·c + n·c + f·c + 16·[refined] + 8·[sampled] + r)  +  S  +  A  +  40 MB

where P is the number of trained entries, r and c the bytes of an entry as it is recorded and computed, n the gradients
that the rule looks at together, f the number of fixed loss data beside the first, S the rows of a shard, and A what a
forward and backward pass over one micro-batch takes. In the order of the terms: the model; θ at both ends of the step
and the one read ahead, converted once more where the dtypes differ; the gradients; the one at the end of the last step
on each further fixed loss data; two sums in float64 of a step that the adaptive rule refines; the update in float64
while the spread of a sample is taken; a coded step being read; and 40 MB of libraries' buffers, the coder's among them.
Nothing of it grows with the number of steps. A is the training's own, so the dry run leaves it out and says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from recorder.table import Parameter
from replay.quadrature import AdaptiveRule

if TYPE_CHECKING:
    from replay.lossdata import LossData
    from replay.precision import Precision
    from replay.quadrature import Rule


BUFFERS = 40_000_000
"""Bytes of libraries' buffers that come with the first step."""


def bytes_of_worker(
    trained: Sequence[Parameter],
    rule: Rule | AdaptiveRule,
    precision: Precision,
    loss_data: Sequence[LossData],
    rows: int,
) -> int:
    """Estimate what a worker takes beside its libraries and one pass over a micro-batch.

    Parameters
    ----------
    trained
        The parameters in the ledger.
    rule
        The quadrature rule.
    precision
        In which numbers loss and gradient are computed.
    loss_data
        On which the loss is measured.
    rows
        Bytes of a task's shards.

    Returns
    -------
    int
        Bytes; of one worker.
    """
    entries = sum(row.size for row in trained)
    recorded: int = sum(row.size * getattr(torch, row.dtype).itemsize for row in trained)
    computed = entries * precision.dtype.itemsize
    read = 3 * recorded + (3 * computed if recorded != computed else 0) + recorded
    fixed = sum(data.fixed for data in loss_data)
    gradients = (rule.least_evaluations + max(fixed - 1, 0)) * computed
    refined = 16 * entries if isinstance(rule, AdaptiveRule) else 0
    spread = 8 * entries if any(data.sampled for data in loss_data) else 0
    return computed + read + gradients + refined + spread + rows + BUFFERS
