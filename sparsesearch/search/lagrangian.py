"""The Lagrangian bound: prices for the constraints, and a proven lower bound on the loss.

    D(λ) = Σ_u min_c (loss[u, c] + Σ_k λ_k use[k, u, c]) − Σ_k λ_k limit[k],   λ >= 0

Every λ gives a lower bound, and max_λ D equals the bound of the linear relaxation, because each unit's choice is a
simplex. D is concave and piecewise linear; with hundreds of units its pieces are so short that a cutting-plane method
needs a few dozen evaluations. The cuts are whole plans, (loss, use), and hold for any limit, so a sweep over budgets
keeps them.

Sources: Kelley 1960 (cutting planes); Ben-Ameur and Neto 2007, Networks 49(1) (evaluating between the best and the
outermost point).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.optimize import linprog

from sparsesearch.search.knapsack import Knapsack

STEP = 0.5
"""From the best known prices towards the master's. 1 is Kelley's method, taken where a step removed little of what was
left to gain (few units: the pieces are long); 0.5 needs half its evaluations otherwise (swept 0.2 to 1; 64 and 1024
units, 4 and 12 constraints)."""

MAX_EVALUATIONS = 400
FINEST = 1e-7
FURTHEST = 1e6
ROUNDING = 1e-14


class Point(Protocol):
    """D at some prices."""

    @property
    def bound(self) -> float:
        """No plan within the limits loses less."""

    @property
    def rounding(self) -> float:
        """How far `bound` may be off by the rounding of its sums."""

    @property
    def prices(self) -> Float[ndarray, " K"]:
        """Loss per unit of each constraint."""


P = TypeVar("P", bound=Point)

NO_PRICE = 1e-12
"""Prices below this part of what is to be expected are none: a neighbouring bound's, where the limit hardly binds."""


@dataclass(frozen=True)
class Dual:
    """D at some prices.

    Attributes:
        bound: D(λ): no plan within the limits loses less.
        rounding: how far `bound` may be off by the rounding of its sums.
        prices: λ, loss per share of dense.
        choice: the plan that minimises loss + λ·use; it may exceed the limits.
        reduced: loss + λ·use − its minimum in the unit: by how much D rises when the unit must take that candidate; inf
            in padding, and off the menus of `choice`.
    """

    bound: float
    rounding: float
    prices: Float[ndarray, " K"]
    choice: Int[ndarray, " U"]
    reduced: Float[ndarray, "U C"]


def evaluate(problem: Knapsack, prices: Float[ndarray, " K"]) -> Dual:
    """D and its minimiser at given prices."""
    choice, priced = problem.cheapest(problem.loss + np.tensordot(prices, problem.use, 1))
    least = np.take_along_axis(priced, choice[:, None], 1)
    paid = float(prices @ problem.limit)
    rounding = ROUNDING * (float(np.abs(least).sum()) + paid)
    return Dual(float(least.sum()) - paid, rounding, prices, choice, priced - least)


