"""What every searcher must hold. `solve`, the front and exhaustive search are the searchers."""

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from sparsesearch.errors import BudgetInfeasibleError, SpecError
from sparsesearch.scores import ScoreTable
from sparsesearch.search.budget import Budget, parse_budgets
from sparsesearch.search.exhaustive import solve_exhaustive
from sparsesearch.search.knapsack import TOLERANCE
from sparsesearch.search.pareto import pareto
from sparsesearch.search.solve import Solution, solve
from sparsesearch.search.speed import synthetic_table

Searcher = Callable[[ScoreTable, Sequence[Budget]], Solution]
MakeTable = Callable[[int], tuple[ScoreTable, list[Budget]]]


def by_solve(table: ScoreTable, budgets: Sequence[Budget]) -> Solution:
    return solve(table, budgets, gap_target=0.0)


def by_front(table: ScoreTable, budgets: Sequence[Budget]) -> Solution:
    first, *others = budgets
    return pareto(table, first.metric, [first.bound], lengths=first.lengths, others=others, gap_target=0.0)[0]


SEARCHERS = [by_solve, by_front, solve_exhaustive]


def medium_table(seed: int = 3) -> ScoreTable:
    return synthetic_table(48, 12, (1024, 4096), seed=seed)


@pytest.mark.parametrize("searcher", SEARCHERS)
@pytest.mark.parametrize("seed", range(12))
def test_never_over_budget_and_consistent(searcher: Searcher, seed: int, make_small_table: MakeTable) -> None:
    table, budgets = make_small_table(seed)
    try:
        solution = searcher(table, budgets)
    except BudgetInfeasibleError:
        return
    assert table.valid[np.arange(len(table.units)), solution.choice].all()
    for budget in budgets:
        for length in budget.lengths or table.lengths:
            assert solution.used[budget.metric][length] <= budget.bound + TOLERANCE
    assert solution.loss == pytest.approx(table.loss_of(solution.choice), abs=1e-12)
    assert solution.lower_bound <= solution.loss


@pytest.mark.parametrize(("searcher", "num_tables"), [(by_solve, 150), (by_front, 50)])
def test_equals_exhaustive_on_small_tables(searcher: Searcher, num_tables: int, make_small_table: MakeTable) -> None:
    infeasible = 0
    for seed in range(num_tables):
        table, budgets = make_small_table(seed)
        try:
            expected = solve_exhaustive(table, budgets)
        except BudgetInfeasibleError:
            infeasible += 1
            with pytest.raises(BudgetInfeasibleError):
                searcher(table, budgets)
            continue
        found = searcher(table, budgets)
        assert found.loss == pytest.approx(expected.loss, rel=1e-9, abs=1e-12), f"seed {seed}"
        assert found.lower_bound <= expected.loss + 1e-9 * abs(expected.loss) + 1e-12, f"seed {seed}"
        assert found.gap <= 1e-9, f"seed {seed}"
    assert 5 <= infeasible <= 150  # both outcomes are covered


@pytest.mark.parametrize("gap_target", [1e-2, 1e-4])
def test_lower_bound_is_below_the_optimum(gap_target: float) -> None:
    table, budgets = medium_table(), [Budget("density", 0.3), Budget("kv_fraction", 0.4)]
    optimum = solve(table, budgets, gap_target=0.0)
    rough = solve(table, budgets, gap_target=gap_target)
    assert optimum.gap <= 1e-9
    assert rough.gap <= gap_target
    assert rough.lower_bound <= optimum.loss <= rough.loss


