"""The search: the plan of least loss within all budgets, and the proof of how far it can be from the best."""

from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from sparsesearch.scores import ScoreTable
from sparsesearch.search.budget import Budget
from sparsesearch.search.exact import solve_exact
from sparsesearch.search.feasible import feasible_plan
from sparsesearch.search.knapsack import Knapsack, knapsack_of
from sparsesearch.search.lagrangian import Cuts, Dual, maximise
from sparsesearch.search.primal import NUM_MOVES, fill, improve, repair


@dataclass(frozen=True, eq=False)
class Solution:
    """A plan and what was proved about it.

    Attributes:
        choice: the table's candidate index of each unit.
        loss: its summed loss.
        lower_bound: no plan within the budgets loses less.
        gap: (loss − lower_bound) / max(|loss|, 1e-12); 0 when they differ by rounding alone.
        used: metric -> length in tokens (WHOLE without one) -> share of dense, for every metric of the table.
        solver: what found it.
    """

    choice: Int[ndarray, " U"]
    loss: float
    lower_bound: float
    gap: float
    used: dict[str, dict[int, float]]
    solver: str


@dataclass(frozen=True)
class Bounded:
    """A plan within the limits and the Lagrangian bound beside it."""

    choice: Int[ndarray, " U"]
    loss: float
    dual: Dual

    @property
    def lower_bound(self) -> float:
        """The dual bound, or the loss itself when they differ by rounding alone."""
        return self.loss if self.loss - self.dual.bound <= self.dual.rounding else self.dual.bound


def solve(
    table: ScoreTable,
    budgets: Sequence[Budget],
    *,
    gap_target: float = 1e-4,
    time_limit_s: float = 30.0,
    loss: Float[ndarray, "U C"] | None = None,
) -> Solution:
    """Choose one candidate per unit with the least summed loss within every budget.

    Lagrangian bound, repair and exchange; where that leaves more than `gap_target`, candidates whose reduced cost
    exceeds the gap are ruled out and HiGHS decides among the rest. Deterministic unless the time runs out. A larger
    budget never loses more than a smaller one beyond the proven gap.

    Args:
        table: losses and costs per unit, candidate and length.
        budgets: all must hold, each at every length it names.
        gap_target: relative gap at which to stop; 0 asks for the optimum.
        time_limit_s: for HiGHS.
        loss: replaces the table's losses.

    Raises:
        BudgetInfeasibleError: no plan fits; the message gives the smallest feasible values.
        SpecError: a budget names a metric or length the table lacks, or the table's numbers are not finite.
    """
    problem = knapsack_of(table, budgets, loss=loss)
    floor = feasible_plan(problem, budgets)
    found = bounded_plan(problem, floor, Cuts(), tolerance=gap_target / 50)
    choice, lower_bound, solver = certify(problem, found, gap_target, time_limit_s)
    return solution_of(table, problem.restore(choice), lower_bound, solver, loss)


def bounded_plan(
    problem: Knapsack, floor: Int[ndarray, " U"], cuts: Cuts, *, tolerance: float, start: Dual | None = None
) -> Bounded:
    """The Lagrangian path alone: bound, repair, exchange."""
    dual = maximise(problem, floor, cuts, tolerance=tolerance, start=start)
    repaired = fill(problem, dual, repair(problem, dual, dual.choice, floor))
    improved = [improve(problem, dual, repaired, count=count) for count in NUM_MOVES]
    losses = [problem.loss_of(plan) for plan in improved]
    best = int(np.argmin(losses))
    return Bounded(improved[best], losses[best], dual)


def certify(
    problem: Knapsack, found: Bounded, gap_target: float, time_limit_s: float
) -> tuple[Int[ndarray, " U"], float, str]:
    """Where the gap exceeds the target, close it with HiGHS among the candidates whose reduced cost does not exceed it.

    Returns:
        The plan, the lower bound, and what found them.
    """
    if relative_gap(found.loss, found.lower_bound) <= gap_target:
        return found.choice, found.lower_bound, "lagrangian"
    deadline = monotonic() + time_limit_s
    choice, loss = found.choice, found.loss
    kept = found.dual.reduced <= (loss - found.dual.bound) * (1 + 1e-9) + found.dual.rounding
    kept[np.arange(len(choice)), choice] = True
    exact = solve_exact(
        problem, kept, absolute_gap=0.5 * gap_target * abs(loss), largest=loss, time_limit_s=time_limit_s
    )
    bound, margin = max(exact.bound, found.dual.bound), 1e-9
    while exact.choice is not None and not problem.fits(exact.choice) and monotonic() < deadline:
        # the solver's own tolerance let a limit slip: ask again under limits smaller by the slip
        slip = float((problem.use_of(exact.choice) / problem.limit).max()) - 1.0
        margin = 2.0 * max(margin, slip)
        exact = solve_exact(
            problem.with_limit(problem.limit * (1 - margin)),
            kept,
            absolute_gap=0.5 * gap_target * abs(loss),
            largest=loss,
            time_limit_s=deadline - monotonic(),
        )
    if exact.choice is not None and problem.fits(exact.choice) and problem.loss_of(exact.choice) < loss:
        choice = exact.choice
    loss = problem.loss_of(choice)
    bound = loss if loss - bound <= 1e-9 * abs(loss) + found.dual.rounding else min(bound, loss)
    return choice, bound, "lagrangian + highs" if exact.finished else "lagrangian + highs (time limit)"


def relative_gap(loss: float, lower_bound: float) -> float:
    """(loss − lower_bound) / max(|loss|, 1e-12)."""
    return max(0.0, loss - lower_bound) / max(abs(loss), 1e-12)


def solution_of(
    table: ScoreTable,
    choice: Int[ndarray, " U"],
    lower_bound: float,
    solver: str,
    loss: Float[ndarray, "U C"] | None,
) -> Solution:
    """What a choice in the table's own terms loses and uses."""
    losses = table.loss if loss is None else loss
    total = float(losses[np.arange(len(choice)), choice].sum())
    used = {metric: table.used(metric, choice) for metric in sorted(table.costs)}
    return Solution(choice, total, min(lower_bound, total), relative_gap(total, lower_bound), used, solver)
