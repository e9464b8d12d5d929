"""What torch.func would give replay on small nets: gradients at several points at once instead of one by one.

The same gradients of the same loss on the same batch, at parameter vectors near each other as the quadrature points of
some steps are: a forward and backward pass for each; or `torch.func.vmap` of `torch.func.grad` over parameters that
are stacked already. What copying them into the model or the stack would cost is left out of both.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, grad, vmap

Theta = Mapping[str, torch.Tensor]

DISTANCE = 1e-3
"""Standard deviation of the entries' differences between points."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Stacked:
    """What one number of points gave.

    Parameters
    ----------
    model
        Which.
    points
        How many.
    alone, stacked
        Seconds of one gradient, one by one and stacked: the least of all turns.
    ratios
        Stacked to one by one, of every turn.
    difference
        The largest difference between both ways' gradients, relative to the largest entry.
    """

    model: str
    points: int
    alone: float
    stacked: float
    ratios: tuple[float, ...]
    difference: float

    @property
    def ratio(self) -> float:
        """Median over the turns; below 1 stacking is faster."""
        return statistics.median(self.ratios)


class _Loss(nn.Module):
    """Model and loss as one module, for `functional_call` to see its parameters."""

    def __init__(self, workload: Any, batch: Any) -> None:
        super().__init__()
        self.model = workload.model().eval()
        self._workload, self._batch = workload, batch

    def forward(self) -> torch.Tensor:
        loss: torch.Tensor = self._workload.loss(self.model, self._batch)[0]
        return loss


def measure(model: str, workload: Any, *, examples: int, points: int, turns: int, order: random.Random) -> Stacked:
    """Measure one number of points.

    Parameters
    ----------
    model
        What the workload is called.
    workload
        As replay rebuilds it.
    examples
        Of the batch.
    points
        How many gradients.
    turns
        Of both ways, in an order drawn anew for each.
    order
        Draws it.

    Returns
    -------
    Stacked
        Of this number of points.
    """
    module = _Loss(workload, workload.batch(range(examples), split="train", epoch=1))
    parameters = dict(module.named_parameters())
    draw = torch.Generator().manual_seed(1)
    thetas = [
        {name: tensor.detach() + DISTANCE * torch.randn(tensor.shape, generator=draw) for name, tensor in point}
        for point in [parameters.items()] * points
    ]
    at_once = {name: torch.stack([theta[name] for theta in thetas]) for name in parameters}
    of_all = vmap(grad(lambda theta: functional_call(module, theta, ())))

    def alone() -> list[Theta]:
        found = []
        for theta in thetas:
            for name, parameter in parameters.items():
                # As it is, without a copy.
                parameter.data = theta[name]
                parameter.grad = None
            module().backward()
            found.append({name: parameter.grad for name, parameter in parameters.items()})
        return found  # type: ignore[return-value]

    def stacked() -> Theta:
        result: Theta = of_all(at_once)
        return result

    ways: dict[str, Callable[[], Any]] = {"alone": alone, "stacked": stacked}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    # Attention has no batching rule on a processor; torch tells of the loop that stands in for it.
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        difference = _difference(alone(), stacked())
        for _ in range(turns):
            for way in order.sample(sorted(ways), 2):
                began = time.perf_counter()
                ways[way]()
                seconds[way].append(time.perf_counter() - began)
    return Stacked(
        model=model,
        points=points,
        alone=min(seconds["alone"]) / points,
        stacked=min(seconds["stacked"]) / points,
        ratios=tuple(there / here for here, there in zip(seconds["alone"], seconds["stacked"], strict=True)),
        difference=difference,
    )


def _difference(alone: list[Theta], stacked: Theta) -> float:
    pairs = [(theta[name], stacked[name][place]) for place, theta in enumerate(alone) for name in theta]
    largest = max(float(one.abs().max()) for one, _ in pairs)
    return max(float((one - other).abs().max()) for one, other in pairs) / largest