@dataclass
class Cuts:
    """Plans seen so far, each an upper bound on D: D(λ) <= loss + λ·(use − limit)."""

    loss: list[float] = field(default_factory=list)
    use: list[Float[ndarray, " K"]] = field(default_factory=list)

    def add(self, problem: Knapsack, choice: Int[ndarray, " U"]) -> None:
        """Add a plan, whether or not it keeps the limits."""
        self.loss.append(problem.loss_of(choice))
        self.use.append(problem.use_of(choice))

    def trim(self, limit: Float[ndarray, " K"], best: Dual, count: int) -> None:
        """Keep the cuts that are lowest at `best`: those that matter for limits nearby."""
        order = np.argsort(np.array(self.loss) + (np.array(self.use) - limit) @ best.prices, kind="stable")[:count]
        self.loss, self.use = [self.loss[i] for i in order], [self.use[i] for i in order]

    def maximum(self, limit: Float[ndarray, " K"], best: Point, largest: float) -> tuple[float, Float[ndarray, " K"]]:
        """Maximum over 0 <= λ <= largest of the cuts' lower envelope, as its rise above `best`, and where it is.

        The linear program is stated around the best prices and its rows are scaled to 1: losses of a coarse plan may be
        10⁶ times the rise that matters, and the solver's tolerance is absolute.
        """
        slope = np.array(self.use) - limit
        height = np.maximum(np.array(self.loss) + slope @ best.prices - best.bound, 0.0)
        unit = max(1e-3 * abs(best.bound), 1e-6 * largest)
        rows = np.c_[np.full(len(height), unit), -slope * largest]
        size = np.abs(rows).max(1)
        low = -best.prices / largest
        result = linprog(
            np.r_[-1.0, np.zeros(len(limit))],
            A_ub=rows / size[:, None],
            b_ub=height / size,
            bounds=[(0.0, None), *zip(low, 1.0 + low, strict=True)],
            method="highs",
            options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
        )
        if result.x is None:  # numerically stuck: the best bound so far is a bound all the same
            return 0.0, best.prices
        return float(result.x[0]) * unit, np.clip(best.prices + result.x[1:] * largest, 0.0, largest)


def maximise(
    problem: Knapsack, floor: Int[ndarray, " U"], cuts: Cuts, *, tolerance: float, start: Dual | None = None
) -> Dual:
    """Raise the Lagrangian bound until it is within `tolerance` of its maximum, relative to itself.

    Args:
        problem: units, candidates and limits.
        floor: a plan within the limits; it bounds the prices.
        cuts: kept between calls; new plans are added.
        tolerance: relative; below FINEST it is taken as FINEST, and the certificate closes the rest.
        start: prices to begin with, such as those of a neighbouring budget.
    """
    best = evaluate(problem, np.zeros(len(problem.limit)) if start is None else start.prices)
    for plan in (floor, best.choice):
        cuts.add(problem, plan)
    spread = np.where(problem.allowed, problem.loss, -np.inf).max(1) - problem.loss.min(1)
    if not spread.any():  # all choices lose the same: the bound at price 0 is exact
        return best

    def met(prices: Float[ndarray, " K"]) -> Dual:
        point = evaluate(problem, prices)
        cuts.add(problem, point.choice)
        return point

    first = float(np.median(spread[spread > 0])) * len(spread)
    return ascend(best, met, cuts, problem.limit, first=first, tolerance=tolerance)


def ascend(
    best: P,
    met: Callable[[Float[ndarray, " K"]], P],
    cuts: Cuts,
    limit: Float[ndarray, " K"],
    *,
    first: float,
    tolerance: float,
    ceiling: float = np.inf,
) -> P:
    """Raise a bound by cutting planes.

    Args:
        best: D at the prices to begin with.
        met: evaluates D at given prices and adds the plan it meets to the cuts.
        cuts: with a plan within the limits, which bounds the prices; or give a `ceiling`.
        limit: of each constraint.
        first: the size of prices to expect where `best` has none.
        tolerance: relative rise at which to stop; below FINEST it is taken as FINEST.
        ceiling: no plan loses more, so a bound beyond it says that none is within the limits.
    """
    reach, before = 8.0, np.inf
    for _ in range(MAX_EVALUATIONS):
        highest = float(best.prices.max())
        largest = reach * (highest if highest > NO_PRICE * first else first)
        rise, outermost = cuts.maximum(limit, best, largest)
        if rise <= max(tolerance, FINEST) * abs(best.bound) + best.rounding:
            if outermost.max() < 0.99 * largest or reach > FURTHEST:
                break
            reach *= 16.0
            continue
        step, before = STEP if rise < 0.7 * before else 1.0, rise
        point = met(best.prices + step * (outermost - best.prices))
        if point.bound > best.bound:
            best = point
        if best.bound > ceiling:
            break
    return best
