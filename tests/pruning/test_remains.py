"""No budget is met by the empty model: somewhere a head is left, and the plan is the best of those that leave one."""

import itertools

import numpy as np
import pytest

from sparsesearch.errors import BudgetInfeasibleError
from sparsesearch.pruning.remains import solve_with_a_head
from sparsesearch.scores import ScoreTable
from sparsesearch.search.budget import Budget

HEADLESS = np.array([[False, False, True], [False, False, False], [False, False, True]])  # attention, FFN, attention


def table(seed=0):
    """Two attention sublayers around an FFN; the last entry of each removes all of it."""
    rng = np.random.default_rng(seed)
    cost = np.array([[4.0, 1.0, 0.0], [6.0, 3.0, 0.0], [4.0, 2.0, 0.0]])
    loss = np.cumsum(rng.random((3, 3)), 1) - 0.0
    loss[:, 0] = 0
    units = tuple(f"unit {row}" for row in range(3))
    return ScoreTable(
        units, ("whole", "thin", "gone"), (1,), loss, {"params": cost[..., None]}, 0, np.ones((3, 3), dtype=bool)
    )


def best_by_trying(scores, bound):
    """Of all plans that leave a head."""
    total = scores.costs["params"][:, 0].sum()
    return min(
        (
            float(scores.loss[range(3), choice].sum())
            for choice in itertools.product(range(3), repeat=3)
            if scores.costs["params"][range(3), choice].sum() <= bound * total
            and not HEADLESS[range(3), choice][[0, 2]].all()
        ),
        default=None,
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bound", [0.08, 0.15, 0.3, 0.6])
def test_it_is_the_best_plan_that_leaves_a_head(seed, bound):
    scores = table(seed)
    found = solve_with_a_head(scores, [Budget("params", bound)], HEADLESS)
    assert found.loss == pytest.approx(best_by_trying(scores, bound), rel=1e-9)
    assert found.lower_bound <= found.loss
    assert found.gap <= 1e-4


def test_the_message_names_the_smallest_budget_that_leaves_a_head():
    with pytest.raises(BudgetInfeasibleError, match=r"smallest feasible value is params=0\.07143"):  # 1 of 14
        solve_with_a_head(table(), [Budget("params", 0.0001)], HEADLESS)
    solve_with_a_head(table(), [Budget("params", 0.07143)], HEADLESS)
