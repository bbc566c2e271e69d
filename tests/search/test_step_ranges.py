"""Step ranges: against all segmentations and choices on small tables, bounds, groups, and the paper's own choice."""

from itertools import combinations, product

import numpy as np
import pytest

from sparsesearch.errors import BudgetInfeasibleError, SpecError
from sparsesearch.search.step_ranges import StepTable, solve_steps
from sparsesearch.search.threshold import threshold_choice
from sparsesearch.shapes import Unit


def table(slices: int = 4, layers: int = 1, heads: int = 2, candidates: int = 3, seed: int = 0) -> StepTable:
    rng = np.random.default_rng(seed)
    tiles = np.sort(rng.integers(1, 20, (layers * heads, candidates)), 1)[:, ::-1].astype(float)
    tiles[:, 0], tiles[:, -1] = 20.0, rng.integers(1, 6, layers * heads)
    loss = rng.random((slices, layers * heads, candidates)) * rng.lognormal(0, 1, (1, layers * heads, 1))
    loss[..., 0] = 0.0
    return StepTable(
        slices=tuple((2 * i, 2 * i + 2) for i in range(slices)),
        units=tuple(Unit(f"layer.{i}", (h,)) for i in range(layers) for h in range(heads)),
        candidates=("dense", *(f"rule{c}" for c in range(1, candidates))),
        loss=loss,
        tiles=tiles,
        dense_index=0,
        group=tuple(range(candidates)),
    )


def brute(data: StepTable, density: float, max_ranges: int, max_groups: int | None = None) -> float:
    """Least loss over every segmentation and every choice."""
    count, best = len(data.slices), np.inf
    units, options = data.tiles.shape
    for used in range(1, max_ranges + 1):
        for inner in combinations(range(1, count), used - 1):
            cuts = list(zip((0, *inner), (*inner, count), strict=True))
            losses = [data.loss[a:b].sum(0) for a, b in cuts]
            steps = [data.steps[a:b].sum() for a, b in cuts]
            rows = [
                row
                for row in product(range(options), repeat=units)
                if max_groups is None or len(set(row) - {0}) <= max_groups  # one layer; groups are candidates
            ]
            for chosen in product(rows, repeat=used):
                loss = sum(losses[r][range(units), row].sum() for r, row in enumerate(chosen))
                spent = sum(steps[r] * data.tiles[range(units), row].sum() for r, row in enumerate(chosen))
                if spent <= density * data.dense_tiles * (1 + 1e-9):
                    best = min(best, loss)
    return float(best)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("max_ranges", [1, 2, 3])
def test_close_to_every_plan_there_is_and_never_above_its_bound(seed: int, max_ranges: int) -> None:
    data = table(seed=seed)
    found = solve_steps(data, 0.5, max_ranges=max_ranges)
    best = brute(data, 0.5, max_ranges)
    assert found.density <= 0.5 + 1e-9
    assert len(found.ranges) <= max_ranges
    assert found.lower_bound <= best + 1e-9 <= found.loss + 1e-6
    assert found.loss <= best + (found.loss - found.lower_bound) + 1e-9
    chosen = sum(
        data.loss[a // 2 : b // 2].sum(0)[range(2), row].sum()
        for (a, b), row in zip(found.ranges, found.choice, strict=True)
    )
    assert found.loss == pytest.approx(chosen)


def test_every_slice_its_own_is_the_plain_knapsack() -> None:
    data = table(slices=3)
    assert solve_steps(data, 0.5).loss == pytest.approx(brute(data, 0.5, 3), rel=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_groups_are_limited_per_layer(seed: int) -> None:
    data = table(slices=2, heads=3, candidates=4, seed=seed)
    found = solve_steps(data, 0.4, max_ranges=1, max_groups=1)
    assert len(set(found.choice[0].tolist()) - {0}) <= 1
    best = brute(data, 0.4, 1, 1)
    assert found.lower_bound <= best + 1e-9 <= found.loss + 1e-6
    assert solve_steps(data, 0.4, max_ranges=1).loss <= found.loss + 1e-9


def test_larger_tables_close_the_gap() -> None:
    data = table(slices=12, layers=6, heads=8, candidates=6, seed=3)
    for ranges, bar in ((1, 0.01), (3, 0.02), (12, 0.002)):
        found = solve_steps(data, 0.4, max_ranges=ranges)
        assert found.gap <= bar
        assert found.ranges[0][0] == 0
        assert found.ranges[-1][1] == 24
    assert solve_steps(data, 0.4, max_ranges=3).loss >= solve_steps(data, 0.4, max_ranges=12).lower_bound


def test_a_planted_change_of_pattern_is_found() -> None:
    """Rule 1 is free of loss in the first 6 steps, rule 2 in the rest."""
    data = table(slices=8, heads=4)
    loss = np.ones_like(data.loss)
    loss[..., 0] = 0.0
    loss[:3, :, 1] = 0.0
    loss[3:, :, 2] = 0.0
    planted = StepTable(
        data.slices, data.units, data.candidates, loss, np.broadcast_to([20.0, 5.0, 5.0], (4, 3)).copy(), 0
    )
    found = solve_steps(planted, 0.25, max_ranges=2)
    assert found.loss == 0.0
    assert found.ranges == ((0, 6), (6, 16))
    schedule = found.schedule(planted)
    assert schedule.assignments(0) == {"layer.0": ("rule1",) * 4}
    assert schedule.assignments(1) == {"layer.0": ("rule2",) * 4}


def test_what_cannot_be_is_refused() -> None:
    data = table()
    with pytest.raises(BudgetInfeasibleError, match="at least"):
        solve_steps(data, 0.001)
    with pytest.raises(SpecError, match="token order"):
        solve_steps(StepTable(data.slices, data.units, data.candidates, data.loss, data.tiles, 0), 0.5, max_groups=1)
    with pytest.raises(SpecError, match="follow one another"):
        StepTable(((0, 2), (3, 4)), data.units, data.candidates, data.loss[:2], data.tiles, 0)


def test_sparse_vdit_takes_the_least_and_dense_above_the_threshold() -> None:
    error = np.array([[0.0, 0.3, 0.1], [0.0, 2.0, 1.5], [0.0, 0.05, 0.5]])
    density = np.array([[1.0, 0.2, 0.8]] * 3)
    assert threshold_choice(error, density, dense_index=0).tolist() == [1, 0, 1]
    assert threshold_choice(error, density, dense_index=0, weight=0.0).tolist() == [2, 0, 1]
    assert threshold_choice(error, density, dense_index=0, threshold=5.0).tolist() == [1, 2, 1]
    with pytest.raises(SpecError, match="besides dense"):
        threshold_choice(error[:, :1], density[:, :1], dense_index=0)
