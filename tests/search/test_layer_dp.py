"""The dynamic programmes over layers against brute force, 2,000 random instances each."""

import itertools
from functools import lru_cache

import numpy as np
import pytest

from sparsesearch.errors import BudgetInfeasibleError, SpecError
from sparsesearch.search.layer_budget import solve_lanes
from sparsesearch.search.layer_dp import NONE, Lane, LanePath, priced_path
from sparsesearch.search.overlap_paths import hylra_path, rals_path

NUM_INSTANCES = 2000


@lru_cache
def sources_of_all_paths(num_layers: int) -> np.ndarray:
    """[2^(L-1), L]: for every set of refreshing layers, whose selection each layer runs."""
    refreshes = np.array([(True, *rest) for rest in itertools.product([False, True], repeat=num_layers - 1)])
    return np.maximum.accumulate(np.where(refreshes, np.arange(num_layers), 0), axis=1)


def overlaps_of_all_paths(overlap: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[paths, L] overlaps (1 where a layer refreshes), and the number of refreshes."""
    source = sources_of_all_paths(len(overlap))
    layers = np.arange(len(overlap))
    fresh = source == layers
    return np.where(fresh, 1.0, overlap[source, layers]), fresh.sum(1)


def random_overlap(rng: np.random.Generator) -> np.ndarray:
    overlap = rng.random((size := int(rng.integers(1, 9)), size))
    return np.round(overlap, 1) if rng.random() < 0.3 else overlap  # ties too


def test_hylra_equals_brute_force() -> None:
    rng = np.random.default_rng(0)
    for _ in range(NUM_INSTANCES):
        overlap, threshold = random_overlap(rng), float(np.round(rng.random(), 2))
        values, count = overlaps_of_all_paths(overlap)
        allowed = (values >= threshold).all(1)
        fewest = count[allowed].min()
        best = values.sum(1)[allowed & (count == fewest)].max()
        found = hylra_path(overlap, threshold)
        assert found.num_refreshes == fewest
        assert found.total == pytest.approx(best, abs=1e-12)
        assert found.least >= threshold


def test_rals_equals_brute_force() -> None:
    rng = np.random.default_rng(1)
    for _ in range(NUM_INSTANCES):
        overlap, cap = random_overlap(rng), int(rng.integers(0, 5))
        values, count = overlaps_of_all_paths(overlap)
        allowed = count <= cap + 1
        least = values.min(1)[allowed].max()
        best = values.sum(1)[allowed & (values.min(1) >= least)].max()
        found = rals_path(overlap, cap)
        assert found.least == least
        assert found.total == pytest.approx(best, abs=1e-12)
        assert found.num_refreshes <= cap + 1


def test_single_pass_of_the_published_code_is_not_optimal() -> None:
    """Layer 5 makes every least overlap 0.5, so the better least overlap of a prefix was worth nothing."""
    overlap = np.zeros((6, 6))
    overlap[1, 2], overlap[1, 3] = 0.8, 1.0
    overlap[0, 1], overlap[2, 3] = 0.85, 0.85
    overlap[4, 5] = 0.5
    assert _published(overlap, 2) == pytest.approx((0.5, 5.2))
    found = rals_path(overlap, 2)
    assert (found.least, found.total) == pytest.approx((0.5, 5.3))
    assert found.source.tolist() == [0, 1, 1, 1, 4, 4]


def _published(overlap: np.ndarray, cap: int) -> tuple[float, float]:
    states = {(0, 0): (1.0, 1.0)}
    for layer in range(1, len(overlap)):
        new: dict[tuple[int, int], tuple[float, float]] = {}
        for (source, used), (least, total) in states.items():
            moves = [((source, used), overlap[source, layer])]
            if used < cap:
                moves.append(((layer, used + 1), 1.0))
            for state, value in moves:
                new[state] = max(new.get(state, (-1.0, 0.0)), (min(least, value), total + value))
        states = new
    return max(states.values())


@lru_cache
def move_table(layers: int, menu: int, emitters: tuple[int, ...]) -> tuple[np.ndarray, list[LanePath]]:
    """Every path of a small lane, as indices into [own losses, reuse losses] flattened one after the other."""
    emitting, rows, paths = len(emitters), [], []
    for moves in itertools.product([*range(menu), *(-1 - e for e in range(emitting)), None], repeat=layers):
        row, candidate, source, held = [], [], [], None
        for layer, move in enumerate(moves):
            if move is None:
                if held is None:
                    break
                row.append(layers * menu + (held[0] * emitting + held[1]) * layers + layer)
                candidate.append(emitters[held[1]])
                source.append(held[0])
                continue
            own = move if move >= 0 else emitters[-1 - move]
            row.append(layer * menu + own)
            candidate.append(own)
            source.append(NONE)
            held = held if move >= 0 else (layer, -1 - move)
        else:
            rows.append(row)
            paths.append(LanePath(np.array(candidate), np.array(source)))
    return np.array(rows), paths


def random_lane(rng: np.random.Generator, layers: int, menu: int, emitters: tuple[int, ...], resources: int) -> Lane:
    loss = rng.exponential(size=(layers, menu))
    loss[:, 0] = 0.0  # dense
    loss[:, 1:][rng.random((layers, menu - 1)) < 0.1] = np.inf
    cost = rng.integers(1, 12, (layers, menu, resources)).astype(float)
    cost[:, 0] = 12.0
    reuse = rng.exponential(size=(layers, len(emitters), layers))
    lower = np.arange(layers)[:, None, None] >= np.arange(layers)
    reuse = np.where(lower | (rng.random(reuse.shape) < 0.2), np.inf, reuse)
    reuse_cost = rng.integers(0, 6, (layers, len(emitters), layers, resources)).astype(float)
    return Lane(loss, cost, emitters, reuse, reuse_cost)


def flat(own: np.ndarray, reused: np.ndarray) -> np.ndarray:
    return np.concatenate([own.reshape(-1, *own.shape[2:]), reused.reshape(-1, *reused.shape[3:])])


def brute_force(lane: Lane) -> tuple[np.ndarray, np.ndarray]:
    """Loss and cost of every path."""
    rows, _ = move_table(*lane.loss.shape, lane.emitters)
    return flat(lane.loss, lane.reuse_loss)[rows].sum(1), flat(lane.cost, lane.reuse_cost)[rows].sum(1)


def test_priced_path_equals_brute_force() -> None:
    rng = np.random.default_rng(2)
    for index in range(NUM_INSTANCES):
        layers, emitters = [(4, (2,)), (3, (1, 2)), (1, (1,)), (4, ())][index % 4]
        lane = random_lane(rng, layers, 3, emitters, 2)
        price = rng.exponential(0.2, size=2)
        losses, costs = brute_force(lane)
        found = priced_path(lane, price)
        assert found.loss(lane) + found.cost(lane) @ price == pytest.approx((losses + costs @ price).min(), rel=1e-12)


@pytest.mark.parametrize("resources", [1, 2])
def test_budgeted_lanes_equal_brute_force(resources: int) -> None:
    rng = np.random.default_rng(3)
    infeasible = solved = 0
    for index in range(NUM_INSTANCES // 20):
        layers, emitters = [(3, (2,)), (3, (1, 2)), (1, (1,)), (3, ())][index % 4]
        lanes = [random_lane(rng, layers, 3, emitters, resources) for _ in range(2)]
        limit = 12.0 * layers * len(lanes) * rng.uniform(0.1, 0.9, resources)
        (loss_a, cost_a), (loss_b, cost_b) = (_front(*brute_force(lane)) for lane in lanes)
        total = loss_a[:, None] + loss_b
        fits = (cost_a[:, None] + cost_b <= limit * (1 + 1e-12)).all(-1) & np.isfinite(total)
        if not fits.any():
            infeasible += 1
            with pytest.raises(BudgetInfeasibleError, match="Raise the budget"):
                solve_lanes(lanes, limit)
            continue
        solved += 1
        found = solve_lanes(lanes, limit, gap_target=0.0)
        assert found.loss == pytest.approx(total[fits].min(), rel=1e-12, abs=1e-12)
        assert found.gap == 0.0
        assert (found.cost <= limit * (1 + 1e-9)).all()
        parts = list(zip(found.paths, lanes, strict=True))
        assert sum(path.loss(lane) for path, lane in parts) == pytest.approx(found.loss, rel=1e-12, abs=1e-12)
        assert sum(path.cost(lane) for path, lane in parts) == pytest.approx(found.cost)
    assert min(infeasible, solved) > 20


def _front(loss: np.ndarray, cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finite paths, the cheapest loss per distinct cost: enough for an exact join of two lanes."""
    index = np.lexsort((loss, *cost.T))
    first = np.append(True, (np.diff(cost[index], axis=0) != 0).any(1))
    index = index[first]
    return loss[index], cost[index]


def test_capped_labels_state_an_honest_gap() -> None:
    rng = np.random.default_rng(4)
    lanes = [random_lane(rng, 6, 6, (2, 4), 1) for _ in range(3)]
    limit = np.array([70.0])
    exact = solve_lanes(lanes, limit, gap_target=0.0)
    capped = solve_lanes(lanes, limit, gap_target=0.0, max_labels=3)
    assert "capped" in capped.solver
    assert capped.lower_bound <= exact.loss <= capped.loss
    assert exact.gap == 0.0


def test_larger_budgets_never_lose_more() -> None:
    lanes = [random_lane(np.random.default_rng(5 + index), 8, 5, (2, 3), 1) for index in range(4)]
    losses = [solve_lanes(lanes, np.array([bound])).loss for bound in np.linspace(80, 12.0 * 32, 12)]
    assert all(b <= a * (1 + 1e-4) for a, b in itertools.pairwise(losses))
    assert losses[-1] == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reuse_loss": np.zeros((2, 1, 2))}, "earlier layer"),
        ({"loss": np.full((2, 3), np.inf)}, "finite loss"),
        ({"cost": np.full((2, 3, 1), -1.0)}, "not negative"),
        ({"loss": np.zeros((3, 3))}, "shapes"),
    ],
)
def test_malformed_lanes_are_refused(change: dict[str, np.ndarray], message: str) -> None:
    fields = {
        "loss": np.zeros((2, 3)),
        "cost": np.ones((2, 3, 1)),
        "emitters": (1,),
        "reuse_loss": np.full((2, 1, 2), np.inf),
        "reuse_cost": np.ones((2, 1, 2, 1)),
    }
    with pytest.raises(SpecError, match=message):
        Lane(**{**fields, **change})


