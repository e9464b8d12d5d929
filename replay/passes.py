"""Before the work: what the chosen recipe computes must be a function of parameters and examples, and of them alone.

The model has the parameters of the run's table and no others; two passes over one step agree bit for bit; and with
dropout as recorded, the loss at the start of a step is the one that the training measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from recorder.errors import MismatchError
from recorder.manifest import CHORD
from replay.dropout import RECORDED
from replay.repetition import sixteen_bit_dtype
from replay.selfcheck import LOSS_TOLERANCE, same

if TYPE_CHECKING:
    from recorder.runformat import Run
    from replay.evaluation import Evaluation
    from replay.precision import Precision
    from replay.work import Replayer

_CAUSES_OFF = (
    "a model that draws random numbers in evaluation mode (let it draw only where self.training is true); state that "
    "the model or the workload keeps from one pass to the next (let the loss depend on parameters, buffers and batch "
    "alone)"
)
_CAUSES_RECORDED = (
    "random numbers of numpy or of Python, whose states are not recorded (draw with torch, or pass --dropout off); "
    "state that the workload keeps from one pass to the next (let the loss depend on parameters, buffers and batch "
    "alone)"
)
_CAUSES_KERNELS = (
    "kernels that add up in another order each time (set CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment and let "
    "the workload's module call torch.use_deterministic_algorithms(True), which names them)"
)


def check_table(run: Run, shapes: Mapping[str, Sequence[int]]) -> None:
    """Make sure that every parameter of the model is in the run's table.

    Those of the table that the model lacks are refused where the model is built (`replay.gradients.LossSurface`).

    Parameters
    ----------
    run
        The run.
    shapes
        Name to shape of every parameter of the model that the workload builds.

    Raises
    ------
    MismatchError
        If the model has others: no record tells their values.
    """
    table = run.manifest.parameters
    others = [name for name in shapes if name not in {row.name for row in table}]
    if not others:
        return
    first = others[0]
    tied = "".join(
        f"; in the training it was the same tensor as {row.name!r}, and here it is not"
        for row in table
        if first in row.aliases
    )
    message = (
        f"{run.path}: self-check, parameter table: the model that the workload builds has {len(others)} parameters "
        f"that are not among the {len(table)} of the run's table, first {first!r} of shape {tuple(shapes[first])}"
        f"{tied}. "
        "No record tells their values. Likely causes: the model's code, its arguments or a library's version changed "
        "since the training; let the workload build the model that was trained"
    )
    raise MismatchError(message)


def check_recipe(opened: Replayer, names: Collection[str]) -> list[str]:
    """Compute the first step twice on every loss data, and compare its dropout with the training's.

    A `MismatchError` tells what differs.

    Parameters
    ----------
    opened
        The run, opened for replay.
    names
        The loss data that there is work on.

    Returns
    -------
    list of str
        What agreed, in sentences for the user; none where there is no work.
    """
    wanted = [part for name in opened.loss_data if name in names for part in opened.measuring.evaluated(name)]
    compared = []
    for name in dict.fromkeys(wanted):
        recorded = opened.measuring.dropout_of(name) == RECORDED
        evaluation = check_two_passes(opened.run, name, opened.evaluate, recorded=recorded)
        if recorded:
            compared.append(check_recorded_loss(opened.run, evaluation, opened.precision))
    if not wanted:
        return []
    on = ", ".join(dict.fromkeys(wanted))
    return [f"two passes over {_place(opened.run)} on {on} agree bit for bit", *compared]


def check_two_passes(
    run: Run, name: str, evaluate: Callable[[int, str], Evaluation], *, recorded: bool = False
) -> Evaluation:
    """Compute loss and gradient twice at the start of the first recorded step, and compare them bit for bit.

    Parameters
    ----------
    run
        The run.
    name
        The loss data.
    evaluate
        Loss and gradient at the start of a step, on a loss data.
    recorded
        Whether it is measured with dropout as recorded.

    Returns
    -------
    Evaluation
        Loss and gradient.

    Raises
    ------
    MismatchError
        If they differ: by how much, and for which parameter most.
    """
    t = run.steps[0]
    first, second = evaluate(t, name), evaluate(t, name)
    pairs = {
        parameter: (_of(first, parameter, second), _of(second, parameter, first))
        for parameter in dict.fromkeys((*first.gradient, *second.gradient))
    }
    different = [parameter for parameter, (left, right) in pairs.items() if not same(left, right)]
    same_loss = first.loss == second.loss or (math.isnan(first.loss) and math.isnan(second.loss))
    if same_loss and not different:
        return first
    of_gradient = ""
    if different:
        errors = {parameter: _norm(pairs[parameter][1].double() - pairs[parameter][0]) for parameter in different}
        whole = math.hypot(*(_norm(left) for left, _ in pairs.values()))
        relative = math.hypot(*errors.values()) / whole if whole else math.inf
        worst = max(errors, key=lambda parameter: math.inf if math.isnan(errors[parameter]) else errors[parameter])
        of_gradient = (
            f", the gradients of {len(different)} of {len(pairs)} parameters by {relative:.3g} of the gradient's norm, "
            f"most of all that of {worst!r}"
        )
    message = (
        f"{run.path}: self-check, two passes: computed twice, the loss on {name} at the start of {_place(run)} is "
        f"{first.loss!r} and {second.loss!r} nats, and the same was expected; they differ by "
        f"{abs(second.loss - first.loss):.3g}{of_gradient}. A rerun would give other shards. Likely causes: "
        f"{_CAUSES_RECORDED if recorded else _CAUSES_OFF}; {_CAUSES_KERNELS}"
    )
    raise MismatchError(message)


def _of(evaluation: Evaluation, parameter: str, other: Evaluation) -> torch.Tensor:
    gradient = evaluation.gradient.get(parameter)
    return torch.zeros_like(other.gradient[parameter]) if gradient is None else gradient


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.double()))


def check_recorded_loss(run: Run, evaluation: Evaluation, precision: Precision) -> str:
    """Compare the loss at the start of the first step, with dropout as recorded, with what the training measured.

    Parameters
    ----------
    run
        The run.
    evaluation
        On the recorded batch.
    precision
        In which numbers it was computed.

    Returns
    -------
    str
        One sentence for the user.

    Raises
    ------
    MismatchError
        If they differ by more than rounding: then dropout drew something else than in the training.
    """
    step = run.step(run.steps[0])
    sums = [micro_batch.loss_sum for micro_batch in step.micro_batches]
    if None in sums or math.isnan(step.predictions):
        return "dropout not compared with the training's: it did not tell its losses, see Recording.loss"
    measured = sum(loss_sum for loss_sum in sums if loss_sum is not None) / step.predictions
    difference = abs(evaluation.loss - measured)
    coarsest = precision.autocast or sixteen_bit_dtype(run.manifest)
    # Other numbers than those of a training in 16 bit: every activation rounds differently, not the loss alone.
    relative = LOSS_TOLERANCE if coarsest is None else 2 * torch.finfo(coarsest).eps
    allowed = relative * abs(measured)
    both_nan = math.isnan(evaluation.loss) and math.isnan(measured)
    if not (both_nan or evaluation.loss == measured or difference <= allowed):
        message = (
            f"{run.path}: self-check, dropout as recorded: the training measured a loss of {measured!r} nats at the "
            f"start of step {step.step}, and replay finds {evaluation.loss!r} (difference {difference:.3g}, allowed "
            f"{allowed:.3g}). Likely causes: another version of torch or another dtype than the training's, which may "
            "draw otherwise from the same state; parts of the model that training kept in evaluation mode; code that "
            "changed. Replay in the training's recipe, or pass --dropout off"
        )
        raise MismatchError(message)
    rounding = "" if coarsest is None else f" of {str(coarsest).removeprefix('torch.')}"
    how = "bit for bit" if evaluation.loss == measured else f"within rounding{rounding}"
    return f"with dropout as recorded the loss of step {step.step} is the training's {how}"


def _place(run: Run) -> str:
    t = run.steps[0]
    return f"the checkpoint after {run.updates(t)[0]} updates" if run.manifest.path == CHORD else f"step {t}"
