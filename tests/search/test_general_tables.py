"""Tables beyond heads and lengths: ragged menus, metrics without a length, fixed costs, absolute budgets."""

import contextlib

import numpy as np
import pytest

from sparsesearch.errors import BudgetInfeasibleError, SpecError
from sparsesearch.scores import WHOLE, ScoreTable
from sparsesearch.search.budget import Budget
from sparsesearch.search.exhaustive import solve_exhaustive
from sparsesearch.search.knapsack import TOLERANCE
from sparsesearch.search.solve import solve
from sparsesearch.search.speed import video_table
from sparsesearch.shapes import Unit

HEAD = Unit("layers.0.self_attn", (0,))


def pruning_table() -> ScoreTable:
    """A head with two rules and an MLP with two widths; column 0 is the unmodified model."""
    return ScoreTable(
        units=(HEAD, ("layers.0.mlp", "width")),
        candidates=("dense", "window", "width=0.5", "width=0.25"),
        lengths=(1024, 4096),
        loss=np.array([[0.0, 2.0, np.nan, np.nan], [0.0, np.nan, 1.0, 5.0]]),
        costs={
            "latency": np.array([[[4.0, 40], [2, 10], [0, 0], [0, 0]], [[6.0, 20], [0, 0], [3, 10], [2, 5]]]),
            "params": np.array([[[100.0], [100], [0], [0]], [[300.0], [0], [150], [75]]]),
        },
        dense_index=0,
        valid=np.array([[True, True, False, False], [True, False, True, True]]),
        points={"params": (WHOLE,)},
        fixed={"params": np.array([100.0])},
    )


def random_table(seed: int) -> tuple[ScoreTable, list[Budget]]:
    """Ragged menus, a metric per length (one of them twice), one priced once, fixed costs, shares and amounts."""
    rng = np.random.default_rng(seed)
    num_units, num_candidates = int(rng.integers(1, 6)), int(rng.integers(2, 6))
    shape = (num_units, num_candidates)
    valid = rng.random(shape) < 0.7
    valid[:, 0] = True
    loss = np.where(valid, rng.lognormal(0, 2, shape), np.nan)
    loss[:, 0] = 0.0
    costs = {"ttft": rng.random((*shape, 3)), "params": rng.integers(0, 9, (*shape, 1)).astype(float)}
    for cost in costs.values():
        cost[:, 0] += 1.0
    fixed = {"ttft": rng.random(3)} if rng.random() < 0.5 else {}
    points = {"ttft": (512, 2048, 2048), "params": (WHOLE,)}
    labels = tuple(f"c{index}" for index in range(num_candidates))
    table = ScoreTable(tuple(range(num_units)), labels, (512,), loss, costs, 0, valid, points, fixed)
    bound = float(rng.uniform(0.3, 1))
    ttft = Budget("ttft", bound, (2048,))
    if rng.random() < 0.5:
        ttft = Budget("ttft", bound * float(table.dense_cost("ttft").max()), absolute=True)
    return table, [ttft, Budget("params", float(rng.uniform(0.3, 1)))]


def test_equals_exhaustive_on_ragged_tables() -> None:
    infeasible = 0
    for seed in range(100):
        table, budgets = random_table(seed)
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
        for budget in budgets:
            for length, value in table.used(budget.metric, found.choice, absolute=budget.absolute).items():
                assert not budget.holds_at(length) or value <= budget.bound * (1 + 1e-9) + TOLERANCE
    assert 5 <= infeasible <= 80


def test_units_of_different_kinds_share_a_budget() -> None:
    table = pruning_table()
    assert solve(table, [Budget("latency", 0.7)]).choice.tolist() == [1, 2]  # 20/60 at 4096, 5/10 at 1024
    assert solve(table, [Budget("latency", 0.7, (1024,))]).choice.tolist() == [0, 2]
    assert solve(table, [Budget("params", 0.7)]).choice.tolist() == [0, 2]
    assert solve(table, [Budget("params", 280.0, absolute=True)]).choice.tolist() == [0, 3]


def test_what_no_choice_changes_counts_in_shares_and_amounts() -> None:
    table = pruning_table()
    solution = solve(table, [Budget("params", 0.7)])
    assert solution.used["params"] == {WHOLE: pytest.approx((100 + 150 + 100) / 500)}
    assert table.used("params", solution.choice, absolute=True) == {WHOLE: pytest.approx(350)}
    with pytest.raises(BudgetInfeasibleError, match=r"params=275\b"):
        solve(table, [Budget("params", 150.0, absolute=True)])
    with pytest.raises(BudgetInfeasibleError, match=r"params=0\.55\b"):
        solve(table, [Budget("params", 0.5)])


def test_a_malformed_table_is_refused() -> None:
    table = pruning_table()
    with pytest.raises(SpecError, match="cost 'latency' must have shape"):
        ScoreTable(table.units, table.candidates, (1,), table.loss, table.costs, 0, table.valid)
    with pytest.raises(SpecError, match="name 'memory'"):
        ScoreTable(
            table.units, table.candidates, table.lengths, table.loss, table.costs, 0, table.valid,
            {**table.points, "memory": (WHOLE,)},
        )  # fmt: skip
    with pytest.raises(SpecError, match=r"length 77 must be one of the priced lengths \[1024, 4096\]"):
        solve(table, [Budget("latency", 0.5, (77,))])


def test_thousands_of_equal_units_are_no_obstacle() -> None:
    """All units of a step alike: every Lagrangian minimiser is far from the limit, on one side or the other."""
    base = video_table(20, 1, 1)
    rows = np.repeat(np.arange(20), 500)
    table = ScoreTable(
        tuple(range(len(rows))), base.candidates, (), base.loss[rows], {m: c[rows] for m, c in base.costs.items()},
        base.dense_index, base.valid[rows], base.points,
    )  # fmt: skip
    for budgets in ([Budget("density", 0.25)], [Budget("density", 0.25), Budget("latency", 0.27)]):
        solution = solve(table, budgets, time_limit_s=5)
        assert solution.gap <= 1e-4
        assert all(solution.used[budget.metric][WHOLE] <= budget.bound + TOLERANCE for budget in budgets)


def test_a_smaller_video_schedule_is_monotone_in_its_budget() -> None:
    table = video_table(10, 12, 8)
    losses = []
    for bound in (0.1, 0.2, 0.4):
        with contextlib.suppress(BudgetInfeasibleError):
            losses.append(solve(table, [Budget("density", bound)], gap_target=1e-6).loss)
    assert len(losses) == 3
    assert losses == sorted(losses, reverse=True)