def test_bad_thresholds_are_refused() -> None:
    with pytest.raises(SpecError, match="threshold"):
        hylra_path(np.ones((2, 2)), 1.5)
    with pytest.raises(SpecError, match="max_refreshes"):
        rals_path(np.ones((2, 2)), -1)


def deep_lanes(layers: int, count: int, resources: int) -> list[Lane]:
    """Lanes that resemble a profile: losses fall with cost, reuse spans a few layers."""
    rng, menu, span = np.random.default_rng(6), 24, 6
    lanes = []
    for _ in range(count):
        share = np.clip(
            np.geomspace(0.02, 0.9, menu - 1)[None, :, None] * rng.lognormal(0, 0.2, (layers, menu - 1, resources)),
            0.003,
            1,
        )
        cost = np.concatenate([np.ones((layers, 1, resources)), share], 1)
        sensitivity, steepness = rng.lognormal(0, 1.5, (layers, 1)), rng.uniform(0.3, 1.5, (layers, 1))
        loss = sensitivity * (cost.mean(-1) ** -steepness - 1) * rng.lognormal(0, 0.3, (layers, menu))
        loss[:, 0] = 0.0
        reuse, spent = np.full((layers, 1, layers), np.inf), np.zeros((layers, 1, layers, resources))
        for source in range(layers):
            for target in range(source + 1, min(layers, source + span + 1)):
                fit = rng.lognormal(-0.3, 0.4) * (1 + 0.05 * (target - source))
                reuse[source, 0, target] = (sensitivity[target] * (0.1 ** -steepness[target] - 1)).item() * fit
                spent[source, 0, target] = 0.1 * rng.lognormal(0, 0.05, resources)
        lanes.append(Lane(loss, cost, (0,), reuse, spent))
    return lanes


@pytest.mark.parametrize("layers", [32, 80])
def test_deep_models_under_two_limits_take_seconds(layers: int) -> None:
    lanes = deep_lanes(layers, 8, 2)
    limit = np.array([0.2, 0.22]) * layers * len(lanes)
    found = solve_lanes(lanes, limit)
    assert found.gap <= 1e-4
    assert (found.cost <= limit * (1 + 1e-9)).all()
    assert sum(path.loss(lane) for path, lane in zip(found.paths, lanes, strict=True)) == pytest.approx(found.loss)
    assert any((path.source != NONE).any() for path in found.paths)
    assert found.lower_bound <= found.loss


def test_limits_that_hold_alone_but_not_together_are_infeasible() -> None:
    lane = Lane(np.zeros((1, 2)), np.array([[[1.0, 9.0], [9.0, 1.0]]]), (), np.zeros((1, 0, 1)), np.zeros((1, 0, 1, 2)))
    with pytest.raises(BudgetInfeasibleError, match="Raise the budget"):
        solve_lanes([lane], np.array([2.0, 2.0]))
