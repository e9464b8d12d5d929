"""An optimizer in plain facts: class, hyperparameters, which parameters each group updates."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from recorder.manifest import OptimizerFacts

if TYPE_CHECKING:
    from torch.optim import Optimizer


def describe_optimizer(optimizer: Optimizer, names: Iterable[tuple[str, ...]], *, fresh: bool) -> OptimizerFacts:
    """Describe an optimizer.

    Parameters
    ----------
    optimizer
        The optimizer.
    names
        For every tensor that it updates, through all groups, the parameters behind it.
    fresh
        Whether it has no state yet.

    Returns
    -------
    OptimizerFacts
        Class, hyperparameters and parameter names of each group. Where a tensor holds several parameters, also how
        many names belong to each tensor, as ``names_per_tensor``.
    """
    groups = []
    of_tensors = iter(names)
    for group in optimizer.param_groups:
        facts = {
            key: _hyperparameter(value)
            for key, value in group.items()
            if isinstance(value, bool | int | float | str | tuple | None)
        }
        of_group = [next(of_tensors) for _ in group["params"]]
        facts["parameters"] = [name for entry in of_group for name in entry]
        if any(len(entry) > 1 for entry in of_group):
            facts["names_per_tensor"] = [len(entry) for entry in of_group]
        groups.append(facts)
    kind = type(optimizer)
    return OptimizerFacts(name=f"{kind.__module__}.{kind.__qualname__}", groups=tuple(groups), fresh=fresh)


def _hyperparameter(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_hyperparameter(entry) for entry in value]
    if isinstance(value, torch.Tensor) or (isinstance(value, float) and not math.isfinite(value)):
        value = float(value)
        return value if math.isfinite(value) else repr(value)  # JSON has no NaN and no infinity
    return value
