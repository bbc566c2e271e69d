"""Plans of lanes within the limits: who reuses whom is taken from a path of the dual, what every layer runs is searched anew.

Once it is fixed which layers leave a selection and which one is held where, a layer's choice no longer touches another layer's: the layers of
all lanes are the units of a multiple-choice knapsack, whose Lagrangian repair and exchanges (`solve.bounded_plan`) come within a small
multiple of one unit's step of the bound. Paths at the dual's best prices differ in few places, so a handful of them suffice.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from sparsesearch.search.knapsack import Knapsack, reduced
from sparsesearch.search.lagrangian import Cuts
from sparsesearch.search.layer_dp import NONE, Lane, LanePath
from sparsesearch.search.solve import bounded_plan, certify

TIME_LIMIT_S = 1.0
"""Of HiGHS, per knapsack."""


def within_limits(
    lanes: Sequence[Lane], paths: Sequence[LanePath], limit: Float[ndarray, " K"], *, tolerance: float
) -> tuple[LanePath, ...] | None:
    """The best paths found that hold what `paths` hold, layer by layer, and keep the limits; None where there are none.

    Args:
        lanes: with the same K resources.
        paths: one per lane.
        limit: of the summed cost.
        tolerance: relative, of the knapsack's bound.
    """
    problem = _knapsack(lanes, paths, limit)
    floor = _cheapest(problem)
    if not problem.fits(floor):
        return None
    choice, _, _ = certify(problem, bounded_plan(problem, floor, Cuts(), tolerance=tolerance), tolerance, TIME_LIMIT_S)
    if not problem.fits(choice):
        return None
    chosen = problem.restore(choice)
    bounds = np.cumsum([0, *(lane.num_layers for lane in lanes)])
    return tuple(
        _path(lane, path, chosen[first:last])
        for lane, path, first, last in zip(lanes, paths, bounds, bounds[1:], strict=False)
    )


def _knapsack(lanes: Sequence[Lane], paths: Sequence[LanePath], limit: Float[ndarray, " K"]) -> Knapsack:
    """Units: layers, lane after lane. Candidates: the menu, then the reuse of what is held."""
    losses, costs = [], []
    for lane, path in zip(lanes, paths, strict=True):
        held, sources = _held(lane, path), {source: emitter for _, source, emitter in path.reads}
        for layer in range(lane.num_layers):
            loss, cost = lane.loss[layer], lane.cost[layer]
            reuse, spent, own = np.inf, np.zeros(len(limit)), held[layer]
            if layer in sources:  # a later layer reads it: it stays
                loss = np.where(np.arange(len(loss)) == sources[layer], loss, np.inf)
            elif own is not None:
                reuse, spent = lane.reuse_loss[own[0], own[1], layer], lane.reuse_cost[own[0], own[1], layer]
            losses.append(np.append(loss, reuse))
            costs.append(np.concatenate([cost, spent[None]]))
    loss = np.array(losses)
    use = np.moveaxis(np.array(costs), -1, 0) / limit[:, None, None]
    finite = np.where(np.isfinite(loss), use, 0.0)
    return replace(reduced(loss, finite, None), limit=np.ones(len(limit)))


def _held(lane: Lane, path: LanePath) -> list[tuple[int, int] | None]:
    """(layer, place among the emitters) of the selection each layer could reuse: that of the last source before it."""
    held: list[tuple[int, int] | None] = []
    last, sources = None, {source: emitter for _, source, emitter in path.reads}
    for layer in range(lane.num_layers):
        held.append(last)
        if layer in sources:
            last = layer, lane.emitters.index(sources[layer])
    return held


def _cheapest(problem: Knapsack) -> Int[ndarray, " U"]:
    """A plan of small largest use: prices of the constraints move towards the one that is exceeded most."""
    weight = np.ones(len(problem.limit))
    best = None
    for _ in range(32):
        priced = np.where(problem.allowed, np.tensordot(weight, problem.use, 1), np.inf)
        choice = np.asarray(priced.argmin(1))
        use = problem.use_of(choice)
        if best is None or use.max() < problem.use_of(best).max():
            best = choice
        if use.max() <= 1.0:
            break
        weight = weight * np.exp(np.clip(use - use.mean(), -1, 1))
    assert best is not None
    return best


def _path(lane: Lane, path: LanePath, chosen: Int[ndarray, " L"]) -> LanePath:
    """Menu places and the extra candidate as a path."""
    held, menu = _held(lane, path), lane.loss.shape[1]
    candidate, source = chosen.copy(), np.full(lane.num_layers, NONE)
    for layer in np.flatnonzero(chosen == menu):
        own = held[layer]
        assert own is not None, "only what is held is reused"
        source[layer], candidate[layer] = own[0], lane.emitters[own[1]]
    return LanePath(candidate, source)
