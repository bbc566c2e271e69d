"""Search whose seconds are those of the replayed schedule, or on a processor of the calls that a layer makes.

The exact search adds up what units cost by themselves. A layer really takes as long as its busiest worker, a dense head beside sparse ones
runs in their tiles, and on a processor heads of one rule share a call, so the sum is off, by different amounts for different plans. Here the plan of every search is
predicted by replay (`cost.predict`), and the bounds of the sum are moved until the replayed seconds keep what was asked: never above it,
and not needlessly below it. A layer whose replayed time is no shorter than dense's is made dense, so no layer is ever slowed down.

What is proved stays what the search proved: the gap of the additive problem under the bounds that were moved. Both seconds are in the plan.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from sparsesearch.cost.layer_calls import CallCosts
from sparsesearch.cost.layer_costs import LayerCosts
from sparsesearch.cost.layer_parts import decode_rest_s, prefill_rest_s
from sparsesearch.cost.predict import LayerPrediction, predict_layers
from sparsesearch.errors import BudgetInfeasibleError
from sparsesearch.model_shapes import ModelShape, heads_alone
from sparsesearch.plan import Plan
from sparsesearch.planning import write_plan
from sparsesearch.profiling.record import Profile
from sparsesearch.scores import ScoreTable
from sparsesearch.scoring import DTYPE_BYTES, Question, score_table
from sparsesearch.search.budget import PRICED_BY_DEVICE, Budget
from sparsesearch.search.feasible import round_up
from sparsesearch.search.solve import Solution, solution_of, solve
from sparsesearch.shapes import Decoding, Unit
from sparsesearch.workload import Workload

Layers = tuple[LayerPrediction, ...]

MOST_PASSES = 10
CLOSE = 0.005
"""Unused share of a bound at which the search is not repeated."""


def search_plan(profile: Profile, question: Question) -> Plan:
    """The plan of least loss within the budgets; seconds by replay where the cost model knows whole layers or calls.

    Raises:
        BudgetInfeasibleError: no plan keeps the budgets, or none whose replayed seconds do.
    """
    table = score_table(profile, question)
    if not is_replayed(question):
        solution = solve(table, question.constraints)
        return write_plan(profile, question, table, solution.choice, solution)
    search = ReplayedSearch(profile, question, table)
    best, passes = search.passes()
    return search.recorded(best.plan, best, passes)


def is_replayed(question: Question) -> bool:
    """Whether seconds are limited, and the cost model knows whole layers or calls."""
    timed = any(budget.metric in PRICED_BY_DEVICE for budget in question.budgets)
    return timed and isinstance(question.cost_model, (LayerCosts, CallCosts))


@dataclass(frozen=True)
class Pass:
    """One search, its plan, and what a replay says of it: for every budget the largest use of its bound, 1 where it is reached."""

    solution: Solution
    plan: Plan
    scales: tuple[float, ...]
    use: tuple[float, ...]
    replayed: tuple[dict[str, float], ...]

    @property
    def fits(self) -> bool:
        """Whether every budget in seconds holds."""
        return all(use <= 1 + 1e-9 for use in self.use)


class ReplayedSearch:
    """The passes of one question, for which `is_replayed` holds."""

    def __init__(self, profile: Profile, question: Question, table: ScoreTable) -> None:
        costs = question.cost_model
        assert isinstance(costs, (LayerCosts, CallCosts))
        manifest = profile.manifest
        info = manifest.base_model
        self.profile: Profile = profile
        self.question: Question = question
        self.table: ScoreTable = table
        self.costs: LayerCosts | CallCosts = costs
        self.shape: ModelShape = question.shape or heads_alone(info.name_or_path, info.geometry)
        self.served: tuple[Workload, ...] = question.workloads or tuple(Workload(n) for n in manifest.lengths)
        self.element_bytes: int = question.dtype_bytes or DTYPE_BYTES[manifest.dtype]
        self.dense: list[Layers] = [self._predicted(None, workload) for workload in self.served]

    def passes(self, loss: Float[ndarray, "U C"] | None = None) -> tuple[Pass, list[Pass]]:
        """Search, replay, move the bounds: the best pass whose plan keeps what was asked, and all of them.

        Args:
            loss: minimised instead of the table's.

        Raises:
            BudgetInfeasibleError: no plan keeps the budgets, or none whose replayed seconds do.
        """
        table = self.table if loss is None else replace(self.table, loss=loss)
        scales = tuple(1.0 for _ in self.question.budgets)
        best: Pass | None = None
        passes: list[Pass] = []
        for _ in range(MOST_PASSES):
            try:
                found = self._pass(table, scales)
            except BudgetInfeasibleError:
                if not passes:
                    raise
                scales = tuple((scale + last) / 2 for scale, last in zip(scales, passes[-1].scales, strict=True))
                continue
            passes.append(found)
            if found.fits and (best is None or found.solution.loss < best.solution.loss):
                best = found
            slack = 1 - max(found.use, default=1.0)
            if (found.fits and slack <= CLOSE) or (found.fits and found.solution.loss <= 0):
                break
            moved = tuple(self._moved(index, found, passes) for index in range(len(scales)))
            if np.allclose(moved, scales, rtol=1e-4) or _repeats(passes):
                break
            scales = moved
        if best is None:
            raise BudgetInfeasibleError(self._explained(passes))
        return best, passes

    def _explained(self, passes: Sequence[Pass]) -> str:
        """What the budgets in seconds would have to be for the nearest plan that was met."""
        nearest = min(passes, key=lambda one: max(one.use))
        asked = [budget for budget, own in zip(self.question.budgets, nearest.replayed, strict=True) if own]
        needs = [
            f"{budget.metric}={budget.amount(round_up(max(own.values())))}"
            for budget, own in zip(self.question.budgets, nearest.replayed, strict=True)
            if own
        ]
        return (
            f"no plan was found that keeps {' and '.join(map(str, asked))} when its schedule is replayed: the nearest one needs "
            f"{', '.join(needs)}. Raise the budgets or add sparser rules."
        )

    def _pass(self, table: ScoreTable, scales: Sequence[float]) -> Pass:
        scaled = [
            replace(budget, bound=budget.bound * scale if budget.absolute else min(1.0, budget.bound * scale))
            for budget, scale in zip(self.question.budgets, scales, strict=True)
        ]
        others = self.question.constraints[len(self.question.budgets) :]
        solution = self._not_slower(table, solve(table, (*scaled, *others)))
        plan = write_plan(self.profile, self.question, self.table, solution.choice, solution)
        predictions = [self._predicted(plan, workload) for workload in self.served]
        replayed = tuple(self._replayed(budget, predictions) for budget in self.question.budgets)
        use = tuple(
            max((value / budget.bound for value in own.values()), default=0.0)
            for own, budget in zip(replayed, self.question.budgets, strict=True)
        )
        return Pass(solution, plan, tuple(scales), use, replayed)

    def _moved(self, index: int, found: Pass, passes: Sequence[Pass]) -> float:
        """The next scale of a budget: where the line through the two passes nearest to its bound meets it.

        A line, and not a proportion, because every plan pays something besides, such as launches.
        """
        if not found.replayed[index] or (found.fits and found.use[index] < max(found.use) - CLOSE):
            return found.scales[index]  # it is not in seconds, or another budget binds
        misses = sum(one.use[index] > 1 + 1e-9 for one in passes)
        aim = 1 - CLOSE / 2 * (1 if found.fits else 2.0 ** max(0, misses - 1))  # a step further with every miss
        points = sorted({(0.0, 0.0), *((one.scales[index], one.use[index]) for one in passes)})
        widest = max(scale for scale, use in points if use <= 1 + 1e-9)
        near = [point for point in points if point[0] >= widest]
        if widest == 0 and len(near) > 2:
            near = near[1:]  # no pass fits: the line through the two tightest says more than the origin
        (start, low), (end, high) = near[:2] if len(near) > 1 else points[-2:]
        if low > 1 and high - low < CLOSE:  # nearly the same plan twice
            return start * aim / low
        wanted = start + (aim - low) * (end - start) / max(high - low, 1e-9)
        if low > 1:
            return float(np.clip(wanted, start / 4, 0.98 * start))
        if high <= 1:
            return float(np.clip(wanted, 1.02 * end, 4 * end))
        edge = 0.05 * (end - start) if start else 0.0
        return float(np.clip(wanted, start + edge, end - edge))

    def _not_slower(self, table: ScoreTable, solution: Solution) -> Solution:
        """The same plan with every layer dense that a replay finds no faster than dense, where the other budgets allow it."""
        plan = write_plan(self.profile, self.question, self.table, solution.choice, solution)
        own, dense = (self._layer_seconds(predictions) for predictions in (
            [self._predicted(plan, workload) for workload in self.served], self.dense))  # fmt: skip
        modules = self.profile.manifest.base_model.modules
        slow = {module for module, mine, theirs in zip(modules, own, dense, strict=True) if mine >= theirs}
        rows = [row for row, unit in enumerate(self.table.units) if _prefill_module(unit) in slow]
        choice = solution.choice.copy()
        choice[rows] = self.table.dense_index
        if (choice == solution.choice).all() or not self._allowed(choice):
            return solution
        return solution_of(table, choice, solution.lower_bound, solution.solver, None)

    def _allowed(self, choice: Int[ndarray, " U"]) -> bool:
        """Whether a choice keeps the budgets that are not in seconds."""
        for budget in self.question.budgets:
            if budget.metric not in PRICED_BY_DEVICE:
                used = self.table.used(budget.metric, choice, absolute=budget.absolute)
                if any(value > budget.bound * (1 + 1e-9) for at, value in used.items() if budget.holds_at(at)):
                    return False
        return True

    def _layer_seconds(self, predictions: Sequence[Layers]) -> Float[ndarray, " L"]:
        """Attention of every layer over the workloads: prefill, and every generated token where decoding follows the same rules."""
        steps = [0 if self.question.decode == "separate" else workload.generate_tokens for workload in self.served]
        rows = [
            workload.weight
            * np.array([one.attention_s + one.index_s + count * one.decode_attention_s for one in layers])
            for workload, layers, count in zip(self.served, predictions, steps, strict=True)
        ]
        return np.asarray(np.sum(rows, axis=0))

    def _predicted(self, plan: Plan | None, workload: Workload) -> Layers:
        return predict_layers(plan, self.shape, workload, self.costs, dtype_bytes=self.element_bytes)

    def _replayed(self, budget: Budget, predictions: Sequence[Layers]) -> dict[str, float]:
        """What a budget limits, by replay: per length, or of the whole workload; empty where it is not in seconds."""
        if budget.metric not in PRICED_BY_DEVICE:
            return {}
        found: dict[str, float] = {}
        if budget.metric == "latency" and self.question.workloads:
            mine, theirs = (self._total(each) for each in (predictions, self.dense))
            return {"workload": mine if budget.absolute else mine / theirs}
        for workload, own, dense in zip(self.served, predictions, self.dense, strict=True):
            if not budget.holds_at(workload.prompt_tokens) or (
                budget.metric == "tpot" and not workload.generate_tokens
            ):
                continue
            mine, theirs = (self._seconds(budget.metric, workload, each) for each in (own, dense))
            at = str(workload.prompt_tokens)
            found[at] = max(mine if budget.absolute else mine / theirs, found.get(at, 0.0))
        return found

    def _total(self, predictions: Sequence[Layers]) -> float:
        weight = sum(workload.weight for workload in self.served)
        return sum(
            workload.weight
            / weight
            * (self._seconds("ttft", workload, own) + workload.generate_tokens * self._seconds("tpot", workload, own))
            for workload, own in zip(self.served, predictions, strict=True)
        )

    def _seconds(self, metric: str, workload: Workload, layers: Layers) -> float:
        """Of the whole model, or of attention alone where its sizes or costs are not known, as in the score table."""
        if metric == "tpot":
            steps = self.question.layer_costs
            rest_s = 0.0 if steps is None else decode_rest_s(self.shape, steps, batch=workload.batch)
            return rest_s + sum(layer.decode_attention_s for layer in layers)
        whole = self.question.prefill_costs
        rows = workload.batch * workload.prompt_tokens
        rest_s = 0.0 if whole is None else prefill_rest_s(self.shape, whole, rows=rows, batch=workload.batch)
        return rest_s + sum(layer.attention_s + layer.index_s for layer in layers)

    def recorded(self, plan: Plan, best: Pass, passes: Sequence[Pass]) -> Plan:
        """The plan of a pass, with what was replayed beside what was summed."""
        budgets = tuple(
            record.model_copy(update={"replayed": replayed} if replayed else {})
            for record, replayed in zip(plan.budgets, best.replayed, strict=True)
        )
        history: list[dict[str, Any]] = [
            {
                "bounds_moved_by": [round(scale, 6) for scale in one.scales],
                "replayed_over_bound": [round(use, 6) for use in one.use],
            }
            for one in passes
        ]
        return plan.model_copy(
            update={"budgets": budgets, "provenance": plan.provenance | {"replayed_passes": history}}
        )


def _repeats(passes: Sequence[Pass]) -> bool:
    """Whether two passes found plans of earlier ones: between the bounds that lead to them there is most likely none."""
    return len(passes) - len({one.solution.choice.tobytes() for one in passes}) >= 2


def _prefill_module(unit: Unit | Decoding) -> str | None:
    return None if isinstance(unit, Decoding) else unit.module
