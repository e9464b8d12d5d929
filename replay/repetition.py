"""A recorded update of a plain training loop, done again: forward, backward, and the optimizer's step.

In training mode and in the dtype that training computed in, from the recorded state of the random generators. What
only the loop knows of the gradient (clipping, another normalisation than the mean) comes from its recorded norm.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from recorder.batches import to_device
from recorder.workload import RepeatedUpdate, WeighsMicroBatches
from replay.gradients import set_parameters
from replay.precision import SIXTEEN_BIT
from replay.recordedbatch import recorded_or_collated

if TYPE_CHECKING:
    from torch import nn

    from recorder.manifest import Manifest
    from recorder.runformat import Run
    from recorder.steps import Step
    from recorder.workload import Workload

LARGEST_LOSS_SCALE = 2.0**16
"""For float16, whose small gradients would be zero; halved until no gradient overflows."""


def sixteen_bit_dtype(manifest: Manifest) -> torch.dtype | None:
    """Find the 16-bit dtype that a training computed in, whatever the optimizer then updated.

    Parameters
    ----------
    manifest
        The run's manifest.

    Returns
    -------
    torch.dtype or None
        That of the trained parameters in the model, or of torch's autocast; the coarser one of several. None where
        training computed in float32 or float64.
    """
    names = {parameter.computed_dtype for parameter in manifest.trained} | {manifest.recipe.get("autocast")}
    found = {getattr(torch, name) for name in names if name is not None} & SIXTEEN_BIT
    return max(found, key=lambda dtype: torch.finfo(dtype).eps, default=None)


def why_not_repeatable(manifest: Manifest) -> str | None:
    """Tell why the parameters after a repeated update would say nothing.

    Parameters
    ----------
    manifest
        The run's manifest.

    Returns
    -------
    str or None
        The reason; None where they can be compared with the recorded ones.
    """
    facts = manifest.optimizer
    # Only torch's own optimizers: a class elsewhere would be code that the run names.
    if not facts.name.startswith("torch.optim."):
        return f"{facts.name} is no optimizer of torch's"
    if facts.name.endswith(".LBFGS"):
        return "LBFGS measures loss and gradient several times in an update, at parameters that no step records"
    stateless = all(group.get("momentum") == 0 for group in facts.groups)
    if not stateless and any(parameter.dtype == "float16" for parameter in manifest.trained):
        return "the optimizer kept its state in float16, where squared gradients vanish and rounding decides the update"
    return None


def repeat_updates(
    run: Run,
    workload: Workload,
    theta: Mapping[str, torch.Tensor],
    state: Mapping[str, Any] | None,
    steps: Sequence[Step],
    device: torch.device,
) -> Iterator[RepeatedUpdate]:
    """Redo consecutive updates of a loop whose exact arithmetic is not known.

    Parameters
    ----------
    run
        The run.
    workload
        Rebuilds model, batches and loss.
    theta
        All recorded tensors before the first update.
    state
        The optimizer's state then; None if it had none.
    steps
        The recorded steps.
    device
        Where to compute.

    Yields
    ------
    RepeatedUpdate
        Losses of each update, and its parameters; none of them where `why_not_repeatable` has a reason.
    """
    model = workload.model().to(device)
    _compute_as_in_training(model, run.manifest)
    model.train()
    named = dict(model.named_parameters())
    set_parameters({name: named[name] for name in theta}, theta)
    holders, recorded = _what_the_optimizer_updates(run.manifest, named, theta, device)
    optimizer = _rebuild_optimizer(run.manifest, holders, state)
    for step in steps:
        has_gradient = run.with_gradient(step.step)
        for name in (row.name for row in run.manifest.parameters if row.status != "not_recorded"):
            # What had no gradient yet does not count in the norm, and the optimizer leaves it alone.
            named[name].requires_grad_(name in has_gradient)
        losses = _accumulate_gradients(run.manifest, workload, model, step, device)
        parameters: dict[str, torch.Tensor] = {}
        if optimizer is not None:
            for holder in (holder for group in holders for holder in group):
                holder.take_gradient(named)
            held = {name for group in holders for holder in group for name in holder.names}
            tensors = [holder.tensor for group in holders for holder in group]
            tensors += [tensor for name, tensor in named.items() if name not in held]
            _scale_gradient(tensors, step, sum(predictions for _, predictions in losses))
            for group, learning_rate in zip(optimizer.param_groups, step.learning_rates, strict=True):
                group["lr"] = learning_rate
            optimizer.step()
            set_parameters({name: named[name] for name in recorded}, recorded)
            parameters = {
                name: recorded.get(name, tensor).detach().to("cpu", copy=True) for name, tensor in named.items()
            }
        yield RepeatedUpdate(losses=tuple(losses), parameters=parameters)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Holder:
    """A tensor of the optimizer, and the parameters that it updates: itself, or those whose master it is."""

    tensor: torch.Tensor
    names: tuple[str, ...]
    is_master: bool

    def take_gradient(self, named: Mapping[str, torch.Tensor]) -> None:
        gradients = [named[name].grad for name in self.names]
        if not self.is_master or all(gradient is None for gradient in gradients):
            return
        entries = [
            torch.zeros_like(named[name]) if gradient is None else gradient
            for name, gradient in zip(self.names, gradients, strict=True)
        ]
        whole = torch.cat([entry.reshape(-1) for entry in entries])
        self.tensor.grad = whole.to(self.tensor.dtype).view(self.tensor.shape)


def _what_the_optimizer_updates(
    manifest: Manifest, named: Mapping[str, torch.Tensor], theta: Mapping[str, torch.Tensor], device: torch.device
) -> tuple[list[list[_Holder]], dict[str, torch.Tensor]]:
    # For every group its tensors; and by name those recorded tensors that are not the model's own.
    with_master = {row.name for row in manifest.parameters if row.model_dtype is not None}
    groups: list[list[_Holder]] = []
    recorded: dict[str, torch.Tensor] = {}
    for facts in manifest.optimizer.groups:
        names = iter(facts["parameters"])
        group = []
        for count in facts.get("names_per_tensor", [1] * len(facts["parameters"])):
            of_tensor = tuple(next(names) for _ in range(count))
            if count == 1 and of_tensor[0] not in with_master:
                group.append(_Holder(tensor=named[of_tensor[0]], names=of_tensor, is_master=False))
                continue
            shape = theta[of_tensor[0]].shape if count == 1 else (-1,)
            master = torch.cat([theta[name].to(device).reshape(-1) for name in of_tensor]).view(shape)
            parts = torch.split(master.view(-1), [theta[name].numel() for name in of_tensor])
            recorded |= {name: part.view(theta[name].shape) for name, part in zip(of_tensor, parts, strict=True)}
            group.append(_Holder(tensor=master, names=of_tensor, is_master=True))
        groups.append(group)
    return groups, recorded


def _compute_as_in_training(model: nn.Module, manifest: Manifest) -> None:
    rows: dict[str, torch.dtype] = {row.name: getattr(torch, row.computed_dtype) for row in manifest.parameters}
    dtypes = set(rows.values())
    if not dtypes & SIXTEEN_BIT:
        return
    if len(dtypes) == 1:
        model.to(dtype=dtypes.pop())  # with its buffers
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(rows.get(name, parameter.dtype))


def _accumulate_gradients(
    manifest: Manifest, workload: Workload, model: nn.Module, step: Step, device: torch.device
) -> list[tuple[float, float]]:
    scale = LARGEST_LOSS_SCALE if sixteen_bit_dtype(manifest) is torch.float16 else 1.0
    weighing = workload if isinstance(workload, WeighsMicroBatches) and len(step.micro_batches) > 1 else None
    while True:
        for parameter in model.parameters():
            parameter.grad = None
        losses = []
        for micro_batch in step.micro_batches:
            batch = to_device(recorded_or_collated(workload, step, micro_batch), device)
            weight = scale * (1 if weighing is None else weighing.weight(model, batch))
            micro_batch.set_random_state(device)
            with _autocast(manifest, device):
                loss_sum, predictions = workload.loss(model, batch)
            (loss_sum if weight == 1 else loss_sum * weight).backward()  # type: ignore[no-untyped-call]
            losses.append((float(loss_sum.detach()), float(predictions)))
        if scale == 1 or all(
            bool(parameter.grad.isfinite().all()) for parameter in model.parameters() if parameter.grad is not None
        ):
            return losses
        scale /= 2


def _autocast(manifest: Manifest, device: torch.device) -> AbstractContextManager[Any]:
    dtype = manifest.recipe.get("autocast")
    return nullcontext() if dtype is None else torch.autocast(device.type, getattr(torch, dtype))


def _scale_gradient(tensors: Sequence[torch.Tensor], step: Step, predictions: float) -> None:
    gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
    wide = [gradient.float() if gradient.dtype in SIXTEEN_BIT else gradient for gradient in gradients]
    norm = float(torch.nn.utils.get_total_norm(wide))
    scale = 1 / predictions if step.gradient_norm is None or norm == 0 else step.gradient_norm / norm
    for gradient in gradients:
        gradient.mul_(scale)


def _rebuild_optimizer(
    manifest: Manifest, holders: Sequence[Sequence[_Holder]], state: Mapping[str, Any] | None
) -> torch.optim.Optimizer | None:
    if why_not_repeatable(manifest) is not None:
        return None
    facts = manifest.optimizer
    package, _, kind = facts.name.rpartition(".")
    groups = [
        {key: value for key, value in group.items() if key not in {"parameters", "names_per_tensor"}}
        | {"params": [holder.tensor for holder in of_group]}
        for group, of_group in zip(facts.groups, holders, strict=True)
    ]
    optimizer: torch.optim.Optimizer = getattr(importlib.import_module(package), kind)(groups)
    if state is not None:
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return optimizer
