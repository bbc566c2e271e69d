"""At most G launch groups per layer: equal to trying everything, and as tight as the bound promises."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from sparsesearch.errors import BudgetInfeasibleError, SpecError
from sparsesearch.scores import LayerMenus, ScoreTable
from sparsesearch.search.budget import Budget
from sparsesearch.search.exhaustive import solve_exhaustive
from sparsesearch.search.knapsack import TOLERANCE, knapsack_of
from sparsesearch.search.lagrangian import evaluate
from sparsesearch.search.menus import Menus
from sparsesearch.search.pareto import pareto
from sparsesearch.search.solve import solve
from sparsesearch.search.speed import synthetic_table


def with_menus(table: ScoreTable, seed: int) -> ScoreTable:
    """Random layers (some units in none), random launch groups (some candidates launch nothing)."""
    rng = np.random.default_rng(1000 + seed)
    layer = rng.integers(-1, 2, len(table.units))
    group = rng.integers(-1, 3, len(table.candidates)) if rng.random() < 0.5 else np.arange(len(table.candidates))
    return replace(table, menus=LayerMenus(layer, group, int(rng.integers(1, 3))))


def most_groups(table: ScoreTable, choice: np.ndarray) -> int:
    assert table.menus is not None
    taken = table.menus.group[choice]
    layers = [set(taken[table.menus.layer == layer]) - {-1} for layer in set(table.menus.layer.tolist()) - {-1}]
    return max(map(len, layers), default=0)


def test_equals_exhaustive_search(make_small_table: Callable[[int], tuple[ScoreTable, list[Budget]]]) -> None:
    infeasible = coupled = 0
    for seed in range(120):
        plain, budgets = make_small_table(seed)
        table = with_menus(plain, seed)
        assert table.menus is not None
        try:
            expected = solve_exhaustive(table, budgets)
        except BudgetInfeasibleError:
            infeasible += 1
            with pytest.raises(BudgetInfeasibleError):
                solve(table, budgets)
            continue
        found = solve(table, budgets, gap_target=0.0)
        assert found.loss == pytest.approx(expected.loss, rel=1e-9, abs=1e-12), f"seed {seed}"
        assert found.gap <= 1e-9, f"seed {seed}"
        assert most_groups(table, found.choice) <= table.menus.max_groups, f"seed {seed}"
        coupled += expected.loss > solve_exhaustive(plain, budgets).loss + 1e-9
    assert infeasible >= 2
    assert coupled >= 5, "menus must matter"


@pytest.mark.parametrize("max_groups", [1, 2, 3])
def test_cheapest_menu_is_the_cheapest(max_groups: int) -> None:
    plain = synthetic_table(11, 7, (1024, 4096), seed=max_groups)
    layer = np.array([0, 0, 1, 1, 1, -1, 2, 2, 2, 2, -1])
    group = np.array([0, 1, 2, 0, 3, -1, 4])
    table = replace(plain, menus=LayerMenus(layer, group, max_groups))
    problem = knapsack_of(table, [Budget("density", 0.3)])
    found = evaluate(problem, np.array([3.0, 7.0]))
    assert problem.menus is not None
    assert problem.menus.allow(found.choice)
    priced = problem.loss + 3.0 * problem.use[0] + 7.0 * problem.use[1]
    rng = np.random.default_rng(0)
    least = float(priced[np.arange(11), found.choice].sum())
    for _ in range(500):  # no random plan within the menus is cheaper
        choice = np.array([rng.choice(np.flatnonzero(row)) for row in problem.allowed])
        taken = found.choice.copy()
        some = rng.random(11) < 0.4
        taken[some] = choice[some]
        if problem.menus.allow(taken):
            assert priced[np.arange(11), taken].sum() >= least - 1e-9


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_totals_and_cheapest_menus_are_those_of_looking_at_each(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with equal prices, entries that are forbidden, units without a layer, and few prices at once."""
    monkeypatch.setattr("sparsesearch.search.menus.ENTRIES_AT_ONCE", 50)
    rng = np.random.default_rng(size)
    for num_groups in (size, size + 1, 7):
        layer = rng.integers(-1, 3, 12)
        menus = Menus(layer, np.tile(np.arange(-1, num_groups), (12, 1)), size)
        priced = rng.integers(0, 6, (12, num_groups + 1)).astype(float)
        priced[rng.random(priced.shape) < 0.2] = np.inf
        priced[:, 0] = np.where(rng.random(12) < 0.5, 9.0, np.inf)  # on every menu
        priced[:, 1] = 7.0
        expected = np.array(
            [
                [np.minimum(priced[rows, 0], priced[rows][:, menu + 1].min(1)).sum() for menu in menus.all]
                for rows in (row[row >= 0] for row in menus.rows)
            ]
        )
        assert np.array_equal(menus.totals(priced), expected)
        chosen = menus.cheapest(priced)
        assert np.array_equal(expected[np.arange(len(expected)), chosen], expected.min(1))


def layered(num_layers: int, num_heads: int, num_candidates: int, max_groups: int) -> ScoreTable:
    table = synthetic_table(num_layers * num_heads, num_candidates, (4096, 32768), seed=2)
    group = np.arange(num_candidates)
    group[-2] = -1  # zero launches nothing
    return replace(table, menus=LayerMenus(np.repeat(np.arange(num_layers), num_heads), group, max_groups))


def test_a_model_of_some_size_closes_its_gap_and_more_groups_never_lose_more() -> None:
    budgets = [Budget("density", 0.25), Budget("latency", 0.3)]
    losses = []
    for max_groups in (1, 2, 3):
        table = layered(8, 8, 12, max_groups)
        solution = solve(table, budgets, time_limit_s=20)
        assert solution.gap <= 1e-2 if max_groups == 1 else solution.gap <= 1e-3
        assert most_groups(table, solution.choice) <= max_groups
        for budget in budgets:
            assert max(solution.used[budget.metric].values()) <= budget.bound + TOLERANCE
        losses.append((solution.loss, solution.lower_bound))
    free = solve(replace(table, menus=None), budgets)
    assert losses[0][0] >= losses[1][1]
    assert losses[1][0] >= losses[2][1]
    assert losses[2][0] >= free.lower_bound
    assert losses[0][1] > free.loss, "the test must couple the heads"


def test_the_front_keeps_the_menus_and_infeasible_is_told() -> None:
    table = layered(4, 4, 6, 1)
    front = pareto(table, "density", [0.3, 0.6, 1.0])
    assert all(most_groups(table, point.choice) <= 1 for point in front)
    assert front[0].loss >= front[1].loss >= front[2].loss == 0
    assert table.menus is not None
    every = replace(table, valid=table.valid & (np.arange(6) != 4), costs={m: c + 0.01 for m, c in table.costs.items()})
    with pytest.raises(BudgetInfeasibleError, match="smallest feasible value is density="):
        solve(every, [Budget("density", 0.001)])


def test_menus_that_cannot_be() -> None:
    table = synthetic_table(4, 50, (1024,))
    with pytest.raises(SpecError, match="at least 1 launch group"):
        LayerMenus(np.zeros(4, dtype=int), np.arange(50), 0)
    with pytest.raises(SpecError, match="a layer for each of 4 units"):
        replace(table, menus=LayerMenus(np.zeros(3, dtype=int), np.arange(50), 1))
    many = replace(table, menus=LayerMenus(np.zeros(4, dtype=int), np.arange(50), 6))
    with pytest.raises(SpecError, match="lower --max-groups-per-layer"):
        solve(many, [Budget("density", 0.5)])
