"""Quadrature rules on [0, 1]: data that checks itself.

The LCA of parameter i at step t is Δθ_i · ∫_0^1 ∂L/∂θ_i (θ_t + a·Δθ) da (Lan et al. 2019, section 2). The integrand
depends on a alone, so the fourth-order Runge-Kutta method of the paper is Simpson's rule, and any other rule is
another table of nodes and weights.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

from recorder.errors import UsageError

_EXACT = 1e-14


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """A quadrature rule ∫_0^1 f(a) da ≈ Σ_k weights[k] · f(nodes[k]).

    Parameters
    ----------
    name
        As on the command line.
    nodes
        Increasing, in [0, 1].
    weights
        One for each node; they sum to 1.
    order
        p: exact for polynomials of degree p - 1 and not of degree p, so that the error of one step of length h
        falls like h^(p+1).
    source
        Where the rule is from.

    Raises
    ------
    ValueError
        If nodes and weights do not have the claimed order: too high or too low.
    """

    name: str
    nodes: tuple[float, ...]
    weights: tuple[float, ...]
    order: int
    source: str

    def __post_init__(self) -> None:
        if len(self.nodes) != len(self.weights):
            message = f"rule {self.name}: {len(self.nodes)} nodes but {len(self.weights)} weights"
            raise ValueError(message)
        increasing = all(left < right for left, right in itertools.pairwise(self.nodes))
        if not increasing or not 0 <= self.nodes[0] <= self.nodes[-1] <= 1:
            message = f"rule {self.name}: nodes {self.nodes} do not increase within [0, 1]"
            raise ValueError(message)
        for degree in range(self.order + 1):
            error = abs(self.integrate_power(degree) - 1 / (degree + 1))
            if (error < _EXACT) != (degree < self.order):
                message = (
                    f"rule {self.name}: order {self.order} is claimed, but a^{degree} is integrated to {error:.1e}"
                )
                raise ValueError(message)

    def integrate_power(self, degree: int) -> float:
        """Apply the rule to a^degree.

        Parameters
        ----------
        degree
            At least 0.

        Returns
        -------
        float
            Exactly 1 / (degree + 1) where degree < order.
        """
        return math.fsum(weight * node**degree for weight, node in zip(self.weights, self.nodes, strict=True))

    @property
    def starts_at_start(self) -> bool:
        """Whether the gradient at the start of the step is one of the evaluations."""
        return self.nodes[0] == 0

    @property
    def ends_at_end(self) -> bool:
        """Whether the gradient at the end is one: on a fixed loss data it is the start of the next step."""
        return self.nodes[-1] == 1


_HALF_WIDTH = math.sqrt(1 / 12)

RULES = {
    rule.name: rule
    for rule in (
        Rule(
            name="simpson",
            nodes=(0, 1 / 2, 1),
            weights=(1 / 6, 4 / 6, 1 / 6),
            order=4,
            source="Simpson's rule; for an integrand of a alone, the classical Runge-Kutta method of Lan et al. 2019",
        ),
        Rule(name="trapezoid", nodes=(0, 1), weights=(1 / 2, 1 / 2), order=2, source="trapezoidal rule"),
        Rule(name="midpoint", nodes=(1 / 2,), weights=(1,), order=2, source="midpoint rule; one-point Gauss-Legendre"),
        Rule(
            name="euler",
            nodes=(0,),
            weights=(1,),
            order=1,
            source="explicit Euler method: the first-order Taylor expansion at the start of the step",
        ),
        Rule(
            name="gauss2",
            nodes=(1 / 2 - _HALF_WIDTH, 1 / 2 + _HALF_WIDTH),
            weights=(1 / 2, 1 / 2),
            order=4,
            source="two-point Gauss-Legendre rule (Abramowitz and Stegun 1964, table 25.4)",
        ),
    )
}


def rule_named(name: str) -> Rule:
    """Find a rule by its name.

    Parameters
    ----------
    name
        One of `RULES`.

    Returns
    -------
    Rule
        The rule.

    Raises
    ------
    UsageError
        If there is none of that name.

    Examples
    --------
    >>> rule_named("simpson").integrate_power(3)
    0.25
    """
    if name not in RULES:
        message = f"unknown rule {name!r}; the rules are {', '.join(RULES)}"
        raise UsageError(message)
    return RULES[name]