def test_larger_budget_is_never_worse() -> None:
    table = medium_table()
    losses = [
        solve(table, [Budget("density", bound)], gap_target=0.0).loss for bound in (0.1, 0.11, 0.2, 0.5, 0.9, 1.0)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0.0
    front = pareto(table, "density", [1.0, 0.1, 0.4, 0.401, 0.402, 0.8])
    by_bound = [front[index].loss for index in (1, 2, 3, 4, 5, 0)]
    assert by_bound == sorted(by_bound, reverse=True)


def test_larger_budget_is_never_worse_beyond_the_proven_gap() -> None:
    table = synthetic_table(300, 20, seed=5)
    solutions = [solve(table, [Budget("density", bound)]) for bound in np.linspace(0.1, 0.6, 12)]
    for smaller, larger in pairwise(solutions):
        assert larger.loss <= smaller.loss + larger.gap * abs(larger.loss) + 1e-12
        assert larger.gap <= 1e-4


def test_deterministic_and_blind_to_the_order_of_heads() -> None:
    table, budgets = medium_table(), [Budget("density", 0.3), Budget("latency", 0.35, (4096,))]
    first = solve(table, budgets)
    assert (solve(table, budgets).choice == first.choice).all()
    order = np.random.default_rng(0).permutation(len(table.units))
    shuffled = replace(
        table,
        units=tuple(table.units[index] for index in order),
        loss=table.loss[order],
        valid=table.valid[order],
        costs={metric: cost[order] for metric, cost in table.costs.items()},
    )
    second = solve(shuffled, budgets)
    assert (second.choice == first.choice[order]).all()
    assert second.loss == pytest.approx(first.loss, rel=1e-14)


def test_front_agrees_with_single_searches_and_proves_its_gap() -> None:
    table = medium_table()
    bounds = [float(bound) for bound in np.linspace(0.1, 1.0, 25)]
    front = pareto(table, "density", bounds)
    for bound, point in zip(bounds, front, strict=True):
        optimum = solve(table, [Budget("density", bound)], gap_target=0.0)
        assert point.gap <= 1e-3
        assert point.lower_bound <= optimum.loss + 1e-9 * abs(optimum.loss)
        assert point.loss >= optimum.loss * (1 - 1e-9)


def _values(sentence: str) -> str:
    """The budgets at the end of a sentence about feasible values."""
    return sentence.split("fit at ")[1].split(". ")[0]


def test_smallest_values_while_the_others_hold_are_the_smallest(make_small_table: MakeTable) -> None:
    """Each printed value is feasible together with the other budgets, and nothing a thousandth smaller is."""
    checked = impossible = 0
    for seed in range(75):
        table, budgets = make_small_table(seed)
        if len({budget.metric for budget in budgets}) < 2:
            continue
        asked = [replace(budget, bound=0.6 * budget.bound) for budget in budgets[:2]]
        try:
            solve(table, asked)
        except BudgetInfeasibleError as caught:
            if "raising one of them alone does not help" in str(caught):
                for index in (0, 1):
                    with pytest.raises(BudgetInfeasibleError):
                        solve_exhaustive(table, [Budget(asked[index].metric, 1.0), asked[1 - index]])
                impossible += 2
                continue
            said = str(caught).split("smallest feasible value is ")[1].split("; all")[0].split(". Raise")[0]
        else:
            continue
        for index in (0, 1):
            other = asked[1 - index]
            value_said = re.search(rf"{asked[index].metric}=[^ ]+", said)
            if value_said is None:
                assert f"(raising {asked[index].metric} alone does not help)" in said
                impossible += 1
                with pytest.raises(BudgetInfeasibleError):
                    solve_exhaustive(table, [Budget(asked[index].metric, 1.0), other])
                continue
            value = parse_budgets(value_said[0])[0].bound
            solve_exhaustive(table, [Budget(asked[index].metric, value), other])
            with pytest.raises(BudgetInfeasibleError):
                solve_exhaustive(table, [Budget(asked[index].metric, 0.998 * value), other])
            checked += 1
    assert checked >= 10
    assert impossible >= 3


def test_infeasible_names_a_value_that_is_feasible_and_nearly_smallest() -> None:
    table = medium_table()
    costs = {metric: 0.2 * cost[:, [table.dense_index]] + 0.8 * cost for metric, cost in table.costs.items()}
    table = replace(table, costs=costs)
    with pytest.raises(BudgetInfeasibleError, match=r"smallest feasible value is density=0\.2\b"):
        solve(table, [Budget("density", 0.1)])
    solve(table, [Budget("density", 0.2)])
    with pytest.raises(BudgetInfeasibleError) as caught:
        solve(table, [Budget("density", 0.1), Budget("kv_fraction", 0.5)])
    assert caught.value.exit_code == 3
    held, joint = str(caught.value).split("while the others hold, ")[1].split("; all raised")
    assert "density=0.2" in held
    (smallest,) = re.findall(r"density=[^ ]+", held)
    for budgets in [f"{smallest},kv_fraction=0.5", _values(joint)]:
        assert solve(table, parse_budgets(budgets)).gap <= 1e-4


def test_printed_smallest_value_is_the_smallest_on_small_tables(make_small_table: MakeTable) -> None:
    checked = 0
    for seed in range(60):
        table, budgets = make_small_table(seed)
        with contextlib.suppress(BudgetInfeasibleError):
            solve(table, [Budget(budgets[0].metric, 0.01)])
            continue
        with pytest.raises(BudgetInfeasibleError) as caught:
            solve(table, [Budget(budgets[0].metric, 0.01)])
        smallest = float(str(caught.value).split("=")[-1].split(". ")[0])
        assert solve(table, [Budget(budgets[0].metric, smallest)]).gap < 1e-3
        with pytest.raises(BudgetInfeasibleError):
            solve_exhaustive(table, [Budget(budgets[0].metric, 0.998 * smallest)])
        checked += 1
    assert checked >= 10


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_the_size_of_the_losses_does_not_matter(scale: float) -> None:
    table = medium_table()
    scaled = replace(table, loss=table.loss * scale)
    budgets = [Budget("density", 0.3), Budget("kv_fraction", 0.35)]
    first, second = (solve(each, budgets, gap_target=0.0) for each in (table, scaled))
    assert second.loss == pytest.approx(first.loss * scale, rel=1e-9)


def test_jointly_infeasible_budgets_are_told_apart() -> None:
    """Each of two candidates is cheap in one metric alone."""
    base = medium_table()
    cheap_dear = np.array([[0.1, 0.9, 1.0], [0.9, 0.1, 1.0]])
    shape = (2, 3, 2)
    table = ScoreTable(
        base.units[:2],
        ("a", "b", "dense"),
        base.lengths,
        np.array([[1.0, 1.0, 0.0]] * 2),
        {
            "density": np.broadcast_to(cheap_dear[0][None, :, None], shape).copy(),
            "latency": np.broadcast_to(cheap_dear[1][None, :, None], shape).copy(),
        },
        2,
        np.ones((2, 3), dtype=bool),
    )
    budgets = [Budget("density", 0.4), Budget("latency", 0.4)]
    with pytest.raises(BudgetInfeasibleError) as caught:
        solve(table, budgets)
    assert "while the others hold, the smallest feasible value is density=0.9 or latency=0.9" in str(caught.value)
    assert "they fit at density=0.5, latency=0.5" in str(caught.value)
    with pytest.raises(
        BudgetInfeasibleError, match=r"smallest feasible value is density=0\.9 \(raising latency alone does not help\)"
    ):
        solve(table, [Budget("density", 0.09), Budget("latency", 0.3)])
    assert solve(table, [Budget("density", 0.5), Budget("latency", 0.5)]).loss == 2.0


def test_another_loss_and_unknown_names() -> None:
    table = medium_table()
    flipped = table.loss.copy()
    flipped[:, 0] = -1.0
    solution = solve(table, [Budget("density", 1.0)], loss=flipped)
    assert solution.loss == -float(len(table.units))
    assert (solution.choice == 0).all()
    with pytest.raises(SpecError, match="length 77 must be one of"):
        solve(table, [Budget("density", 0.5, (77,))])
    with pytest.raises(SpecError, match="at least one budget"):
        solve(table, [])
    with pytest.raises(SpecError, match="must price 'latency'"):
        solve(replace(table, costs={"density": table.costs["density"]}), [Budget("latency", 0.5)])
    with pytest.raises(SpecError, match="loss must be finite"):
        solve(table, [Budget("density", 0.5)], loss=np.full_like(table.loss, np.nan))


def test_all_budgets_at_one_choose_dense_unless_a_rule_helps() -> None:
    table = medium_table()
    assert (solve(table, [Budget("density", 1.0)]).choice == table.dense_index).all()
    assert solve(table, [Budget("density", 1.0)]).gap == 0.0
