"""Quadrature rules are what they claim, and no other claim is let through."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recorder.errors import UsageError
from replay.quadrature import ADAPTIVE, RULES, Rule, rule_named

FIXED = {name: rule for name, rule in RULES.items() if isinstance(rule, Rule)}
SIMPSON = FIXED["simpson"]


@pytest.mark.parametrize("rule", [*FIXED.values(), *map(ADAPTIVE.composite, (1, 2, 8))], ids=lambda rule: rule.name)
def test_the_error_of_one_step_falls_with_the_claimed_order(rule: Rule) -> None:
    # f(x) = e^2x around 0: no derivative vanishes.
    lengths = [2.0**-power for power in range(2, 6)]
    errors = []
    for length in lengths:
        values = [math.exp(2 * length * (node - 1 / 2)) for node in rule.nodes]
        approximate = length * math.fsum(weight * value for weight, value in zip(rule.weights, values, strict=True))
        errors.append(abs(approximate - math.sinh(length)))
    slope = np.polyfit(np.log(lengths), np.log(errors), 1)[0]
    assert slope == pytest.approx(rule.order + 1, abs=0.2)


@given(rule=st.sampled_from(list(FIXED.values())), data=st.data())
def test_polynomials_of_degree_below_the_order_are_integrated_exactly(rule: Rule, data: st.DataObject) -> None:
    coefficients = data.draw(st.lists(st.floats(-1e3, 1e3), min_size=rule.order, max_size=rule.order))
    values = [math.fsum(c * node**degree for degree, c in enumerate(coefficients)) for node in rule.nodes]
    approximate = math.fsum(weight * value for weight, value in zip(rule.weights, values, strict=True))
    exact = math.fsum(c / (degree + 1) for degree, c in enumerate(coefficients))
    tolerance = 1e-13 * math.fsum(map(abs, coefficients)) + 1e-300  # where products underflow nothing is relative
    assert approximate == pytest.approx(exact, rel=0, abs=tolerance)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"order": 5}, r"order 5 is claimed, but a\^4 is integrated to 8.3e-03"),
        ({"order": 3}, r"order 3 is claimed, but a\^3 is integrated to 0.0e\+00"),
        ({"weights": (1 / 4, 1 / 2, 1 / 4)}, r"order 4 is claimed, but a\^2"),
        ({"weights": (1 / 6, 4 / 6, 1 / 6 + 1e-9)}, r"order 4 is claimed, but a\^0 is integrated to 1.0e-09"),
        ({"weights": (1 / 6, 5 / 6)}, "3 nodes but 2 weights"),
        ({"nodes": (0, 1, 1 / 2)}, "do not increase"),
        ({"nodes": (-1 / 2, 1 / 2, 3 / 2)}, r"within \[0, 1\]"),
    ],
)
def test_a_rule_that_is_not_what_it_claims_is_refused(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=f"rule simpson: .*{complaint}"):
        dataclasses.replace(SIMPSON, **change)


def test_rules_say_which_ends_of_the_step_they_evaluate() -> None:
    ends = {name: (rule.starts_at_start, rule.ends_at_end) for name, rule in RULES.items()}
    assert ends == {
        "simpson": (True, True),
        "trapezoid": (True, True),
        "midpoint": (False, False),
        "euler": (True, False),
        "gauss2": (False, False),
        "gauss3": (False, False),
        "adaptive": (True, True),
    }


def test_one_piece_is_simpsons_rule_and_the_middles_become_borders_when_halved() -> None:
    assert ADAPTIVE.composite(1).nodes == SIMPSON.nodes
    assert ADAPTIVE.composite(1).weights == pytest.approx(SIMPSON.weights, rel=1e-15)
    for pieces in (1, 2, 4, 8):
        coarse, fine = ADAPTIVE.composite(pieces), ADAPTIVE.composite(2 * pieces)
        assert sorted({*coarse.nodes, *ADAPTIVE.middles(2 * pieces)}) == list(fine.nodes)


@pytest.mark.parametrize("pieces", [0, -2, 3, 12])
def test_pieces_that_halving_does_not_reach_are_refused(pieces: int) -> None:
    with pytest.raises(ValueError, match=f"{pieces} pieces cannot be reached by halving"):
        dataclasses.replace(ADAPTIVE, most_pieces=pieces)


def test_an_unknown_rule_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="unknown rule 'simson'; the rules are simpson, trapezoid, midpoint, euler, g"):
        rule_named("simson")
