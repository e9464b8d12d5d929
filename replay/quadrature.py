"""Quadrature rules on [0, 1]: data that checks itself, and one that is refined where a step needs it.

The LCA of parameter i at step t is Δθ_i · ∫_0^1 ∂L/∂θ_i (θ_t + a·Δθ) da (Lan et al. 2019, section 2). The integrand
depends on a alone, so the fourth-order Runge-Kutta method of the paper is Simpson's rule, and any other rule is
another table of nodes and weights.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

from recorder.errors import UsageError
from recorder.manifest import CHORD

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
    def least_evaluations(self) -> int:
        """Evaluations of a step."""
        return len(self.nodes)

    @property
    def middle(self) -> float:
        """The node nearest to the middle of the step; of two, the later one, which no step before has evaluated."""
        return min(self.nodes, key=lambda node: (abs(node - 1 / 2), -node))

    @property
    def starts_at_start(self) -> bool:
        """Whether the gradient at the start of the step is one of the evaluations."""
        return self.nodes[0] == 0

    @property
    def ends_at_end(self) -> bool:
        """Whether the gradient at the end is one: on a fixed loss data it is the start of the next step."""
        return self.nodes[-1] == 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AdaptiveRule:
    """A composite rule whose pieces are halved until the books of a step balance.

    On n pieces of equal length Simpson's rule is Σ (ends + 2 · inner borders + 4 · middles) / 6n. Halving turns the
    middles into inner borders, so that every evaluation made before is used again.

    Parameters
    ----------
    name
        As on the command line.
    most_pieces
        A power of two. A step that does not balance with these keeps their result and says so.
    source
        Where the rule is from.

    Raises
    ------
    ValueError
        If `most_pieces` is no power of two.
    """

    name: str
    most_pieces: int
    source: str

    def __post_init__(self) -> None:
        if self.most_pieces < 1 or self.most_pieces & (self.most_pieces - 1):
            message = f"rule {self.name}: {self.most_pieces} pieces cannot be reached by halving"
            raise ValueError(message)

    def middles(self, pieces: int) -> tuple[float, ...]:
        """Return the middles of the pieces: where the rule is evaluated when it comes to so many.

        Parameters
        ----------
        pieces
            1, 2, 4, ...

        Returns
        -------
        tuple of float
            One for each piece; exact, being multiples of a power of two.
        """
        return tuple((2 * piece + 1) / (2 * pieces) for piece in range(pieces))

    def composite(self, pieces: int) -> Rule:
        """Return the fixed rule that a number of pieces comes to.

        Parameters
        ----------
        pieces
            1, 2, 4, ...

        Returns
        -------
        Rule
            Composite Simpson, which checks itself.
        """
        nodes = tuple(position / (2 * pieces) for position in range(2 * pieces + 1))
        inner = tuple((4 if position % 2 else 2) / (6 * pieces) for position in range(1, 2 * pieces))
        end = 1 / (6 * pieces)
        return Rule(
            name=f"{self.name}, {pieces} pieces", nodes=nodes, weights=(end, *inner, end), order=4, source=self.source
        )

    @property
    def starts_at_start(self) -> bool:
        """Whether the gradient at the start of the step is one of the evaluations."""
        return True

    @property
    def ends_at_end(self) -> bool:
        """Whether the gradient at the end is one: on a fixed loss data it is the start of the next step."""
        return True

    @property
    def least_evaluations(self) -> int:
        """Evaluations of a step that balances at once."""
        return 3

    @property
    def middle(self) -> float:
        """The node nearest to the middle of the step."""
        return 1 / 2


_HALF_WIDTH = math.sqrt(1 / 12)
_HALF_WIDTH_OF_3 = math.sqrt(3 / 20)

ADAPTIVE = AdaptiveRule(
    name="adaptive",
    most_pieces=16,
    source="composite Simpson's rule, halved until the residual is within the tolerance, as in Lan et al. 2019",
)

RULES: dict[str, Rule | AdaptiveRule] = {
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
        Rule(
            name="gauss3",
            nodes=(1 / 2 - _HALF_WIDTH_OF_3, 1 / 2, 1 / 2 + _HALF_WIDTH_OF_3),
            weights=(5 / 18, 8 / 18, 5 / 18),
            order=6,
            source="three-point Gauss-Legendre rule (Abramowitz and Stegun 1964, table 25.4)",
        ),
        ADAPTIVE,
    )
}


CHORD_PIECES = 128
"""As many as an interval between checkpoints far apart may be cut into: it bends more than one update does."""


def rule_for(name: str, path: str) -> Rule | AdaptiveRule:
    """Find the rule for the steps of a path.

    Parameters
    ----------
    name
        One of `RULES`.
    path
        ``recorded`` or ``chord``.

    Returns
    -------
    Rule or AdaptiveRule
        The rule; along a chord the adaptive one may go on to `CHORD_PIECES`. A `UsageError` tells if there is none of
        that name.

    Examples
    --------
    >>> [rule_for("adaptive", path).most_pieces for path in ("recorded", "chord")]
    [16, 128]
    """
    rule = rule_named(name)
    if path == CHORD and isinstance(rule, AdaptiveRule):
        return dataclasses.replace(rule, most_pieces=CHORD_PIECES)
    return rule


def rule_named(name: str) -> Rule | AdaptiveRule:
    """Find a rule by its name.

    Parameters
    ----------
    name
        One of `RULES`.

    Returns
    -------
    Rule or AdaptiveRule
        The rule.

    Raises
    ------
    UsageError
        If there is none of that name.

    Examples
    --------
    >>> rule_named("simpson").weights
    (0.16666666666666666, 0.6666666666666666, 0.16666666666666666)
    """
    if name not in RULES:
        message = f"unknown rule {name!r}; the rules are {', '.join(RULES)}"
        raise UsageError(message)
    return RULES[name]
