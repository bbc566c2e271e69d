"""The front: the least loss at each of many bounds on one metric, from one score table."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from sparsesearch.scores import ScoreTable
from sparsesearch.search.budget import Budget
from sparsesearch.search.feasible import feasible_plan, least_scale, round_up
from sparsesearch.search.knapsack import knapsack_of, limits_of
from sparsesearch.search.lagrangian import Cuts
from sparsesearch.search.solve import Solution, bounded_plan, certify, solution_of

KEPT_CUTS = 64
TOLERANCE = 1e-6
SMALLEST = 1e-3


def pareto(
    table: ScoreTable,
    metric: str,
    bounds: Sequence[float],
    *,
    others: Sequence[Budget] = (),
    lengths: tuple[int, ...] | None = None,
    gap_target: float = 1e-3,
    time_limit_s: float = 0.5,
    loss: Float[ndarray, "U C"] | None = None,
) -> list[Solution]:
    """The plan of least loss at each bound, with the gap that was proved for it.

    Neighbouring bounds share prices, cuts and plans, so a point costs a fraction of a search of its own. Losses never
    rise with the bound: where the plan of the next smaller bound is better, it stays.

    Args:
        table: losses and costs.
        metric: what is swept.
        bounds: shares of dense in (0, 1], in any order; the result follows it.
        others: budgets that hold at every point.
        lengths: where the swept budget holds; None means everywhere.
        gap_target: where the Lagrangian path leaves more, HiGHS is asked.
        time_limit_s: for HiGHS, per point.
        loss: replaces the table's losses.

    Raises:
        BudgetInfeasibleError: the smallest bound has no plan.
        SpecError: a bound or the table is not what it must be.
    """
    solved: dict[float, Solution] = {}
    cuts, dual, plan = Cuts(), None, None
    if not bounds:
        return []
    budgets = [Budget(metric, min(bounds), lengths), *others]
    problem = knapsack_of(table, budgets, loss=loss)
    floor = feasible_plan(problem, budgets)
    for bound in sorted(set(bounds)):
        problem = problem.with_limit(limits_of(table, [Budget(metric, bound, lengths), *others]))
        found = bounded_plan(problem, floor, cuts, tolerance=TOLERANCE, start=dual)
        cuts.trim(problem.limit, found.dual, KEPT_CUTS)
        choice, lower_bound, solver = certify(problem, found, gap_target, time_limit_s)
        if plan is None or problem.loss_of(choice) < problem.loss_of(plan):
            plan = choice
        dual = found.dual
        solved[bound] = solution_of(table, problem.restore(plan), lower_bound, solver, loss)
    return [solved[bound] for bound in bounds]


def feasible_bounds(
    table: ScoreTable,
    metric: str,
    count: int,
    *,
    others: Sequence[Budget] = (),
    lengths: tuple[int, ...] | None = None,
) -> list[float]:
    """`count` evenly spaced bounds from the smallest feasible one (a thousandth at least), rounded up, to 1.

    Raises:
        BudgetInfeasibleError: the other budgets alone have no plan.
    """
    budgets = [Budget(metric, 1.0, lengths), *others]
    problem = knapsack_of(table, budgets)
    feasible_plan(problem, budgets)
    low, high = SMALLEST, 1.0
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        limit = limits_of(table, [Budget(metric, middle, lengths), *others])
        if least_scale(problem, limit, enough=1.0).scale <= 1.0:
            high = middle
        else:
            low = middle
    return [float(bound) for bound in np.linspace(min(1.0, round_up(high)), 1.0, count)]
