"""Budgets over lanes: the Lagrangian dual of `layer_dp`, then a label search that closes what it leaves open.

    D(λ) = Σ_lanes min_path (loss + λ · cost) − λ · limit,   λ >= 0

Every λ bounds the loss from below. Its prices also give the least priced loss from any state to the end, so that a partial path (a label)
whose loss, priced cost and cost to go exceed the best known plan is dropped; so is a label that another one of the same state beats in loss
and in every cost. What is left at the end is the optimum. When a layer has more than `max_labels` labels, only the most promising stay,
and the result states the dual's gap instead of a proof.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from sparsesearch.errors import BudgetInfeasibleError
from sparsesearch.search.budget import Budget
from sparsesearch.search.feasible import round_up
from sparsesearch.search.lagrangian import ROUNDING, Cuts, ascend
from sparsesearch.search.layer_dp import Lane, LanePath, priced_path
from sparsesearch.search.layer_labels import SLACK, LanePlan, fits, search_labels
from sparsesearch.search.layer_primal import within_limits
from sparsesearch.search.solve import relative_gap

MOST_SKELETONS = 12


@dataclass(frozen=True, eq=False)
class LaneSolution:
    """The best paths found and what was proved about them; fields as in `solve.Solution`."""

    paths: tuple[LanePath, ...]
    loss: float
    cost: Float[ndarray, " K"]
    lower_bound: float
    gap: float
    solver: str


def solve_lanes(
    lanes: Sequence[Lane],
    limit: Float[ndarray, " K"],
    *,
    asked: Sequence[Budget] | None = None,
    gap_target: float = 1e-4,
    max_labels: int = 50_000,
    time_limit_s: float = 10.0,
) -> LaneSolution:
    """Paths of all lanes with the least summed loss whose summed cost keeps every limit.

    Args:
        lanes: with the same K resources.
        limit: of the lanes' summed cost, in the same absolute units; positive.
        asked: the budget behind each limit, for messages; None: limits are called by their place.
        gap_target: relative gap at which labels are dropped; 0 asks for the optimum.
        max_labels: partial plans kept per layer.
        time_limit_s: of the label search; past it the dual's gap is stated.

    Raises:
        BudgetInfeasibleError: no paths keep the limits; the message gives the least cost of each resource alone.
    """
    cheapest = [_plan(lanes, np.eye(len(limit))[k], losses=False) for k in range(len(limit))]
    floor = np.array([plan.cost[k] for k, plan in enumerate(cheapest)])
    if (floor > limit * (1 + SLACK)).any():
        raise BudgetInfeasibleError(_infeasible(floor, limit, asked))
    prices, bound, plans = _maximise(lanes, limit, cheapest, tolerance=max(gap_target / 50, 1e-9))
    if bound > _most(lanes):
        raise BudgetInfeasibleError(_infeasible(floor, limit, asked))
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
        found, dropped, complete = search_labels(lanes, limit, prices, best, gap_target, max(cap, 1), deadline)
        best = min((plan for plan in (found, best) if plan is not None), key=lambda plan: plan.loss, default=None)
        if complete:
            break
    found = best
    if found is None:
        raise BudgetInfeasibleError(_infeasible(floor, limit, asked))
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
    plans: Sequence[LanePlan],
    prices: Float[ndarray, " K"],
    bound: float,
    gap_target: float,
) -> LanePlan | None:
    """The best plan that keeps the limits, among those met and those that reuse alike (`layer_primal`), nearest to the bound first."""
    best = min((plan for plan in plans if fits(plan.cost, limit)), key=lambda plan: plan.loss, default=None)
    near = sorted(plans, key=lambda plan: plan.loss + float(prices @ (plan.cost - limit)))
    alike = {tuple(path.reads for path in plan.paths): plan for plan in reversed(near)}
    for plan in list(reversed(alike.values()))[:MOST_SKELETONS]:
        if best is not None and relative_gap(best.loss, bound) <= gap_target:
            break
        paths = within_limits(lanes, plan.paths, limit, tolerance=max(gap_target / 50, 1e-7))
        if paths is None:
            continue
        found = _costed(lanes, paths)
        if fits(found.cost, limit) and (best is None or found.loss < best.loss):
            best = found
    return best


def _plan(lanes: Sequence[Lane], price: Float[ndarray, " K"], *, losses: bool = True) -> LanePlan:
    return _costed(lanes, tuple(priced_path(lane, price, losses=losses) for lane in lanes))


def _costed(lanes: Sequence[Lane], paths: tuple[LanePath, ...]) -> LanePlan:
    loss = sum(path.loss(lane) for path, lane in zip(paths, lanes, strict=True))
    cost = np.sum([path.cost(lane) for path, lane in zip(paths, lanes, strict=True)], axis=0)
    return LanePlan(paths, loss, cost)


@dataclass(frozen=True, eq=False)
class _Point:
    """D at some prices (loss per share of the limit), and the plan that attains it."""

    bound: float
    rounding: float
    prices: Float[ndarray, " K"]
    plan: LanePlan


def _maximise(
    lanes: Sequence[Lane], limit: Float[ndarray, " K"], plans: list[LanePlan], *, tolerance: float
) -> tuple[Float[ndarray, " K"], float, list[LanePlan]]:
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


def _infeasible(floor: Float[ndarray, " K"], limit: Float[ndarray, " K"], asked: Sequence[Budget] | None) -> str:
    if asked is None:
        least = ", ".join(f"{share:.4g} of limit {index}" for index, share in enumerate(floor / limit))
        return f"some plan must keep every limit, but the cheapest paths use {least}. Raise the budget."
    values = zip(asked, floor / limit, strict=True)
    least = ", ".join(f"{one.metric}={one.amount(round_up(one.bound * share))}" for one, share in values)
    return f"no plan fits {' and '.join(map(str, asked))}: the smallest values, each by itself, are {least}. Raise the budget or add sparser rules."
