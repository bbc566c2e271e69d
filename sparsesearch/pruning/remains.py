"""The search over sublayers under one side condition: somewhere in the model a head is left.

Parameters, FLOPs and bytes of nothing are nothing, so without it every budget would have a plan: the empty model, in which no token reads
another and no cache has a layer.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from sparsesearch.errors import BudgetInfeasibleError
from sparsesearch.scores import ScoreTable
from sparsesearch.search.budget import Budget
from sparsesearch.search.solve import Solution, relative_gap, solve


def solve_with_a_head(
    table: ScoreTable,
    budgets: Sequence[Budget],
    headless: Bool[ndarray, "U C"],
    *,
    loss: Float[ndarray, "U C"] | None = None,
) -> Solution:
    """The plan of least loss in which at least one attention sublayer keeps a head.

    A plan that fulfils the condition does so in some layer, so where the unconditional optimum does not, one search per layer in
    which that layer must keep a head finds the best plan, and the least of their bounds is a bound.

    Args:
        table: losses and costs.
        budgets: all must hold.
        headless: entries that leave an attention sublayer without heads; rows of other sublayers are False throughout.
        loss: replaces the table's losses.

    Raises:
        BudgetInfeasibleError: no such plan fits; the message gives the smallest feasible value.
    """
    free = solve(table, budgets, loss=loss)
    rows = np.flatnonzero(headless.any(1)).tolist()
    if not rows or not headless[rows, free.choice[rows]].all():
        return free
    allowed = np.ones_like(headless) if table.valid is None else table.valid
    found: list[Solution] = []
    refused: BudgetInfeasibleError | None = None
    for row in sorted(rows, key=lambda row: _least_cost(table, budgets, row, allowed[row] & ~headless[row])):
        valid = allowed.copy()
        valid[row] &= ~headless[row]
        try:
            found.append(solve(replace(table, valid=valid), budgets, loss=loss))
        except BudgetInfeasibleError as error:
            refused = refused or error  # of the layer in which a head costs least
    if not found:
        assert refused is not None
        raise refused
    best = min(found, key=lambda solution: solution.loss)
    bound = min(solution.lower_bound for solution in found)
    return replace(best, lower_bound=bound, gap=relative_gap(best.loss, bound))


def _least_cost(table: ScoreTable, budgets: Sequence[Budget], row: int, open_to: Bool[ndarray, " C"]) -> float:
    """What the cheapest of a unit's open entries takes of the first budget, where that is largest."""
    costs = table.costs[budgets[0].metric]
    return float((costs[row, open_to].min(0) / costs[:, table.dense_index].sum(0)).max())
