from __future__ import annotations

import copy
import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import recorder
from recorder import tensorfile
from recorder.runformat import Run
from tests.reliability.conftest import Promise
from tests.reliability.counts import ALL_CONFIGURATIONS
from tests.reliability.trainings import OPTIMIZERS

pytestmark = pytest.mark.filterwarnings("ignore::recorder.parameters.UnmappedParameterWarning")

_HABITS = ("accumulation", "dropout", "autocast", "batch norm")
_STEPS = 6

_EVERY_COMBINATION = [
    tuple(itertools.compress(_HABITS, chosen)) for chosen in itertools.product([False, True], repeat=len(_HABITS))
]
_COMBINATIONS = (
    _EVERY_COMBINATION if ALL_CONFIGURATIONS else [(), ("batch norm",), ("accumulation", "dropout"), _HABITS]
)


@pytest.mark.parametrize("habits", _COMBINATIONS, ids=lambda habits: "+".join(habits) or "plain")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_training_leaves_the_same_bits_with_and_without_the_recorder(
    tmp_path: Path, promise: Promise, optimizer: str, habits: tuple[str, ...]
) -> None:
    with promise("R6") as tally, tally.case(f"{optimizer} {habits}"):
        recorded = _train(optimizer, habits, tmp_path / "run")
        unrecorded = _train(optimizer, habits, None)
        _assert_same(recorded, unrecorded)
        assert Run(tmp_path / "run").steps == list(range(_STEPS))
        assert all(bool(tensor.isfinite().all()) for tensor in recorded["model"].values())  # it was a training


def _train(optimizer: str, habits: tuple[str, ...], run: Path | None) -> dict[str, Any]:
    torch.manual_seed(1)
    np.random.seed(2)  # noqa: NPY002 (the global generator is what could be disturbed)
    random.seed(3)
    model = nn.Sequential(
        nn.Linear(6, 16),
        nn.BatchNorm1d(16) if "batch norm" in habits else nn.LayerNorm(16),
        nn.GELU(),
        nn.Dropout(0.3 if "dropout" in habits else 0.0),
        nn.Linear(16, 3),
    )
    made = OPTIMIZERS[optimizer](model.parameters())
    rec = None if run is None else recorder.watch(model, made, run=run, segment_steps=2)
    gradients: list[torch.Tensor | None] = []
    for step in range(_STEPS):
        for _ in range(3 if "accumulation" in habits and step != _STEPS - 1 else 1):
            examples = torch.randn(5, 6) + random.random() + np.random.rand()  # noqa: NPY002
            if rec is not None:
                rec.batch([step], {"x": examples})
            with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in habits):
                loss = model(examples).square().mean()
            if rec is not None:
                rec.loss(loss, 5)
            loss.backward()
        made.step()
        gradients += [None if tensor.grad is None else tensor.grad.clone() for tensor in model.parameters()]
        made.zero_grad()
        if rec is not None and step % 2:
            rec.flush()
    if rec is not None:
        rec.close()
    return {
        "model": copy.deepcopy(model.state_dict()),
        "optimizer": copy.deepcopy(made.state_dict()),
        "gradients": gradients,
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),  # noqa: NPY002
        "python": random.getstate(),
    }


def _assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert tensorfile.content(found) == tensorfile.content(expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        _assert_same(list(found.values()), list(expected.values()))
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            _assert_same(one, other)
    elif isinstance(expected, np.ndarray):
        np.testing.assert_array_equal(found, expected)
    else:
        assert found == expected
