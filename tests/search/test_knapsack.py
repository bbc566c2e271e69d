from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsesearch.scores import ScoreTable
from sparsesearch.search.budget import Budget
from sparsesearch.search.feasible import feasible_plan, round_up
from sparsesearch.search.knapsack import dominated, knapsack_of
from sparsesearch.search.lagrangian import Cuts, evaluate, maximise
from sparsesearch.search.pareto import feasible_bounds, pareto
from sparsesearch.search.primal import improve, repair
from sparsesearch.search.speed import synthetic_table


def test_dominated_drops_what_is_beaten_everywhere_and_later_equals() -> None:
    loss = np.array([[1.0, 1.0, 2.0, 0.5, np.inf, 0.9]])
    use = np.array([[[0.5, 0.5, 0.6, 0.9, 0.0, 0.8]], [[0.5, 0.5, 0.5, 0.9, 0.0, 1.0]]])
    assert dominated(loss, use).tolist() == [[False, True, True, False, True, False]]


@pytest.mark.parametrize("seed", range(20))
def test_restore_gives_valid_candidates_and_the_same_sums(
    seed: int, make_small_table: Callable[[int], tuple[ScoreTable, list[Budget]]]
) -> None:
    table, budgets = make_small_table(seed)
    problem = knapsack_of(table, budgets)
    choice = np.where(problem.allowed, np.arange(problem.loss.shape[1]), -1).max(1)
    restored = problem.restore(choice)
    assert table.valid[np.arange(len(restored)), restored].all()
    assert problem.loss_of(choice) == pytest.approx(table.loss_of(restored))
    for value, (metric, length) in zip(problem.use_of(choice), problem.names, strict=True):
        assert value == pytest.approx(table.cost_of(metric, restored)[table.lengths.index(length)])


def test_a_candidate_equal_to_dense_gives_way_to_dense() -> None:
    table = synthetic_table(4, 6, (1024,))
    for metric in table.costs:
        table.costs[metric][:, 2] = table.costs[metric][:, table.dense_index]
    table.loss[:, 2] = 0.0
    problem = knapsack_of(table, [Budget("density", 0.5)])
    assert table.dense_index in problem.candidate
    assert 2 not in problem.candidate


def test_bound_is_concave_maximum_and_plans_keep_limits() -> None:
    budgets = [Budget("density", 0.2), Budget("kv_fraction", 0.25)]
    problem = knapsack_of(synthetic_table(64, 10, (1024, 8192)), budgets)
    floor = np.where(problem.allowed, problem.use.sum(0), np.inf).argmin(1)
    dual = maximise(problem, floor, Cuts(), tolerance=1e-7)
    rng = np.random.default_rng(0)
    for _ in range(100):
        other = evaluate(problem, dual.prices * rng.uniform(0, 2, len(dual.prices)))
        assert other.bound <= dual.bound * (1 + 1e-6)
    plan = repair(problem, dual, dual.choice, floor)
    better = improve(problem, dual, plan, count=160)
    assert problem.fits(plan)
    assert problem.fits(better)
    assert dual.bound <= problem.loss_of(better) <= problem.loss_of(plan)


def test_prices_of_nothing_are_no_prices() -> None:
    """A neighbouring bound that hardly bound leaves prices such as 1e-310, by which nothing can be divided."""
    budgets = [Budget("density", 0.3)]
    problem = knapsack_of(synthetic_table(16, 6, (1024, 8192)), budgets)
    floor = feasible_plan(problem, budgets)
    plain = maximise(problem, floor, Cuts(), tolerance=1e-6)
    for price in (5e-324, 1e-310, 1e-200, 1e-20):
        start = evaluate(problem, np.full(len(problem.limit), price))
        again = maximise(problem, floor, Cuts(), tolerance=1e-6, start=start)
        assert again.bound == pytest.approx(plain.bound, rel=1e-5)


@given(st.floats(1e-6, 1.0))
@settings(deadline=None)
def test_round_up_is_short_and_never_below(value: float) -> None:
    rounded = round_up(value)
    assert value * (1 - 1e-11) <= rounded <= value * 1.00101
    assert len(f"{rounded:g}".replace(".", "").lstrip("0").split("e")[0]) <= 5


def test_feasible_bounds_start_where_a_plan_exists() -> None:
    table = synthetic_table(32, 8, (1024, 4096))
    others = [Budget("kv_fraction", 0.3)]
    for metric in table.costs:
        table.costs[metric][:] = table.costs[metric] + 0.1 * table.costs[metric][:, [table.dense_index]]
    bounds = feasible_bounds(table, "density", 5, others=others)
    assert 0.09 < bounds[0] < 0.11
    assert bounds[-1] == 1.0
    front = pareto(table, "density", bounds, others=others)
    assert all(point.used["kv_fraction"][length] <= 0.3 + 1e-12 for point in front for length in (1024, 4096))
