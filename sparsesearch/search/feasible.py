"""Is there a plan at all? A plan within the limits, or the smallest budgets that have one.

    t = min_x max_k use_k(x) / limit_k   =>   feasible iff t <= 1

Its dual is a matrix game: max over weights w >= 0, Σw = 1, of Σ_u min_c Σ_k w_k use[k, u, c] / limit_k. A value above 1
proves that no plan fits; any plan met on the way with t <= 1 proves that one does. Constraints that are held instead of
scaled enter the game as w_j (use_j / limit_j − 1) with w_j >= 0 outside the sum.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy.optimize import linprog

from sparsesearch.errors import BudgetInfeasibleError
from sparsesearch.search.budget import Budget
from sparsesearch.search.exact import least_scale_exact
from sparsesearch.search.knapsack import TOLERANCE, Knapsack, dominated
from sparsesearch.search.lagrangian import Dual
from sparsesearch.search.primal import repair

MAX_EXACT_COLUMNS = 10_000
EXACT_TIME_S = 0.2
CLOSE = 1e-4
FORBIDDEN = 1e150
HIGHEST = 1e3
"""Largest price of a held constraint, per scale of the others; the bound is valid at any."""
ABOVE = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
"""How far above the bound plans are looked for, relative to it."""


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


def least_scale(
    problem: Knapsack, limit: Float[ndarray, " K"], *, held: Bool[ndarray, " K"] | None = None, enough: float = 0.0
) -> LeastScale:
    """Minimise the largest use/limit over the constraints of finite limit; stop early at `enough`.

    Args:
        problem: units and candidates.
        limit: what use is measured by; inf leaves a constraint out.
        held: constraints that must keep their limit and are not minimised. Where they have no plan, `scale` is inf.
        enough: a scale that will do.
    """
    held = np.zeros(len(limit), dtype=bool) if held is None else held
    scaled, kept = np.isfinite(limit) & ~held, held & np.isfinite(limit)
    limit = np.where(np.isfinite(limit), limit, 1.0)
    use = problem.use / limit[:, None, None]
    found, prices = _play(problem, np.where(problem.allowed, use, FORBIDDEN), scaled, kept, enough)
    if _close(found, enough):
        return found
    found = _repaired(problem, limit, scaled, kept, found, prices, enough)
    if _close(found, enough) or problem.allowed.sum() > 10 * MAX_EXACT_COLUMNS:
        return found
    own = scaled | kept
    loss = np.where(problem.allowed, 0.0, np.inf)
    open_to = ~dominated(loss, use[own]) if problem.menus is None else problem.allowed
    if open_to.sum() > MAX_EXACT_COLUMNS:
        return found
    choice = least_scale_exact(use[scaled], use[kept], open_to, problem.menus, time_limit_s=EXACT_TIME_S)
    if choice is None:
        return found
    totals = use[:, np.arange(len(choice)), choice].sum(1)
    better = totals[scaled].max() < found.scale and (totals[kept] <= 1.0 + TOLERANCE).all()
    return LeastScale(choice, float(totals[scaled].max()), found.bound) if better else found


def _close(found: LeastScale, enough: float) -> bool:
    return found.scale <= enough or found.bound > max(enough, (1 - CLOSE) * found.scale)


def _play(
    problem: Knapsack,
    use: Float[ndarray, "K U C"],
    scaled: Bool[ndarray, " K"],
    held: Bool[ndarray, " K"],
    enough: float,
    rounds: int = 200,
) -> tuple[LeastScale, Float[ndarray, " K"]]:
    """Cutting planes on the game: plans against prices, each answering the other's best mixture so far.

    Returns:
        The best plan met, with the bound, and the prices of that bound.
    """
    prices = scaled / scaled.sum()
    best: LeastScale | None = None
    bound, at = -np.inf, prices
    plans: list[Float[ndarray, " K"]] = []
    for _ in range(rounds):
        choice, _ = problem.cheapest(np.tensordot(prices, use, 1))
        totals = use[:, np.arange(len(choice)), choice].sum(1)
        plans.append(totals)
        value = float(prices @ (totals - held))
        if value > bound:
            bound, at = value, prices
        scale = float(totals[scaled].max()) if (totals[held] <= 1.0 + TOLERANCE).all() else np.inf
        if best is None or scale < best.scale:
            best = LeastScale(choice, scale, bound)
        most, outermost = _mixture(np.array(plans), scaled, held)
        if best.scale <= enough or most - bound <= 0.1 * CLOSE * most:
            break
        prices = 0.5 * (at + outermost)
    assert best is not None
    return LeastScale(best.choice, best.scale, bound), at


def _mixture(
    plans: Float[ndarray, "n K"], scaled: Bool[ndarray, " K"], held: Bool[ndarray, " K"]
) -> tuple[float, Float[ndarray, " K"]]:
    """The prices whose worst plan is best: max_w min_i w·(plan_i − held), w >= 0, Σ w = 1 over the scaled rows."""
    size = max(float(plans[:, scaled].max()), 1e-300)
    used = scaled | held
    rows = (plans - held)[:, used] / np.where(held, 1.0, size)[used]
    result = linprog(
        np.r_[-1.0, np.zeros(int(used.sum()))],
        A_ub=np.c_[np.ones(len(rows)), -rows],
        b_ub=np.zeros(len(rows)),
        A_eq=np.r_[0.0, scaled[used].astype(float)][None],
        b_eq=[1.0],
        bounds=[(None, None), *[(0.0, HIGHEST if own else 1.0) for own in held[used]]],
        method="highs",
    )
    assert result.x is not None  # bounded, and any prices are feasible
    prices = np.zeros(len(scaled))
    prices[used] = np.maximum(result.x[1:], 0.0)
    prices[scaled] /= prices[scaled].sum()
    prices[held] *= size
    return float(result.x[0]) * size, prices


def _repaired(
    problem: Knapsack,
    limit: Float[ndarray, " K"],
    scaled: Bool[ndarray, " K"],
    held: Bool[ndarray, " K"],
    found: LeastScale,
    prices: Float[ndarray, " K"],
    enough: float,
) -> LeastScale:
    """Repair the bound's own plan at scales a little above the bound, the nearest first."""
    priced = np.where(problem.allowed, np.tensordot(prices / limit, problem.use, 1), np.inf)
    choice, priced = problem.cheapest(priced)
    least = np.take_along_axis(priced, choice[:, None], 1)
    dual = Dual(found.bound, 0.0, prices, choice, priced - least)
    for scale in sorted([enough, *(found.bound * (1 + above) for above in ABOVE)]):
        if not found.bound < scale < found.scale:
            continue
        within = np.where(scaled, limit * scale, np.where(held, limit, FORBIDDEN))
        plan = repair(problem.with_limit(within), dual, choice, choice)
        if problem.with_limit(within).fits(plan):
            return LeastScale(plan, float((problem.use_of(plan) / limit)[scaled].max()), found.bound)
    return found


