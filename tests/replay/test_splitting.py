"""Micro-batches that do not fit into memory are cut in two until they do; the result is the same within rounding."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from recorder.errors import LossledgerError, MismatchError
from replay.evaluation import Evaluation
from replay.gradients import LossSurface
from replay.precision import PRECISIONS
from replay.products import Projection
from replay.shards import ShardFolder
from replay.splitting import DoesNotFitError, halve, is_out_of_memory
from tests.replay import variants

ROWS, WIDTH = 12, 3


def _full() -> Exception:
    return MemoryError("full")


@dataclasses.dataclass
class _Regression:
    """Squared errors, summed over rows, in a memory that holds but so many rows at a time."""

    most: int = ROWS
    with_gradient_only: bool = True
    fails_with: Callable[[], Exception] = _full
    counts_by: str = "rows"
    asked: list[int] = dataclasses.field(default_factory=list)

    def model(self) -> nn.Module:
        return nn.Linear(WIDTH, 1).double()

    def indices(self, split: str) -> Sequence[int]:
        return range(ROWS)

    def batch(self, indices: Sequence[int], *, split: str, epoch: int) -> Any:
        raise AssertionError

    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor | float]:
        rows = batch["rows"]
        self.asked.append(len(rows))
        loss = (model(rows)[:, 0] - rows.sum(dim=1)).square().sum()
        if len(rows) > self.most and (torch.is_grad_enabled() or not self.with_gradient_only):
            # As where the memory is full in the middle of a backward pass: some gradients are there already.
            if torch.is_grad_enabled():
                loss.backward()
            raise self.fails_with()
        return loss, len(rows) if self.counts_by == "rows" else batch["number"]


def _batches(*sizes: int) -> list[dict[str, Any]]:
    rows = torch.randn(sum(sizes), WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return [{"rows": part, "number": len(part)} for part in torch.split(rows, list(sizes))]


THETA = {"weight": torch.ones(1, WIDTH, dtype=torch.float64) / 3, "bias": torch.ones(1, dtype=torch.float64)}


def _surface(workload: _Regression) -> LossSurface:
    return LossSurface(workload, list(THETA), {}, torch.device("cpu"), PRECISIONS["float64"])


def _same(found: Evaluation, expected: Evaluation) -> None:
    assert found.loss == pytest.approx(expected.loss, rel=1e-13)
    assert found.counts == expected.counts
    for name, gradient in expected.gradient.items():
        torch.testing.assert_close(found.gradient[name], gradient, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError,
        torch.OutOfMemoryError,
        lambda: RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ],
)
@pytest.mark.parametrize("most", [1, 2, 5, 7])
def test_what_does_not_fit_is_halved_until_it_does_and_the_result_stays(
    most: int, error: Callable[[], Exception]
) -> None:
    batches = _batches(7, 1, 4)
    expected = _surface(_Regression()).evaluate(THETA, batches, Projection(THETA))
    workload = _Regression(most=most, fails_with=error)
    found = _surface(workload).evaluate(THETA, batches, Projection(THETA))
    _same(found, expected)
    assert (found.pieces > 1, expected.pieces) == (most < 7, 1)
    assert found.along is not None
    assert expected.along is not None
    for name, values in expected.along.items():
        torch.testing.assert_close(found.along[name], values, rtol=1e-12, atol=1e-13)


def test_the_loss_alone_is_cut_too() -> None:
    batches = _batches(7, 5)
    workload = _Regression(most=3, with_gradient_only=False)
    assert _surface(workload).loss(THETA, batches) == pytest.approx(_surface(_Regression()).loss(THETA, batches))


def test_the_pieces_of_a_steps_batches_are_found_once_and_do_not_decide_the_next_steps_bits() -> None:
    workload = _Regression(most=3)
    surface = _surface(workload)
    batches = _batches(8)
    surface.evaluate(THETA, batches)
    workload.asked.clear()
    surface.evaluate(dict(THETA), batches)
    assert workload.asked == [2, 2, 2, 2]
    workload.asked.clear()
    surface.evaluate(dict(THETA), _batches(8))
    assert workload.asked[0] == 8


def test_a_single_example_that_does_not_fit_is_told() -> None:
    with pytest.raises(
        DoesNotFitError, match="a single example does not fit into memory; use a device with more of it"
    ):
        _surface(_Regression(most=0)).evaluate(THETA, _batches(3))


def test_a_batch_whose_halves_do_not_add_up_to_it_is_refused_before_it_could_be_wrong() -> None:
    workload = _Regression(most=4, counts_by="number")
    with pytest.raises(MismatchError) as caught:
        _surface(workload).evaluate(THETA, _batches(8))
    text = str(caught.value)
    assert "its halves do not add up to it: expected a loss of" in text
    assert "over 8 predictions, found" in text
    assert text.endswith(
        "over 16; give the workload a method `halve(batch)` that returns two batches of half the examples each, or "
        "replay on other --loss-data, or train with smaller micro-batches"
    )


def test_a_workload_may_cut_its_batches_itself() -> None:
    class Halving(_Regression):
        def halve(self, batch: Any) -> tuple[Any, Any]:
            parts = batch["rows"].tensor_split(2)
            return tuple({"rows": part, "number": len(part)} for part in parts)  # type: ignore[return-value]

    workload = Halving(most=2, counts_by="number")
    _same(_surface(workload).evaluate(THETA, _batches(9)), _surface(_Regression()).evaluate(THETA, _batches(9)))


def test_tensors_without_a_common_number_of_examples_are_named() -> None:
    batch = {"source": torch.zeros(5, 2), "targets": [torch.zeros(7, 2)]}
    with pytest.raises(DoesNotFitError) as caught:
        halve(batch)
    assert "batch.source has 5, batch.targets.0 has 7; give the workload" in str(caught.value)
    with pytest.raises(DoesNotFitError, match="it has no tensors"):
        halve({"tokens": 3, "scale": torch.tensor(2.0)})


@pytest.mark.parametrize("examples", [2, 3, 8])
def test_the_halves_hold_every_example_once_and_all_else_twice(examples: int) -> None:
    batch: dict[str, Any] = {
        "a": torch.arange(examples),
        "b": [(torch.arange(2 * examples).view(examples, 2), "text", 4)],
        "c": None,
    }
    halves = halve({**batch, "scale": torch.tensor(2.0)})
    assert torch.equal(torch.cat([half["a"] for half in halves]), batch["a"])
    assert all(half["b"][0][1:] == ("text", 4) and half["c"] is None and half["scale"] == 2 for half in halves)
    assert len(halves[0]["a"]) - len(halves[1]["a"]) in (0, 1)
    assert all(len(half["a"]) == len(half["b"][0][0]) for half in halves)


@pytest.mark.parametrize("error", [RuntimeError("shapes"), ValueError(), LossledgerError("x"), KeyboardInterrupt()])
def test_other_errors_are_not_taken_for_a_full_memory(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_an_error_of_another_kind_goes_through() -> None:
    workload = _Regression(most=2, fails_with=lambda: RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        _surface(workload).evaluate(THETA, _batches(3))


def test_the_sizes_tried_are_halves_of_halves() -> None:
    workload = _Regression(most=3)
    _surface(workload).evaluate(THETA, _batches(12))
    grown = [size for size, _ in itertools.groupby(workload.asked)]
    assert grown[0] == 12
    assert workload.asked[-4:] == [3, 3, 3, 3]


def test_with_the_trainings_dropout_a_micro_batch_is_not_cut() -> None:
    surface = _surface(_Regression(most=3))
    with pytest.raises(DoesNotFitError) as caught:
        surface.evaluate(THETA, _batches(8), states=[{"rng_cpu": torch.get_rng_state()}])
    assert str(caught.value) == (
        "a micro-batch does not fit into memory, and with --dropout recorded it cannot be cut in two; use a device "
        "with more of it, fewer --workers, or --dropout off"
    )


def test_the_shard_tells_which_steps_were_computed_in_pieces_and_the_settings_do_not(
    run: Path, replay: Callable[..., int], folder: Callable[[Path, str], ShardFolder]
) -> None:
    both = {"loss_data": ("batch", "probe:6")}
    assert replay(run, **both) == 0
    whole = {name: folder(run, name).read(0, 6) for name in ("batch", "probe")}
    assert replay(run, "--overwrite", workload=f"{variants.HERE}:short_of_memory", **both) == 0
    for name, before in whole.items():
        found = folder(run, name).read(0, 6)
        assert (before.pieces, found.pieces) == ({}, dict.fromkeys(range(6), 2))
        for quantity in ("loss_start", "residual"):
            np.testing.assert_allclose(found.per_step[quantity], before.per_step[quantity], rtol=0, atol=1e-6)
