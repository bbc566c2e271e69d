"""Every plan, one by one: what the searchers are tested against."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from sparsesearch.errors import BudgetInfeasibleError, SpecError
from sparsesearch.scores import ScoreTable
from sparsesearch.search.budget import Budget
from sparsesearch.search.knapsack import TOLERANCE, knapsack_of
from sparsesearch.search.solve import Solution, solution_of

MAX_PLANS = 1_000_000


def solve_exhaustive(
    table: ScoreTable, budgets: Sequence[Budget], *, loss: Float[ndarray, "U C"] | None = None
) -> Solution:
    """The plan of least loss among all that keep every budget; the same contract as `solve`.

    Raises:
        SpecError: there are more than a million plans.
        BudgetInfeasibleError: none keeps the budgets.
    """
    knapsack_of(table, budgets, loss=loss)  # refuses what solve refuses
    options = [np.flatnonzero(row) for row in table.valid]
    if math.prod(len(option) for option in options) > MAX_PLANS:
        raise SpecError(f"exhaustive search must face at most {MAX_PLANS} plans. Use solve.")
    plans = np.array(list(itertools.product(*options)), dtype=np.int64).reshape(-1, len(options))
    losses = table.loss if loss is None else loss
    total = losses[np.arange(len(options)), plans].sum(1)
    total = np.where(_within(table, budgets, plans), total, np.inf)
    best = int(total.argmin())
    if not np.isfinite(total[best]):
        raise BudgetInfeasibleError(
            f"no plan fits {' and '.join(str(budget) for budget in budgets)}. Raise the budget."
        )
    return solution_of(table, plans[best], float(total[best]), "exhaustive", loss)


def _within(table: ScoreTable, budgets: Sequence[Budget], plans: Int[ndarray, "plans U"]) -> Bool[ndarray, " plans"]:
    """Which plans keep every budget."""
    within = np.ones(len(plans), dtype=bool)
    for budget in budgets:
        known = table.points_of(budget.metric)
        at = [position for position, length in enumerate(known) if budget.holds_at(length)]
        dense = table.dense_cost(budget.metric)[at]
        cost = table.costs[budget.metric][:, :, at][np.arange(plans.shape[1]), plans].sum(1)
        share = (cost + table.fixed_cost(budget.metric)[at]) / dense
        within &= (share <= (budget.bound / dense if budget.absolute else budget.bound) + TOLERANCE).all(1)
    return within