def _explain(problem: Knapsack, budgets: Sequence[Budget], together: LeastScale) -> str:
    """Which value each budget would need. A budget that is never the tightest one at any point is not at fault."""
    verdict = "no plan fits" if together.bound > 1.0 else "no plan was found that fits"
    asking = [budget for budget in budgets if not _full(budget)] or budgets
    asked = f"{verdict} {' and '.join(str(budget) for budget in asking)}"
    owner = np.array(problem.owner)
    tight = {index: budgets[index] for index in sorted(set(problem.owner))}
    if len(tight) == 1:
        value = _value(budgets[problem.owner[0]], _least(problem).scale)
        return f"{asked}: the smallest feasible value is {value}. Raise the budget or add sparser rules."
    values = {budget: _value(budget, _least(problem, held=owner != index).scale) for index, budget in tight.items()}
    smallest = [value for value in values.values() if value]
    if len(smallest) == len(asking) == 1:
        return f"{asked}: the smallest feasible value is {smallest[0]}. Raise the budget or add sparser rules."
    helpless = [budget.metric for budget, value in values.items() if not value and not _full(budget)]
    all_full = [index for index, budget in tight.items() if _full(budget)]
    scale = _least(problem, held=np.isin(owner, all_full)).scale
    joint = [_value(budget, scale) for budget in tight.values() if not _full(budget)]
    together_text = (
        f"; all raised by the same factor, they fit at {', '.join(filter(None, joint))}" if all(joint) else ""
    )
    alone = f"while the others hold, the smallest feasible value is {' or '.join(smallest)}"
    if smallest and helpless:
        alone += f" (raising {' or '.join(helpless)} alone does not help)"
    if not smallest:
        least = ", ".join(filter(None, (_value(tight[index], _alone(problem, owner, index)) for index in tight)))
        alone = f"raising one of them alone does not help, and the smallest feasible values, each without the others, are {least}"
    return f"{asked}: {alone}{together_text}. Raise them or add sparser rules."


def _alone(problem: Knapsack, owner: Int[ndarray, " K"], index: int) -> float:
    """The least scale of one budget where all others are lifted."""
    return least_scale(problem, np.where(owner == index, problem.limit, np.inf)).scale


def _least(problem: Knapsack, held: Bool[ndarray, " K"] | None = None) -> LeastScale:
    return least_scale(problem, problem.limit, held=held)


def _full(budget: Budget) -> bool:
    """Whether a budget cannot be raised: it asks only that nothing gets worse than dense."""
    return not budget.absolute and budget.bound >= 1.0


def _value(budget: Budget, scale: float) -> str:
    """A budget raised by a factor; empty where there is none, or none that is a share of dense."""
    value = budget.bound * scale
    if not math.isfinite(value) or (not budget.absolute and value > 1.0 + TOLERANCE):
        return ""
    return f"{budget.metric}={budget.amount(round_up(value))}"


def round_up(value: float) -> float:
    """To four significant digits, upwards, so that the printed value is itself feasible."""
    if value <= 0:
        return 0.0
    digit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return float(f"{math.ceil(value / digit * (1 - 1e-12)) * digit:.12g}")
