"""Budgets over lanes: the Lagrangian dual of `layer_dp`, then a label search that closes what it leaves open.

    D(λ) = Σ_lanes min_path (loss + λ · cost) − λ · limit,   λ >= 0

Every λ bounds the loss from below. Its prices also give the least priced loss from any state to the end, so that a partial path (a label)
whose loss, priced cost and cost to go exceed the best known plan is dropped; so is a label that another one of the same state beats in loss
and in every cost. What is left at the end is the optimum. When a layer has more than `max_labels` labels, only the most promising stay,
and the result states the dual's gap instead of a proof.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy.optimize import linprog

from sparsesearch.errors import BudgetInfeasibleError
from sparsesearch.search.exact import silent_stdout
from sparsesearch.search.layer_dp import NONE, Lane, LanePath, cost_to_go, priced_path
from sparsesearch.search.solve import relative_gap

MAX_CUTS = 200
SLACK = 1e-12
"""Relative excess of a limit that counts as rounding."""


@dataclass(frozen=True, eq=False)
class LaneSolution:
    """The best paths found and what was proved about them; fields as in `solve.Solution`."""

    paths: tuple[LanePath, ...]
    loss: float
    cost: Float[ndarray, " K"]
    lower_bound: float
    gap: float
    solver: str


@dataclass(frozen=True, eq=False)
class _Plan:
    paths: tuple[LanePath, ...]
    loss: float
    cost: Float[ndarray, " K"]


def solve_lanes(
    lanes: Sequence[Lane], limit: Float[ndarray, " K"], *, gap_target: float = 1e-4, max_labels: int = 50_000
) -> LaneSolution:
    """Paths of all lanes with the least summed loss whose summed cost keeps every limit.

    Args:
        lanes: with the same K resources.
        limit: of the lanes' summed cost, in the same absolute units; positive.
        gap_target: relative gap at which labels are dropped; 0 asks for the optimum.
        max_labels: partial plans kept per layer.

    Raises:
        BudgetInfeasibleError: no paths keep the limits; the message gives the least cost of each resource alone.
    """
    cheapest = [_plan(lanes, np.eye(len(limit))[k], losses=False) for k in range(len(limit))]
    floor = np.array([plan.cost[k] for k, plan in enumerate(cheapest)])
    if (floor > limit * (1 + SLACK)).any():
        raise BudgetInfeasibleError(_infeasible(floor, limit))
    prices, bound, plans = _maximise(lanes, limit, cheapest)
    fitting = [plan for plan in plans if _fits(plan.cost, limit)]
    best = min(fitting, key=lambda plan: plan.loss, default=None)
    found, dropped, complete = _search(lanes, limit, prices, best, gap_target, max_labels)
    if found is None:
        raise BudgetInfeasibleError(_infeasible(floor, limit))
    lower_bound = min(max(bound, dropped if complete else bound), found.loss)
    if found.loss - lower_bound <= 1e-12 * abs(found.loss):
        lower_bound = found.loss
    solver = "layer dp" if complete else f"layer dp (labels capped at {max_labels})"
    return LaneSolution(found.paths, found.loss, found.cost, lower_bound, relative_gap(found.loss, lower_bound), solver)


def _fits(cost: ndarray, limit: Float[ndarray, " K"]) -> Bool[ndarray, "*n"]:
    return np.asarray((cost <= limit * (1 + SLACK)).all(-1))


def _plan(lanes: Sequence[Lane], price: Float[ndarray, " K"], *, losses: bool = True) -> _Plan:
    paths = tuple(priced_path(lane, price, losses=losses) for lane in lanes)
    loss = sum(path.loss(lane) for path, lane in zip(paths, lanes, strict=True))
    cost = np.sum([path.cost(lane) for path, lane in zip(paths, lanes, strict=True)], axis=0)
    return _Plan(paths, loss, cost)


def _maximise(
    lanes: Sequence[Lane], limit: Float[ndarray, " K"], plans: list[_Plan]
) -> tuple[Float[ndarray, " K"], float, list[_Plan]]:
    """Kelley's cutting planes: the best prices, D there, and every plan met."""
    plans = [*plans, _plan(lanes, np.zeros(len(limit)))]
    best_prices, best = np.zeros(len(limit)), plans[-1].loss
    for _ in range(MAX_CUTS):
        excess = np.array([(plan.cost - limit) / limit for plan in plans])  # prices in loss per share of the limit
        losses = np.array([plan.loss for plan in plans])
        scale = max(float(np.abs(losses).max()), 1e-300)
        with silent_stdout():
            master = linprog(
                np.append(np.zeros(len(limit)), -1.0),
                A_ub=np.c_[-excess, np.ones(len(plans))],
                b_ub=losses / scale,
                bounds=[(0, 1e9)] * len(limit) + [(None, None)],
            )
        if master.x is None or master.fun is None:  # the numbers are too extreme for HiGHS: keep the best prices so far
            break
        prices = master.x[:-1] * scale / limit
        plan = _plan(lanes, prices)
        value = plan.loss + float(prices @ (plan.cost - limit))
        if value > best:
            best_prices, best = prices, value
        if -master.fun * scale - best <= 1e-9 * scale:
            break
        plans.append(plan)
    return best_prices, best, plans


