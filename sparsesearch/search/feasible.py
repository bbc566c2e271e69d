"""Is there a plan at all? A plan within the limits, or the smallest budgets that have one.

    t = min_x max_k use_k(x) / limit_k   =>   feasible iff t <= 1

Its dual is a matrix game: max over weights w >= 0, Σw = 1, of Σ_u min_c Σ_k w_k use[k, u, c] / limit_k. A value above 1 proves that
no plan fits; any plan met on the way with t <= 1 proves that one does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.optimize import linprog

from sparsesearch.errors import BudgetInfeasibleError
from sparsesearch.search.budget import Budget
from sparsesearch.search.exact import least_scale_exact
from sparsesearch.search.knapsack import TOLERANCE, Knapsack, dominated

MAX_EXACT_COLUMNS = 10_000
EXACT_TIME_S = 0.5
CLOSE = 1e-4
FORBIDDEN = 1e150


@dataclass(frozen=True)
class LeastScale:
    """The smallest t: `choice` reaches `scale`, and none reaches less than `bound`."""

    choice: Int[ndarray, " U"]
    scale: float
    bound: float


def feasible_plan(problem: Knapsack, budgets: Sequence[Budget]) -> Int[ndarray, " U"]:
    """A plan within the limits.

    Raises:
        BudgetInfeasibleError: there is none; the message gives the smallest feasible value of each budget.
    """
    found = least_scale(problem, problem.limit, enough=1.0 + TOLERANCE)
    if problem.fits(found.choice):
        return found.choice
    raise BudgetInfeasibleError(_explain(problem, budgets, found))


def least_scale(problem: Knapsack, limit: Float[ndarray, " K"], *, enough: float = 0.0) -> LeastScale:
    """Minimise the largest use/limit over the constraints of finite limit; stop early at `enough`."""
    rows = np.isfinite(limit)
    use = problem.use[rows] / limit[rows, None, None]
    kept = ~dominated(np.where(problem.allowed, 0.0, np.inf), use)
    found = _play(np.where(kept, use, FORBIDDEN), enough)
    close = found.scale <= enough or found.bound > max(enough, (1 - CLOSE) * found.scale)
    if close or kept.sum() > MAX_EXACT_COLUMNS:
        return found
    choice = least_scale_exact(np.where(kept, use, 0.0), kept, time_limit_s=EXACT_TIME_S)
    if choice is None:
        return found
    scale = float(use[:, np.arange(len(choice)), choice].sum(1).max())
    return LeastScale(choice, scale, found.bound) if scale < found.scale else found


def _play(use: Float[ndarray, "K U C"], enough: float, rounds: int = 200) -> LeastScale:
    """Cutting planes on the game: plans against weights, each answering the other's best mixture so far."""
    num_rows = len(use)
    weights = np.full(num_rows, 1.0 / num_rows)
    best: LeastScale | None = None
    bound, at = -np.inf, weights
    plans: list[Float[ndarray, " K"]] = []
    for _ in range(rounds):
        choice = np.tensordot(weights, use, 1).argmin(1)
        totals = use[:, np.arange(len(choice)), choice].sum(1)
        plans.append(totals)
        if float(weights @ totals) > bound:
            bound, at = float(weights @ totals), weights
        if best is None or totals.max() < best.scale:
            best = LeastScale(choice, float(totals.max()), bound)
        value, outermost = _mixture(plans)
        if best.scale <= enough or value - bound <= 0.1 * CLOSE * value:
            break
        weights = 0.5 * (at + outermost)
    assert best is not None
    return LeastScale(best.choice, best.scale, bound)


def _mixture(plans: list[Float[ndarray, " K"]]) -> tuple[float, Float[ndarray, " K"]]:
    """The weights whose worst plan is best: max_w min_i w·plan_i."""
    rows = np.array(plans)
    size = max(float(rows.max()), 1e-300)
    num_rows = rows.shape[1]
    result = linprog(
        np.r_[-1.0, np.zeros(num_rows)],
        A_ub=np.c_[np.ones(len(rows)), -rows / size],
        b_ub=np.zeros(len(rows)),
        A_eq=np.r_[0.0, np.ones(num_rows)][None],
        b_eq=[1.0],
        bounds=[(0.0, None)] * (num_rows + 1),
        method="highs",
    )
    assert result.x is not None  # bounded, and any weights are feasible
    weights = np.maximum(result.x[1:], 0.0)
    return float(result.x[0]) * size, weights / weights.sum()


def _explain(problem: Knapsack, budgets: Sequence[Budget], together: LeastScale) -> str:
    smallest = []
    for budget in budgets:
        own = [
            name[0] == budget.metric and (budget.lengths is None or name[1] in budget.lengths) for name in problem.names
        ]
        alone = least_scale(problem, np.where(own, budget.bound, np.inf)).scale * budget.bound
        smallest.append((budget, alone))
    verdict = "no plan fits" if together.bound > 1.0 else "no plan was found that fits"
    asked = f"{verdict} {' and '.join(str(budget) for budget in budgets)}"
    alone_text = ", ".join(f"{budget.metric}={round_up(value):g}" for budget, value in smallest)
    if len(budgets) == 1:
        return f"{asked}: the smallest feasible value is {alone_text}. Raise the budget or add sparser rules."
    joint = ", ".join(f"{budget.metric}={round_up(budget.bound * together.scale):g}" for budget in budgets)
    advice = f"together, all budgets raised by the same factor fit at {joint}"
    return f"{asked}: each alone is feasible down to {alone_text}; {advice}. Raise them or add sparser rules."


def round_up(value: float) -> float:
    """To four significant digits, upwards, so that the printed value is itself feasible."""
    if value <= 0:
        return 0.0
    digit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return float(f"{math.ceil(value / digit * (1 - 1e-12)) * digit:.12g}")
