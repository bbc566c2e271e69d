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
from time import monotonic

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from sparsesearch.errors import BudgetInfeasibleError
from sparsesearch.search.lagrangian import ROUNDING, Cuts, ascend
from sparsesearch.search.layer_dp import NONE, Lane, LanePath, cost_to_go, priced_path
from sparsesearch.search.layer_primal import within_limits
from sparsesearch.search.solve import relative_gap

MAX_RIVALS = 512
MOST_SKELETONS = 12
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
    lanes: Sequence[Lane],
    limit: Float[ndarray, " K"],
    *,
    gap_target: float = 1e-4,
    max_labels: int = 50_000,
    time_limit_s: float = 10.0,
) -> LaneSolution:
    """Paths of all lanes with the least summed loss whose summed cost keeps every limit.

    Args:
        lanes: with the same K resources.
        limit: of the lanes' summed cost, in the same absolute units; positive.
        gap_target: relative gap at which labels are dropped; 0 asks for the optimum.
        max_labels: partial plans kept per layer.
        time_limit_s: of the label search; past it the dual's gap is stated.

    Raises:
        BudgetInfeasibleError: no paths keep the limits; the message gives the least cost of each resource alone.
    """
    cheapest = [_plan(lanes, np.eye(len(limit))[k], losses=False) for k in range(len(limit))]
    floor = np.array([plan.cost[k] for k, plan in enumerate(cheapest)])
    if (floor > limit * (1 + SLACK)).any():
        raise BudgetInfeasibleError(_infeasible(floor, limit))
    prices, bound, plans = _maximise(lanes, limit, cheapest, tolerance=max(gap_target / 50, 1e-9))
    if bound > _most(lanes):
        raise BudgetInfeasibleError(_infeasible(floor, limit))
    best = _within_limits(lanes, limit, plans, prices, bound, gap_target)
    if best is not None and gap_target > 0 and relative_gap(best.loss, bound) <= gap_target:
        return LaneSolution(
            best.paths,
            best.loss,
            best.cost,
            min(bound, best.loss),
            relative_gap(best.loss, bound),
            "layer dp + exchange",
        )
    deadline = monotonic() + time_limit_s
    for cap in (
        max_labels // 20,
        max_labels,
    ):  # a quick narrow search finds a plan that lets the wide one drop most labels
        found, dropped, complete = _search(lanes, limit, prices, best, gap_target, max(cap, 1), deadline)
        best = min((plan for plan in (found, best) if plan is not None), key=lambda plan: plan.loss, default=None)
        if complete:
            break
    found = best
    if found is None:
        raise BudgetInfeasibleError(_infeasible(floor, limit))
    lower_bound = min(max(bound, dropped if complete else bound), found.loss)
    if found.loss - lower_bound <= 1e-12 * abs(found.loss):
        lower_bound = found.loss
    solver = "layer dp" if complete else "layer dp (labels or time capped)"
    return LaneSolution(found.paths, found.loss, found.cost, lower_bound, relative_gap(found.loss, lower_bound), solver)


def _most(lanes: Sequence[Lane]) -> float:
    """No plan loses more."""
    worst = 0.0
    for lane in lanes:
        own = np.where(np.isfinite(lane.loss), lane.loss, -np.inf).max(1)
        reuse = np.where(np.isfinite(lane.reuse_loss), lane.reuse_loss, -np.inf).max((0, 1), initial=-np.inf)
        worst += float(np.maximum(own, reuse).sum())
    return worst + 1e-9 * abs(worst)


