"""In which numbers the loss is computed: asked for, fitting, and not lost on the way."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from recorder.errors import UsageError
from replay.precision import PRECISIONS, fitting, precision_named
from replay.shards import ShardFolder, Status
from tests import cases

CPU = torch.device("cpu")
Command = Callable[..., int]
Find = Callable[[Path, str], ShardFolder]


@pytest.mark.parametrize(
    ("recorded", "name"),
    [
        (["float32"], "float32"),
        (["bfloat16", "float16"], "float32"),
        (["float32", "float64"], "float64"),
        ([], "float32"),
    ],
)
def test_what_training_recorded_decides_where_the_user_does_not(recorded: list[str], name: str) -> None:
    assert fitting(recorded).name == name


@pytest.mark.parametrize("name", list(PRECISIONS))
def test_floating_point_tensors_are_converted_in_any_nest_and_whole_numbers_are_not(name: str) -> None:
    precision = precision_named(name)
    values = {"a": [torch.ones(2, dtype=torch.bfloat16), torch.arange(3)], "b": ("text", torch.ones(1).double())}
    found = precision.converted(values)
    assert found["a"][0].dtype == found["b"][1].dtype == precision.dtype
    assert found["a"][1].dtype == torch.int64
    assert found["b"][0] == "text"


def test_an_unknown_precision_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="unknown dtype 'half'; it is one of float32, float64, bfloat16"):
        precision_named("half")


def test_a_softmax_that_asks_for_float32_stays_in_float64() -> None:
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)
    with precision_named("float64").forward(CPU):
        found = [
            functional.log_softmax(x, dim=-1, dtype=torch.float32),
            torch.log_softmax(x, -1, dtype=torch.float32),
            functional.log_softmax(x.float(), dim=-1),
            x.log_softmax(-1, dtype=torch.float32),
        ]
        assert functional.softmax(x.half(), dim=-1, dtype=torch.float32).dtype == torch.float32
    expected = x - torch.logsumexp(x, 0)
    for result in found:
        torch.testing.assert_close(result, expected, rtol=1e-14, atol=0)
    assert functional.log_softmax(x, dim=-1, dtype=torch.float32).dtype == torch.float32


def test_under_bfloat16_the_forward_pass_is_mixed_and_the_parameters_are_not() -> None:
    precision = precision_named("bfloat16")
    weight = precision.converted(torch.ones(4, 4).double()).requires_grad_()
    with precision.forward(CPU):
        out = functional.linear(torch.ones(1, 4), weight)
    assert out.dtype == torch.bfloat16
    out.sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("rule", "lr", "expected", "code"),
    [("euler", 0.02, Status.TOLERANCE_NOT_MET, 3), ("simpson", 0.002, Status.CONVERGED, 0)],
)
def test_bfloat16_does_not_excuse_a_coarse_rule(
    tmp_path: Path, replay: Command, folder: Find, rule: str, lr: float, expected: Status, code: int
) -> None:
    cases.train(tmp_path, steps=8, make_optimizer=functools.partial(torch.optim.Adam, lr=lr))
    assert replay(tmp_path, "--dtype", "bfloat16", "--rule", rule) == code
    assert set(folder(tmp_path, "batch").read(0, 8).per_step["status"]) == {expected}
