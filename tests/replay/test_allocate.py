"""The allocation of one step against closed forms and the laws it must keep."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from recorder.table import Parameter
from replay import blocks
from replay.allocate import allocate
from replay.allocation import Allocation
from replay.columns import Status
from replay.evaluation import Evaluation
from replay.precision import PRECISIONS, Rounding
from replay.quadrature import ADAPTIVE, RULES
from replay.tolerance import Tolerance
from replay.unitsums import ParameterSums, sum_parameters

SHAPES = {"matrix": (2, 3), "vector": (3,), "scalar": ()}
SIZE = 10
TOLERANCE = Tolerance(rtol=1e-3, atol=0.0, rounding=Rounding(of_loss=2.0**-50))
Theta = Mapping[str, torch.Tensor]


def _split(flat: Any) -> dict[str, torch.Tensor]:
    tensors, offset = {}, 0
    for name, shape in SHAPES.items():
        size = math.prod(shape)
        tensors[name] = torch.tensor(np.asarray(flat)[offset : offset + size].reshape(shape))
        offset += size
    return tensors


def _lca(allocation: Allocation) -> Any:
    return _join({name: allocation.lca(name) for name in SHAPES})


def _sums(allocation: Allocation) -> dict[str, ParameterSums]:
    rows = [Parameter(name=name, shape=shape, dtype="float64") for name, shape in SHAPES.items()]
    return allocation.sums(rows)


def _join(theta: Theta) -> Any:
    return np.concatenate([theta[name].reshape(-1).numpy() for name in SHAPES])


class Loss:
    """A loss of all entries in one vector, with its gradient by hand."""

    def __init__(self, value: Callable[[Any], float], gradient: Callable[[Any], Any]) -> None:
        self._value, self._gradient = value, gradient
        self.asked: list[Theta] = []

    def evaluate(self, theta: Theta) -> Evaluation:
        self.asked.append(theta)
        flat = _join(theta)
        return Evaluation(loss=self._value(flat), gradient=_split(self._gradient(flat)))

    def loss(self, theta: Theta) -> float:
        return self._value(_join(theta))

    def allocate(self, start: Any, end: Any, rule: str = "simpson", first: Evaluation | None = None) -> Allocation:
        return allocate(_split(start), _split(end), RULES[rule], self.evaluate, self.loss, first, tolerance=TOLERANCE)


def _quadratic(matrix: Any, slope: Any) -> Loss:
    return Loss(lambda x: float(x @ matrix @ x / 2 + slope @ x), lambda x: matrix @ x + slope)


def _positive_quadratic(seed: int = 0) -> tuple[Loss, Any, Any, Any]:
    # All numbers positive: no cancellation, so that every entry has a relative error to speak of.
    generator = np.random.default_rng(seed)
    root = generator.uniform(0.1, 1, (SIZE, SIZE))
    matrix, slope = root + root.T, generator.uniform(0.1, 1, SIZE)
    start = generator.uniform(0.5, 1, SIZE)
    return _quadratic(matrix, slope), matrix, start, start + generator.uniform(0.01, 0.1, SIZE)


@pytest.mark.parametrize("rule", ["simpson", "gauss2", "midpoint", "trapezoid"])
def test_on_a_quadratic_every_entry_is_its_step_times_the_gradient_at_the_midpoint(rule: str) -> None:
    loss, _, start, end = _positive_quadratic()
    allocation = loss.allocate(start, end, rule)
    middle = _join(loss.evaluate(_split((start + end) / 2)).gradient)
    np.testing.assert_allclose(_lca(allocation), (end - start) * middle, rtol=1e-12, atol=0)
    assert abs(allocation.residual) < 1e-13 * allocation.change


def test_on_a_quadratic_euler_misses_by_half_the_curvature_along_the_step() -> None:
    loss, matrix, start, end = _positive_quadratic()
    exact = loss.allocate(start, end)
    euler = loss.allocate(start, end, "euler")
    step = end - start
    np.testing.assert_allclose(_lca(euler) - _lca(exact), -step * (matrix @ step) / 2, rtol=1e-10, atol=0)
    assert euler.residual == pytest.approx(-step @ matrix @ step / 2, rel=1e-10)


def test_on_a_cubic_simpson_and_gauss_are_exact_for_every_entry_and_the_trapezoid_is_not() -> None:
    generator = np.random.default_rng(1)
    direction, start = generator.uniform(0.1, 1, SIZE), generator.uniform(0.5, 1, SIZE)
    end = start + generator.uniform(0.1, 0.5, SIZE)
    loss = Loss(lambda x: float((direction @ x) ** 3), lambda x: 3 * (direction @ x) ** 2 * direction)
    low, high = direction @ start, direction @ end
    exact = (end - start) * direction * (low**2 + low * high + high**2)
    for rule in ("simpson", "gauss2"):
        np.testing.assert_allclose(_lca(loss.allocate(start, end, rule)), exact, rtol=1e-12, atol=0)
    assert loss.allocate(start, end, "trapezoid").residual > 1e-3


@pytest.mark.parametrize("rule", sorted(RULES))
def test_losses_at_both_ends_are_measured_whatever_the_nodes(rule: str) -> None:
    loss, _, start, end = _positive_quadratic()
    allocation = loss.allocate(start, end, rule)
    assert allocation.loss_start == loss.loss(_split(start))
    assert allocation.loss_end == loss.loss(_split(end))
    assert allocation.evaluations == RULES[rule].least_evaluations


def test_the_evaluation_known_at_the_start_is_not_made_again_and_the_end_is_handed_on() -> None:
    loss, _, start, end = _positive_quadratic()
    known = loss.evaluate(_split(start))
    alone = loss.allocate(start, end)
    loss.asked.clear()
    allocation = loss.allocate(start, end, first=known)
    assert allocation.evaluations == len(loss.asked) == 2
    assert all(torch.equal(allocation.lca(name), alone.lca(name)) for name in SHAPES)
    assert allocation.end is not None
    assert allocation.end.loss == allocation.loss_end == alone.loss_end


def test_the_ends_are_evaluated_as_they_were_recorded() -> None:
    loss, _, start, end = _positive_quadratic()
    first, last = _split(start), _split(end)
    allocate(first, last, RULES["simpson"], loss.evaluate, loss.loss, tolerance=TOLERANCE)
    assert loss.asked[0] is first
    assert loss.asked[2] is last
    assert loss.asked[1]["vector"].dtype == torch.float64


def test_a_parameter_without_gradient_gets_zero_and_keeps_its_shape() -> None:
    loss, _, start, end = _positive_quadratic()

    def evaluate(theta: Theta) -> Evaluation:
        whole = loss.evaluate(theta)
        return Evaluation(loss=whole.loss, gradient={"vector": whole.gradient["vector"]})

    allocation = allocate(_split(start), _split(end), RULES["simpson"], evaluate, loss.loss, tolerance=TOLERANCE)
    assert torch.equal(allocation.lca("matrix"), torch.zeros(2, 3, dtype=torch.float64))
    assert float(allocation.lca("scalar")) == 0
    assert bool((allocation.lca("vector") > 0).all())
    sums = _sums(allocation)["matrix"]
    assert sums.gradient_norm == 0
    assert math.isnan(sums.cosine)


def test_float32_parameters_are_accumulated_in_float64() -> None:
    start = {"w": torch.tensor([1.0, 1e-8])}
    end = {"w": torch.tensor([1.0 + 2**-20, 2e-8])}
    ones = Evaluation(loss=0.0, gradient={"w": torch.tensor([1.0, 3.0])})
    allocation = allocate(start, end, RULES["simpson"], lambda theta: ones, lambda theta: 0.0, tolerance=TOLERANCE)
    assert allocation.lca("w").dtype == torch.float64
    expected = (end["w"].double() - start["w"].double()) * torch.tensor([1.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(allocation.lca("w"), expected, rtol=1e-15, atol=0)


NUMBERS = hnp.arrays(np.float64, SIZE, elements=st.floats(-10, 10, width=32))
MATRICES = hnp.arrays(np.float64, (SIZE, SIZE), elements=st.floats(-3, 3, width=32)).map(lambda a: a + a.T)


def _rounding(loss: Loss, *points: Any) -> float:
    """What rounding may move an entry of the allocation by: ulps of the largest product on the way."""
    size = max(float(np.abs(point).max()) for point in points)
    return 1e-13 * (1 + size) * max(float(np.abs(loss._gradient(np.full(SIZE, size))).max()), 60 * SIZE * (1 + size))


@settings(deadline=None)
@given(matrix=MATRICES, slope=NUMBERS, start=NUMBERS, end=NUMBERS)
def test_the_parts_of_a_step_split_at_its_midpoint_add_up_to_it(matrix: Any, slope: Any, start: Any, end: Any) -> None:
    loss, middle = _quadratic(matrix, slope), (start + end) / 2
    parts = _lca(loss.allocate(start, middle)) + _lca(loss.allocate(middle, end))
    whole = _lca(loss.allocate(start, end))
    np.testing.assert_allclose(parts, whole, rtol=0, atol=_rounding(loss, start, end))


@settings(deadline=None)
@given(matrix=MATRICES, slope=NUMBERS, start=NUMBERS, end=NUMBERS, rule=st.sampled_from(["simpson", "gauss2"]))
def test_the_way_back_takes_back_what_the_way_gave(matrix: Any, slope: Any, start: Any, end: Any, rule: str) -> None:
    loss = _quadratic(matrix, slope)
    way, back = loss.allocate(start, end, rule), loss.allocate(end, start, rule)
    np.testing.assert_allclose(_lca(back), -_lca(way), rtol=0, atol=_rounding(loss, start, end))
    assert back.change == -way.change


@settings(deadline=None)
@given(matrix=MATRICES, slope=NUMBERS, start=NUMBERS, rule=st.sampled_from(sorted(RULES)))
def test_a_step_that_stands_still_allocates_nothing(matrix: Any, slope: Any, start: Any, rule: str) -> None:
    allocation = _quadratic(matrix, slope).allocate(start, start, rule)
    assert not _lca(allocation).any()
    assert allocation.change == allocation.residual == 0


@pytest.mark.parametrize(
    ("residual", "change", "status"),
    [
        (1.0e-3, 0.1, Status.CONVERGED),
        (-1.0e-3, -0.1, Status.CONVERGED),
        (1.02e-3, 0.1, Status.TOLERANCE_NOT_MET),
        (-1.02e-3, -0.1, Status.TOLERANCE_NOT_MET),
        (0.9e-5, 0.0, Status.CONVERGED),
        (1.1e-5, 0.0, Status.TOLERANCE_NOT_MET),
        (math.nan, 0.1, Status.NOT_FINITE),
        (0.0, math.nan, Status.NOT_FINITE),
        (math.inf, math.inf, Status.NOT_FINITE),
    ],
)
def test_the_books_balance_within_the_sum_of_both_tolerances(residual: float, change: float, status: Status) -> None:
    assert Tolerance(rtol=1e-2, atol=1e-5).status(residual, 0.0, change, 1) is status


@pytest.mark.parametrize(
    ("precision", "predictions", "share"),
    [
        ("float32", 100, 4 * 2.0**-23),
        ("float64", 100, 4 * 2.0**-52),
        ("bfloat16", 1, 1.5656e-2),
        ("bfloat16", 100, 1.8427e-3),
        ("bfloat16", 10**6, 9.767e-4),
    ],
)
def test_below_the_rounding_floor_of_the_losses_every_residual_is_rounding(
    precision: str, predictions: int, share: float
) -> None:
    tolerance = Tolerance(rtol=0, atol=0, rounding=PRECISIONS[precision].rounding)
    assert tolerance.status(0.99 * share * 6, -6.0, 5.0, predictions) is Status.CONVERGED
    assert tolerance.status(1.01 * share * 6, -6.0, 5.0, predictions) is Status.TOLERANCE_NOT_MET


def _allocation(*entries: float, loss_end: float = 0.0) -> Allocation:
    gradient = {str(number): torch.tensor([entry], dtype=torch.float64) for number, entry in enumerate(entries)}
    ones = {name: torch.ones(1, dtype=torch.float64) for name in gradient}
    return Allocation(gradient=gradient, delta=ones, loss_start=0.0, loss_end=loss_end, evaluations=3, end=None)


def test_infinities_of_both_signs_have_no_residual_and_no_traceback() -> None:
    allocation = _allocation(math.inf, 1.0, -math.inf, loss_end=math.inf)
    assert math.isnan(allocation.residual)
    assert Tolerance(rtol=1, atol=1).status(allocation.residual, 0.0, math.inf, 1) is Status.NOT_FINITE


def test_the_residual_survives_cancellation_between_parameters() -> None:
    assert _allocation(1e16, 1.0, -1e16).residual == 1.0


def test_a_parameters_lca_is_the_product_of_both_lengths_and_the_cosine() -> None:
    loss, _, start, end = _positive_quadratic()
    allocation = loss.allocate(start, end)
    for name in SHAPES:
        sums = _sums(allocation)[name]
        gradient, update, cosine = sums.gradient_norm, sums.update_norm, sums.cosine
        assert gradient == pytest.approx(float(allocation.gradient[name].norm()), rel=1e-12)
        assert update == pytest.approx(float((_split(end)[name] - _split(start)[name]).norm()), rel=1e-12)
        assert gradient * update * cosine == pytest.approx(float(allocation.lca(name).sum()), rel=1e-12)
        assert 0 < cosine <= 1 + 1e-12


# --- The adaptive rule ----------------------------------------------------------------------------------------------


def _wave(frequency: float) -> Loss:
    return Loss(
        lambda x: float(np.sin(frequency * x.sum()) + 2),
        lambda x: np.full(SIZE, np.cos(frequency * x.sum())) * frequency,
    )


@pytest.mark.parametrize("pieces", [1, 2, 4, 8])
def test_halving_gives_what_the_composite_rule_gives_and_evaluates_nothing_twice(pieces: int) -> None:
    generator = np.random.default_rng(3)
    start = generator.uniform(0, 1, SIZE)
    end = start + generator.uniform(0.1, 0.2, SIZE)
    loss = _wave(3.0)
    never = Tolerance(rtol=0.0, atol=0.0)
    rule = dataclasses.replace(ADAPTIVE, most_pieces=pieces)
    adaptive = allocate(_split(start), _split(end), rule, loss.evaluate, loss.loss, tolerance=never)
    asked = len(loss.asked)
    fixed = allocate(_split(start), _split(end), rule.composite(pieces), loss.evaluate, loss.loss, tolerance=never)
    np.testing.assert_allclose(_lca(adaptive), _lca(fixed), rtol=1e-12, atol=0)
    assert adaptive.evaluations == asked == 2 * pieces + 1
    assert len({tuple(_join(theta)) for theta in loss.asked[:asked]}) == asked


@pytest.mark.parametrize(("frequency", "evaluations"), [(0.01, 3), (2.0, 5), (6.0, 17)])
def test_it_halves_only_until_the_books_balance(frequency: float, evaluations: int) -> None:
    start, end = np.linspace(0, 0.3, SIZE), np.linspace(0.05, 0.5, SIZE)
    allocation = _wave(frequency).allocate(start, end, "adaptive")
    assert allocation.evaluations == evaluations
    assert TOLERANCE.status(allocation.residual, allocation.loss_start, allocation.loss_end, 1) is Status.CONVERGED


def test_where_the_cap_is_reached_the_status_says_so() -> None:
    start, end = np.zeros(SIZE), np.full(SIZE, 1.0)
    allocation = _wave(40.0).allocate(start, end, "adaptive")
    assert allocation.evaluations == 2 * ADAPTIVE.most_pieces + 1
    status = TOLERANCE.status(allocation.residual, allocation.loss_start, allocation.loss_end, 1)
    assert status is Status.TOLERANCE_NOT_MET


def test_a_step_that_is_not_finite_is_not_halved() -> None:
    loss = Loss(lambda x: math.inf, lambda x: np.full(SIZE, math.inf))
    assert loss.allocate(np.zeros(SIZE), np.ones(SIZE), "adaptive").evaluations == 3


def test_the_adaptive_rule_too_uses_and_hands_on_the_evaluations_at_the_ends() -> None:
    loss, _, start, end = _positive_quadratic()
    known = loss.evaluate(_split(start))
    allocation = loss.allocate(start, end, "adaptive", first=known)
    assert allocation.evaluations == 2
    assert allocation.end is not None
    assert allocation.end.loss == allocation.loss_end


@settings(deadline=None)
@given(shape=hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4), block=st.integers(1, 20), data=st.data())
def test_units_are_summed_as_a_plain_loop_sums_them(shape: tuple[int, ...], block: int, data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, max(len(shape) - 1, 0)))
    # Whole numbers: sums are exact in any order.
    entries = data.draw(hnp.arrays(np.int64, shape, elements=st.integers(-9, 9)))
    parameter = Parameter(name="p", shape=shape, dtype="float32", unit_axis=axis)
    sums: list[float] = [0.0] * parameter.units
    positive_sums, counts, zeros = list(sums), [0] * parameter.units, [0] * parameter.units
    for position in itertools.product(*map(range, shape)):
        unit, entry = position[axis] if shape else 0, int(entries[position])
        sums[unit] += entry
        zeros[unit] += entry == 0
        if entry > 0:
            positive_sums[unit] += entry
            counts[unit] += 1
    lca = torch.tensor(entries.astype(np.float64))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(blocks, "BLOCK", block)
        found = sum_parameters([parameter], {"p": lca}, {"p": torch.ones_like(lca)})["p"]
    assert found.sum.tolist() == sums
    assert found.positive_sum.tolist() == positive_sums
    assert found.positive_count.tolist() == counts
    assert found.zero_count.tolist() == zeros
    assert found.sum.dtype == np.float64
    assert found.positive_count.dtype == np.int64