@dataclass(frozen=True, eq=False)
class _Labels:
    """Partial plans of equally many layers: the state held, what they lost and cost, and how each came about."""

    state: Int[ndarray, " n"]
    loss: Float[ndarray, " n"]
    cost: Float[ndarray, "n K"]
    parent: Int[ndarray, " n"]
    candidate: Int[ndarray, " n"]
    source: Int[ndarray, " n"]

    def take(self, index: ndarray) -> "_Labels":
        return _Labels(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    @staticmethod
    def join(parts: Sequence["_Labels"]) -> "_Labels":
        return _Labels(
            *(np.concatenate([getattr(part, name) for part in parts]) for name in _Labels.__dataclass_fields__)
        )


def _search(
    lanes: Sequence[Lane],
    limit: Float[ndarray, " K"],
    prices: Float[ndarray, " K"],
    best: _Plan | None,
    gap_target: float,
    max_labels: int,
) -> tuple[_Plan | None, float, bool]:
    """The optimum, or `best` when nothing promises to beat it by more than half the target.

    Returns:
        The plan, the least that any label dropped for its promise could have lost, and whether no label was lost to the cap.
    """
    priced = [cost_to_go(lane, prices) for lane in lanes]
    least = [np.stack([cost_to_go(lane, unit, losses=False) for unit in np.eye(len(limit))], -1) for lane in lanes]
    later = np.cumsum([0.0, *(value[0, -1] for value in priced[:0:-1])])[::-1]
    later_cost = np.cumsum([0 * limit, *(value[0, -1] for value in least[:0:-1])], axis=0)[::-1]
    bar = np.inf if best is None else best.loss - 0.5 * gap_target * abs(best.loss)
    none = np.array([lanes[0].num_states - 1])
    zero = np.zeros(1, dtype=np.int64)
    labels = _Labels(none, np.zeros(1), np.zeros((1, len(limit))), zero, zero, zero)
    steps, dropped, complete = [], np.inf, True
    for index, lane in enumerate(lanes):
        labels = labels.take(np.arange(len(labels.loss)))
        labels.state[:] = lane.num_states - 1  # a lane begins with nothing held
        for layer in range(lane.num_layers):
            labels = _extend(lane, layer, labels)
            ahead = priced[index][layer + 1][labels.state] + later[index]
            promise = labels.loss + labels.cost @ prices + ahead - float(prices @ limit)
            rest = labels.cost + least[index][layer + 1][labels.state] + later_cost[index]
            feasible = _fits(rest, limit)
            dropped = min(dropped, float(promise[feasible & (promise >= bar)].min(initial=np.inf)))
            labels, promise = _kept(labels, promise, feasible & (promise < bar), lane, layer)
            if len(labels.loss) > max_labels:
                complete = False
                labels = labels.take(np.sort(np.argpartition(promise, max_labels)[:max_labels]))
            if not len(labels.loss):
                return best, dropped, complete
            steps.append(labels)
    winner = int(labels.loss.argmin())
    return _trace(lanes, steps, winner), dropped, complete


def _extend(lane: Lane, layer: int, labels: _Labels) -> _Labels:
    """Every label by every move: a candidate, held or not, or a reuse of what it holds."""
    emitting, parents, parts = len(lane.emitters), np.arange(len(labels.loss)), []
    for candidate in np.flatnonzero(np.isfinite(lane.loss[layer])):
        loss, cost = labels.loss + lane.loss[layer, candidate], labels.cost + lane.cost[layer, candidate]
        states = [labels.state]
        if candidate in lane.emitters:
            states.append(np.full_like(labels.state, layer * emitting + lane.emitters.index(candidate)))
        none, own = np.full_like(labels.state, NONE), np.full_like(labels.state, candidate)
        parts += [_Labels(state, loss, cost, parents, own, none) for state in states]
    if emitting and layer:
        source, emitter = np.divmod(labels.state, emitting)
        holding = np.flatnonzero(labels.state != lane.num_states - 1)
        holding = holding[np.isfinite(lane.reuse_loss[source[holding], emitter[holding], layer])]
        held = labels.take(holding)
        source, emitter = source[holding], emitter[holding]
        loss = held.loss + lane.reuse_loss[source, emitter, layer]
        cost = held.cost + lane.reuse_cost[source, emitter, layer]
        parts.append(_Labels(held.state, loss, cost, parents[holding], np.array(lane.emitters)[emitter], source))
    return _Labels.join(parts)


def _kept(
    labels: _Labels, promise: Float[ndarray, " n"], worthwhile: Bool[ndarray, " n"], lane: Lane, layer: int
) -> tuple[_Labels, Float[ndarray, " n"]]:
    """Labels that promise enough and that no other label of the same state beats; at a lane's end all states are one."""
    index = np.flatnonzero(worthwhile)
    state = labels.state[index] if layer + 1 < lane.num_layers else np.zeros(len(index), dtype=np.int64)
    order = np.lexsort((*labels.cost[index].T, labels.loss[index], state))
    index, state = index[order], state[order]
    bounds = np.flatnonzero(np.diff(state, prepend=-1, append=np.iinfo(np.int64).max))
    kept = [index[first:end][_undominated(labels.cost[index[first:end]])] for first, end in pairwise(bounds)]
    index = np.concatenate(kept) if kept else index
    return labels.take(index), promise[index]


def _undominated(cost: Float[ndarray, "n K"]) -> Bool[ndarray, " n"]:
    """Rows, in order of rising loss, that are cheaper in some resource than every row kept before them."""
    if cost.shape[1] == 1:
        before = np.minimum.accumulate(np.append(np.inf, cost[:-1, 0]))
        return np.asarray(cost[:, 0] < before)
    keep = np.zeros(len(cost), dtype=bool)
    front = np.empty((0, cost.shape[1]))
    for row, own in enumerate(cost):
        if not (front <= own).all(1).any():
            keep[row] = True
            front = np.concatenate([front[~(own <= front).all(1)], own[None]])
    return keep


def _trace(lanes: Sequence[Lane], steps: Sequence[_Labels], winner: int) -> _Plan:
    """Follow a label back to the first layer of the first lane."""
    candidate, source, index = [], [], winner
    for labels in reversed(steps):
        candidate.append(int(labels.candidate[index]))
        source.append(int(labels.source[index]))
        index = int(labels.parent[index])
    sizes = np.cumsum([0, *(lane.num_layers for lane in lanes)])
    chosen, sources = np.array(candidate[::-1]), np.array(source[::-1])
    paths = tuple(LanePath(chosen[a:b], sources[a:b]) for a, b in pairwise(sizes))
    return _Plan(paths, float(steps[-1].loss[winner]), np.asarray(steps[-1].cost[winner]))


def _infeasible(floor: Float[ndarray, " K"], limit: Float[ndarray, " K"]) -> str:
    least = ", ".join(
        f"{value / bound:.4g} of limit {index}" for index, (value, bound) in enumerate(zip(floor, limit, strict=True))
    )
    return f"some plan must keep every limit, but the cheapest paths use {least}. Raise the budget."
