"""Synthetic folders of shards: their content depends on loss data, step and parameter, never on the chunking."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from replay import shards
from replay.settings import digest_of_table
from replay.shards import Parameter, Settings, Shard, ShardFolder


def _generator(*key: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def _units(quantity: str, loss_data: str, parameter: Parameter, step: int) -> Any:
    generator = _generator(quantity, loss_data, parameter.name, step)
    if quantity.endswith("_count"):
        per_unit = parameter.size // parameter.units if parameter.units else 0
        return generator.integers(0, per_unit, size=parameter.units, endpoint=True)
    values = generator.normal(size=parameter.units) * 10.0 ** generator.integers(-9, 2)
    return np.abs(values) if quantity == "positive_sum" else values


def _shard(loss_data: str, parameters: Sequence[Parameter], start: int, stop: int) -> Shard:
    steps = range(start, stop)
    draws = [_generator(loss_data, step).normal(size=3) for step in steps]
    per_step = {
        "step": np.array(steps),
        "epoch": np.array([1 + step // 5 for step in steps]),
        "lr": np.array([1e-3 / (1 + step) for step in steps]),
        "predictions": np.array([100 + step for step in steps]),
        "weight": np.full(len(steps), 50.0),
        "loss_start": np.array([draw[0] for draw in draws]),
        "loss_end": np.array([draw[1] for draw in draws]),
        "residual": np.array([1e-6 * draw[2] for draw in draws]),
        "tolerance": np.full(len(steps), 1e-6),
        "status": np.array([step % 2 for step in steps]),
        "evaluations": np.array([3 + step % 4 for step in steps]),
    }
    return Shard(
        per_step={name: per_step[name].astype(dtype) for name, dtype in shards.PER_STEP.items()},
        per_unit={
            quantity: {
                parameter.name: np.array(
                    [_units(quantity, loss_data, parameter, step) for step in steps], dtype=dtype
                ).reshape(len(steps), parameter.units)
                for parameter in parameters
                if parameter.trained
            }
            for quantity, dtype in shards.PER_UNIT.items()
        },
        per_parameter={
            quantity: {
                parameter.name: _generator(quantity, loss_data, parameter.name, start)
                .normal(size=len(steps))
                .astype(dtype)
                for parameter in parameters
                if parameter.trained
            }
            for quantity, dtype in shards.PER_PARAMETER.items()
        },
    )


def _build(
    run: Path,
    parameters: Sequence[Parameter],
    ranges: Sequence[tuple[int, int]],
    *,
    loss_data: str = "batch",
    rule: str = "adaptive",
    rtol: float = 1e-3,
    path: str = "recorded",
    run_id: str = "run-1",
    change: Callable[[Shard], Shard] = lambda shard: shard,
) -> ShardFolder:
    settings = Settings(
        run_id=run_id,
        parameter_table=digest_of_table(parameters),
        path=path,
        loss_data=loss_data,
        loss_data_settings={"examples": 8},
        rule=rule,
        rtol=rtol,
        atol=1e-6,
        dropout="off",
        chunk=8,
        recipe={"device": "cpu"},
    )
    run.mkdir(parents=True, exist_ok=True)
    folder = ShardFolder.create(run, settings, parameters, {"host": "somewhere", "fp16": None})
    for start, stop in ranges:
        folder.write(start, stop, change(_shard(loss_data, parameters, start, stop)))
    return folder


@pytest.fixture(scope="session")
def build() -> Callable[..., ShardFolder]:
    return _build


@pytest.fixture(scope="session")
def parameters() -> list[Parameter]:
    """A small encoder-decoder: a bias, a cell of two weights, a frozen weight, layers out of order."""

    def row(name: str, layer: str, component: str, *shape: int, **rest: Any) -> Parameter:
        stack, _, depth = layer.partition(".")
        place: dict[str, Any] = {"layer": layer, "stack": stack, "depth": int(depth or -1)}
        return Parameter(name=name, dtype="float32", component=component, shape=shape, **place, **rest)

    return [
        row("embed", "model", "embedding", 11, 4, aliases=("output",)),
        row("d0.key", "decoder.0", "key", 6, 4, heads=2),
        row("d0.key.bias", "decoder.0", "key", 6, heads=2),
        row("d0.key.extra", "decoder.0", "key", 4, 3, heads=2),
        row("d0.out", "decoder.0", "out", 4, 6, heads=2, unit_axis=1),
        row("d0.cross_out", "decoder.0", "cross_out", 4, 6, unit_axis=1),
        row("e10.W1", "encoder.10", "W1", 5, 4),
        row("e2.query", "encoder.2", "query", 9, 4, heads=3),
        row("e2.value", "encoder.2", "value", 9, 4, heads=3, status="untrained"),
        row("e2.norm", "encoder.2", "norm", 4),
        row("scale", "model", "other"),
    ]