def _within_limits(
    lanes: Sequence[Lane],
    limit: Float[ndarray, " K"],
    plans: Sequence[_Plan],
    prices: Float[ndarray, " K"],
    bound: float,
    gap_target: float,
) -> _Plan | None:
    """The best plan that keeps the limits, among those met and those that reuse alike (`layer_primal`), nearest to the bound first."""
    best = min((plan for plan in plans if _fits(plan.cost, limit)), key=lambda plan: plan.loss, default=None)
    near = sorted(plans, key=lambda plan: plan.loss + float(prices @ (plan.cost - limit)))
    alike = {tuple(path.reads for path in plan.paths): plan for plan in reversed(near)}
    for plan in list(reversed(alike.values()))[:MOST_SKELETONS]:
        if best is not None and relative_gap(best.loss, bound) <= gap_target:
            break
        paths = within_limits(lanes, plan.paths, limit, tolerance=max(gap_target / 50, 1e-7))
        if paths is None:
            continue
        found = _costed(lanes, paths)
        if _fits(found.cost, limit) and (best is None or found.loss < best.loss):
            best = found
    return best


def _fits(cost: ndarray, limit: Float[ndarray, " K"]) -> Bool[ndarray, "*n"]:
    return np.asarray((cost <= limit * (1 + SLACK)).all(-1))


def _plan(lanes: Sequence[Lane], price: Float[ndarray, " K"], *, losses: bool = True) -> _Plan:
    return _costed(lanes, tuple(priced_path(lane, price, losses=losses) for lane in lanes))


def _costed(lanes: Sequence[Lane], paths: tuple[LanePath, ...]) -> _Plan:
    loss = sum(path.loss(lane) for path, lane in zip(paths, lanes, strict=True))
    cost = np.sum([path.cost(lane) for path, lane in zip(paths, lanes, strict=True)], axis=0)
    return _Plan(paths, loss, cost)


@dataclass(frozen=True, eq=False)
class _Point:
    """D at some prices (loss per share of the limit), and the plan that attains it."""

    bound: float
    rounding: float
    prices: Float[ndarray, " K"]
    plan: _Plan


def _maximise(
    lanes: Sequence[Lane], limit: Float[ndarray, " K"], plans: list[_Plan], *, tolerance: float
) -> tuple[Float[ndarray, " K"], float, list[_Plan]]:
    """The best prices (loss per unit of cost), D there, and every plan met."""
    ones, plans, cuts = np.ones(len(limit)), [*plans], Cuts()

    def met(prices: Float[ndarray, " K"]) -> _Point:
        plan = _plan(lanes, prices / limit)
        plans.append(plan)
        cuts.loss.append(plan.loss)
        cuts.use.append(plan.cost / limit)
        paid = float(prices @ ones)
        bound = plan.loss + float(prices @ (plan.cost / limit)) - paid
        return _Point(bound, ROUNDING * (abs(plan.loss) + paid), prices, plan)

    for plan in plans:
        cuts.loss.append(plan.loss)
        cuts.use.append(plan.cost / limit)
    free = met(0 * ones)
    first = max(plan.loss for plan in plans) - free.plan.loss
    best = ascend(free, met, cuts, ones, first=max(first, 1e-12), tolerance=tolerance, ceiling=_most(lanes))
    return best.prices / limit, best.bound, plans


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
    deadline: float,
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
            if monotonic() > deadline:
                return best, dropped, False
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
    """Rows, in order of rising loss, that are cheaper in some resource than every row before them."""
    if cost.shape[1] == 1:
        before = np.minimum.accumulate(np.append(np.inf, cost[:-1, 0]))
        return np.asarray(cost[:, 0] < before)
    # a row that stays although it is dominated costs time only, so many rows are compared with a spread of them
    rivals = np.unique(np.linspace(0, len(cost) - 1, min(len(cost), MAX_RIVALS)).astype(np.int64))
    beaten = np.zeros(len(cost), dtype=bool)
    for first in range(0, len(cost), MAX_RIVALS):
        rows = np.arange(first, min(first + MAX_RIVALS, len(cost)))
        no_dearer = (cost[rivals, None] <= cost[rows]).all(-1)
        beaten[rows] = (no_dearer & (rivals[:, None] < rows)).any(0)
    return ~beaten


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
