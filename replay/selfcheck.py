"""Before the work: do a recorded update again, and see whether the record comes out.

In training mode, with the recorded state of the random generators, from the first recorded step until the parameters
have moved (the first update of a warm-up has learning rate 0). Within the recipe of the training the bits must agree;
in another recipe, where training computed in 16 bit, and where several processes shared an update, which one does again
here, the losses must agree to rounding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from recorder.errors import MismatchError
from recorder.manifest import CHORD
from recorder.recipe import current_recipe
from recorder.runformat import Run
from recorder.steps import Step
from recorder.workload import CollatesAtRandom, RepeatedUpdate, RepeatsUpdates, Workload
from replay.recordedbatch import verify_collation
from replay.repetition import repeat_updates, sixteen_bit_dtype, why_not_repeatable

LOSS_TOLERANCE = 1e-4
"""Relative; another number of threads moves a loss by up to 2e-5 (float32)."""

UPDATE_TOLERANCE = 0.1
"""Relative to the norm of the update, for a loop whose exact arithmetic is not known.

Adam turns the rounding noise of parameters whose true gradient is zero (a key's bias) into updates of full size; they
are a few percent of an update's norm. Another batch or another model changes nearly all of it.
"""

SIXTEEN_BIT_UPDATE_TOLERANCE = 0.2
"""The same for training in 16 bit. An update repeated with another loss scale or on other kernels came within 0.01
(gradient descent) and 0.09 (Adam) of its norm, the update of a similar batch no nearer than 0.29."""

UNSEEN_AUTOCAST = 0.02
"""Relative: so far from the record is at most a loss that was computed under bfloat16 and is done again without."""

MOST_STEPS = 3
_CAUSES = (
    "Likely causes: other data, changed code, another order of rows, or random numbers drawn elsewhere in the loop. "
    "Replay with the code and the data of the training (--workload, --data)"
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What the check did and found.

    Parameters
    ----------
    steps
        The recorded steps that were done again.
    exact
        Whether losses and parameters came out bit for bit.
    text
        One sentence for the user.
    """

    steps: tuple[int, ...]
    exact: bool
    text: str


def check_update(run: Run, workload: Workload, *, data: bool) -> Report:
    """Do the first recorded updates again and compare losses and parameters with the record.

    A `MismatchError` tells what differs, where, and by how much.

    Parameters
    ----------
    run
        The run.
    workload
        Rebuilds model, batches and loss.
    data
        Whether to compare also the first recorded batch with the one that the workload collates from its indices: done
        where the loss data is drawn from the training data.

    Returns
    -------
    Report
        What agreed, and how exactly.
    """
    if run.manifest.path == CHORD:
        text = "no update lies between two checkpoints by itself: none was done again"
        return Report(steps=(), exact=False, text=text)
    steps = _steps_to_repeat(run)
    first = steps[0]
    at_random = False
    if data and first.micro_batches[0].checksums:
        micro_batch = first.micro_batches[0]
        indices = micro_batch.indices.tolist()
        at_random = isinstance(workload, CollatesAtRandom) and workload.collates_at_random(indices, split="train")
        if not at_random:
            verify_collation(workload.batch(indices, split="train", epoch=first.epoch), first, micro_batch)
    recorded = run.manifest.recipe
    numbers = tuple(step.step for step in steps)
    if recorded["device"] == "cuda" and not torch.cuda.is_available():
        text = "the update was recorded on a GPU and there is none here: it was not repeated"
        return Report(steps=(), exact=False, text=text)
    device = torch.device(str(recorded["device"]))
    with _threads(int(recorded["threads"])):
        same_recipe = current_recipe(device) == {key: value for key, value in recorded.items() if key != "autocast"}
        repeats = isinstance(workload, RepeatsUpdates)
        sixteen_bit = sixteen_bit_dtype(run.manifest)
        exactly = same_recipe and repeats and sixteen_bit is None and _processes(run) == 1
        state = run.optimizer_state()
        theta = run.parameters(first.step)
        updates = (
            workload.repeat_updates({**run.untrained(), **theta}, state, steps)
            if isinstance(workload, RepeatsUpdates)
            else repeat_updates(run, workload, {**run.untrained(), **theta}, state, steps, device)
        )
        exact = True
        known_parameters = False
        # The optimizer's state is kept for the first recorded step alone.
        pruned = any(start < first.step for start, _ in run.pruned)
        for step, update in zip(steps, updates, strict=True):
            exact &= _compare_losses(run, step, update, sixteen_bit, exactly=exactly)
            if update.parameters and same_recipe and not pruned:
                known_parameters = True
                exact &= _compare_parameters(run, step, update, theta, _update_tolerance(sixteen_bit, exactly=exactly))
            theta = run.parameters(step.step + 1)
    known_losses = any(micro_batch.loss_sum is not None for step in steps for micro_batch in step.micro_batches)
    not_compared = []
    if at_random:
        not_compared.append("collated batch not compared: the workload collates at random")
    if not known_losses:
        not_compared.append("losses not compared: the training did not tell them, see Recording.loss")
    if not known_parameters:
        reason = "another recipe" if not same_recipe else why_not_repeatable(run.manifest)
        reason = "the steps before were pruned, and with them the optimizer's state" if pruned else reason
        not_compared.append(f"parameters not compared: {reason}")
    rounding = "" if sixteen_bit is None else f" of {str(sixteen_bit).removeprefix('torch.')}"
    how = ", bit for bit" if exact else f" within rounding{rounding}"
    text = _describe(numbers, known_losses, known_parameters, how, not_compared)
    return Report(steps=numbers, exact=exact and known_losses and known_parameters, text=text)


def _describe(
    numbers: Sequence[int], known_losses: bool, known_parameters: bool, how: str, not_compared: Sequence[str]
) -> str:
    again = f"{'step' if len(numbers) == 1 else 'steps'} {', '.join(map(str, numbers))} done again"
    compared = [word for word, known in (("losses", known_losses), ("parameters", known_parameters)) if known]
    outcome = f"{' and '.join(compared)} are the recorded ones{how}" if compared else "nothing was compared"
    return f"{again}: {outcome}" + (f" ({'; '.join(not_compared)})" if not_compared else "")


def _processes(run: Run) -> int:
    # Of the attempt that recorded the first step.
    number, _, _ = run.attempts[0]
    return next(attempt.processes for attempt in run.manifest.attempts if attempt.number == number)


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Compare two tensors entry by entry.

    Parameters
    ----------
    left, right
        The tensors.

    Returns
    -------
    bool
        Whether they are the same; NaN counts as NaN, for a training that diverged in its first steps holds it.
    """
    return torch.equal(left, right) or bool(((left == right) | (left.isnan() & right.isnan())).all())


def _steps_to_repeat(run: Run) -> list[Step]:
    steps = []
    first, stop = run.consecutive[0]
    for t in range(first, min(stop, first + MOST_STEPS)):
        steps.append(run.step(t))
        before, after = run.parameters(t), run.parameters(t + 1)
        if any(not same(before[name], after[name]) for name in after):
            break
    return steps


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _loss_tolerance(loss_sum: float, sixteen_bit: torch.dtype | None) -> float:
    # Relative. A loss that is itself a 16-bit number can round to the next one or the one after; float32 losses of
    # 16-bit logits differed by 1e-5, far less than a quarter of the logits' own rounding.
    if sixteen_bit is None:
        return LOSS_TOLERANCE
    rounded = float(torch.tensor(loss_sum, dtype=sixteen_bit)) == loss_sum
    return torch.finfo(sixteen_bit).eps * (2 if rounded else 0.25)


def _update_tolerance(sixteen_bit: torch.dtype | None, *, exactly: bool) -> float:
    if exactly:
        return 0.0
    return UPDATE_TOLERANCE if sixteen_bit is None else SIXTEEN_BIT_UPDATE_TOLERANCE


def _compare_losses(
    run: Run, step: Step, update: RepeatedUpdate, sixteen_bit: torch.dtype | None, *, exactly: bool
) -> bool:
    exact = True
    for position, (micro_batch, (loss_sum, predictions)) in enumerate(
        zip(step.micro_batches, update.losses, strict=True)
    ):
        if micro_batch.loss_sum is None or micro_batch.predictions is None:
            continue
        where = f"{run.path}: step {step.step}, micro-batch {position}"
        if predictions != micro_batch.predictions:
            message = (
                f"{where}: training counted {micro_batch.predictions:g} predictions, doing it again {predictions:g}. "
                f"{_CAUSES}"
            )
            raise MismatchError(message)
        if loss_sum == micro_batch.loss_sum or (math.isnan(loss_sum) and math.isnan(micro_batch.loss_sum)):
            continue
        difference = abs(loss_sum - micro_batch.loss_sum)
        relative = 0.0 if exactly else _loss_tolerance(micro_batch.loss_sum, sixteen_bit)
        tolerance = relative * abs(micro_batch.loss_sum)
        if not (math.isfinite(difference) and difference <= tolerance):
            message = (
                f"{where}: training recorded a loss of {micro_batch.loss_sum!r} nats over {predictions:g} predictions, "
                f"doing it again gives {loss_sum!r} (difference {difference:.3g}, allowed {tolerance:.3g}). {_CAUSES}"
            )
            if sixteen_bit is None and difference <= UNSEEN_AUTOCAST * abs(micro_batch.loss_sum):
                message += (
                    ". So small a difference may also be that of a torch.autocast that the recorder did not see: "
                    "announce each batch inside of it"
                )
            raise MismatchError(message)
        exact = False
    return exact


def _compare_parameters(
    run: Run, step: Step, update: RepeatedUpdate, before: Mapping[str, torch.Tensor], tolerance: float
) -> bool:
    recorded = run.parameters(step.step + 1)
    different = [name for name in recorded if not same(recorded[name], update.parameters[name])]
    if not different:
        return True
    errors = {name: (update.parameters[name].double() - recorded[name].double()).norm().item() for name in different}
    moved = math.sqrt(sum((recorded[name].double() - before[name].double()).norm().item() ** 2 for name in recorded))
    error = math.sqrt(sum(value**2 for value in errors.values()))
    relative = error / moved if moved else math.inf
    if not relative <= tolerance:  # NaN passes no comparison
        worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
        message = (
            f"{run.path}: step {step.step} done again gives other parameters: {len(different)} of {len(recorded)} "
            f"differ, by {relative:.3g} of the update's norm (allowed {tolerance:g}), most of all {worst!r}. {_CAUSES}"
        )
        if len(step.micro_batches) > 1:
            message += (
                ". With several micro-batches the training may also have weighed them otherwise than by their "
                "predictions, by which replay weighs them"
            )
        raise MismatchError(message)
    return False
