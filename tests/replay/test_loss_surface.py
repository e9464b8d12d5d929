"""Loss and gradient over micro-batches: sums and counts, dropout off, the run's own parameters."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from recorder.errors import FormatError
from replay.gradients import LossSurface
from replay.precision import PRECISIONS

CPU = torch.device("cpu")
ROWS, WIDTH = 12, 3


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 4).double(), nn.Linear(4, 1).double()
        self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(functional.dropout(torch.tanh(self.first(x)), 0.5, self.training))
        return out


@dataclasses.dataclass(frozen=True)
class _Regression:
    """Squared errors, summed over rows; a batch is a tensor of rows."""

    def model(self) -> nn.Module:
        return _Net()

    def indices(self, split: str) -> Sequence[int]:
        return range(ROWS)

    def batch(self, indices: Sequence[int], *, split: str, epoch: int) -> Any:
        return _rows()[list(indices)]

    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor | float]:
        return (model(batch)[:, 0] - batch.sum(dim=1)).square().sum(), len(batch)


def _rows() -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _values(*, seed: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        for name, parameter in _Net().named_parameters()
    }


TRAINED = ["first.weight", "second.weight", "second.bias", "unused"]
FIXED = ["first.bias"]
FLOAT64 = PRECISIONS["float64"]


def _surface(values: dict[str, torch.Tensor]) -> LossSurface:
    return LossSurface(_Regression(), TRAINED, {name: values[name] for name in FIXED}, CPU, FLOAT64)


def _by_hand(values: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in values.items()}
    x = _rows()
    hidden = torch.tanh(x @ leaves["first.weight"].T + leaves["first.bias"])
    predicted = hidden @ leaves["second.weight"][0] + leaves["second.bias"]
    loss = ((predicted - x.sum(dim=1)) ** 2).mean()
    names = ["first.weight", "second.weight", "second.bias"]
    gradients = torch.autograd.grad(loss, [leaves[name] for name in names])
    return float(loss.detach()), dict(zip(names, gradients, strict=True))


@settings(deadline=None, max_examples=30)
@given(cuts=st.sets(st.integers(1, ROWS - 1)))
def test_however_ragged_the_micro_batches_loss_and_gradient_are_those_of_the_mean_over_all_rows(cuts: set[int]) -> None:
    values = _values()
    edges = [0, *sorted(cuts), ROWS]
    micro_batches = [_rows()[start:stop] for start, stop in itertools.pairwise(edges)]
    surface, theta = _surface(values), {name: values[name] for name in TRAINED}
    evaluation = surface.evaluate(theta, micro_batches)
    loss, gradient = _by_hand(values)
    assert evaluation.loss == pytest.approx(loss, rel=1e-13)
    assert surface.loss(theta, micro_batches) == evaluation.loss
    # `unused` has no gradient and is left out; `first.bias` is not trained.
    assert evaluation.gradient.keys() == gradient.keys()
    for name, expected in gradient.items():
        torch.testing.assert_close(evaluation.gradient[name], expected, rtol=1e-12, atol=1e-13)


def test_dropout_is_off_and_evaluations_do_not_add_up() -> None:
    values = _values()
    surface, theta = _surface(values), {name: values[name] for name in TRAINED}
    first, second = (surface.evaluate(theta, [_rows()]) for _ in range(2))
    assert first.loss == second.loss
    assert all(torch.equal(first.gradient[name], second.gradient[name]) for name in first.gradient)
    assert first.gradient["second.bias"] is not second.gradient["second.bias"]


def test_the_parameters_given_are_those_the_loss_is_measured_at() -> None:
    values, others = _values(), _values(seed=3)
    surface = _surface(values)
    surface.evaluate({name: others[name] for name in TRAINED}, [_rows()])
    assert surface.evaluate({name: values[name] for name in TRAINED}, [_rows()]).loss == pytest.approx(
        _by_hand(values)[0], rel=1e-13
    )
    mixed = {**others, "first.bias": values["first.bias"]}
    assert surface.loss({name: others[name] for name in TRAINED}, [_rows()]) == pytest.approx(
        _by_hand(mixed)[0], rel=1e-13
    )


@pytest.mark.parametrize(("trained", "fixed"), [(["lost"], {}), ([], {"lost": torch.zeros(1)})])
def test_a_parameter_that_the_model_lacks_is_named(trained: list[str], fixed: dict[str, torch.Tensor]) -> None:
    message = (
        "the model that the workload builds lacks 1 parameters of the run, first 'lost'; "
        "was the model's code changed since the training?"
    )
    with pytest.raises(FormatError) as caught:
        LossSurface(_Regression(), trained, fixed, CPU, FLOAT64)
    assert str(caught.value) == message


def test_a_parameter_of_another_shape_is_named_with_both_shapes() -> None:
    message = "parameter 'first.bias' has shape (5,) in the run, but (4,) in the model that the workload builds"
    with pytest.raises(FormatError) as at_once:
        LossSurface(_Regression(), [], {"first.bias": torch.zeros(5)}, CPU, FLOAT64)
    assert str(at_once.value) == message
    surface = LossSurface(_Regression(), ["first.bias"], {}, CPU, FLOAT64)
    with pytest.raises(FormatError) as later:
        surface.evaluate({"first.bias": torch.zeros(5)}, [_rows()])
    assert str(later.value) == message
