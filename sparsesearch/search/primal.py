"""Plans within the limits: repair of the Lagrangian's choice, then exchanges of one and of two units.

At the best prices a plan's loss exceeds the bound by exactly the reduced costs of its choices plus the price of the
limits it leaves unused, so only moves of small reduced cost can belong to a good plan. All functions look at those
alone.
"""

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from sparsesearch.search.knapsack import TOLERANCE, Knapsack
from sparsesearch.search.lagrangian import Dual

NUM_MOVES = (160, 320)
"""Sizes of the neighbourhood to try; pairs cost their square. Neither size is always the better one; 640 gained
nothing."""

CLOSE_ENOUGH = 1e-6
"""Relative gap at which exchanges stop; with tens of thousands of equal units they would go on for minutes."""


class Moves:
    """The entries (unit, candidate) of smallest reduced cost that a plan does not hold, and what each would change.

    Attributes:
        unit: of each move.
        candidate: of each move.
        loss: change of the plan's loss.
        use: change of the plan's use.
        price: change of the plan's reduced cost.
    """

    def __init__(self, problem: Knapsack, dual: Dual, choice: Int[ndarray, " U"], count: int | None = None) -> None:
        flat = dual.reduced.copy()
        flat[np.arange(len(choice)), choice] = np.inf
        flat = flat.ravel()
        finite = int(np.isfinite(flat).sum())
        count = finite if count is None else min(count, finite)
        entries = np.sort(np.argpartition(flat, max(count - 1, 0))[:count])
        self.unit, self.candidate = np.divmod(entries, problem.loss.shape[1])
        now = choice[self.unit]
        self.loss = problem.loss[self.unit, self.candidate] - problem.loss[self.unit, now]
        self.use = problem.use[:, self.unit, self.candidate] - problem.use[:, self.unit, now]
        self.price = flat[entries] - dual.reduced[self.unit, now]

    def one_per_unit(self, rank: Float[ndarray, " n"]) -> Int[ndarray, " m"]:
        """The best move of each unit that has one of finite rank, best first."""
        order = np.argsort(rank, kind="stable")
        order = order[np.isfinite(rank[order])]
        _, first = np.unique(self.unit[order], return_index=True)
        return np.asarray(order[np.sort(first)])


def repair(problem: Knapsack, dual: Dual, choice: Int[ndarray, " U"], floor: Int[ndarray, " U"]) -> Int[ndarray, " U"]:
    """Bring a plan within the limits by the cheapest moves per unit of excess removed; `floor` is the last resort.

    Moves are made in bulk while they leave half of the excess, because thousands of equal units (heads at neighbouring
    denoising steps) all change at the same price.
    """
    choice = choice.copy()
    for _ in range(2 * len(choice)):
        excess = problem.use_of(choice) - problem.limit
        if (excess <= TOLERANCE).all():
            return choice
        moves = Moves(problem, dual, choice)
        after = np.maximum(excess[:, None] + moves.use, 0.0)
        removed = ((np.maximum(excess, 0.0)[:, None] - after) / problem.limit[:, None]).sum(0)
        useful = removed > TOLERANCE
        if not useful.any():
            return floor.copy()
        ratio = np.where(useful, np.maximum(moves.price, 0.0), np.inf) / np.where(useful, removed, 1.0)
        order = moves.one_per_unit(ratio)
        left = np.maximum(excess[:, None] + moves.use[:, order].cumsum(1), 0.0) / problem.limit[:, None]
        enough = left.sum(0) <= 0.5 * (np.maximum(excess, 0.0) / problem.limit).sum()
        count = max(1, int(enough.argmax())) if enough.any() else 1
        choice[moves.unit[order[:count]]] = moves.candidate[order[:count]]
    return floor.copy()


def fill(problem: Knapsack, dual: Dual, choice: Int[ndarray, " U"]) -> Int[ndarray, " U"]:
    """Spend what a plan within the limits leaves unused, in bulk, on the moves nearest to the best prices."""
    choice = choice.copy()
    while True:
        slack = problem.limit + TOLERANCE - problem.use_of(choice)
        moves = Moves(problem, dual, choice)
        useful = (moves.loss < 0) & (moves.use <= slack[:, None]).all(0)
        order = moves.one_per_unit(np.where(useful, moves.price / np.where(useful, -moves.loss, 1.0), np.inf))
        fits = (moves.use[:, order].cumsum(1) <= slack[:, None]).all(0)
        count = len(fits) if fits.all() else int(fits.argmin())
        if count <= 1:  # `improve` goes on from here, looking at pairs too
            return choice
        choice[moves.unit[order[:count]]] = moves.candidate[order[:count]]


def improve(problem: Knapsack, dual: Dual, choice: Int[ndarray, " U"], *, count: int) -> Int[ndarray, " U"]:
    """Change one or two units at a time while that lowers the loss of a plan within the limits."""
    choice = choice.copy()
    if problem.allowed.sum() == len(choice):
        return choice
    least = 1e-13 * float(np.abs(problem.loss[np.arange(len(choice)), choice]).sum())
    for _ in range(4 * len(choice) + 16):
        if problem.loss_of(choice) - dual.bound <= CLOSE_ENOUGH * abs(dual.bound):
            return choice
        slack = problem.limit + TOLERANCE - problem.use_of(choice)
        moves = Moves(problem, dual, choice, count)
        found = _best_single(moves, slack, least) or _best_pair(moves, slack, least)
        if found is None:
            return choice
        for move in found:
            choice[moves.unit[move]] = moves.candidate[move]
    return choice


def _best_single(moves: Moves, slack: Float[ndarray, " K"], least: float) -> tuple[int, ...] | None:
    gain = np.where((moves.use <= slack[:, None]).all(0), moves.loss, 0.0)
    best = int(gain.argmin())
    return (best,) if gain[best] < -least else None


def _best_pair(moves: Moves, slack: Float[ndarray, " K"], least: float) -> tuple[int, ...] | None:
    """The two moves in different units that together lower the loss most and keep the limits."""
    down = np.flatnonzero(moves.loss < -least)  # at least one of the two must lower the loss
    allowed = (moves.loss[down, None] + moves.loss < -least) & (moves.unit[down, None] != moves.unit)
    rows, columns = np.nonzero(allowed)
    rows = down[rows]
    for use, room in zip(moves.use, slack, strict=True):
        fits = use[rows] + use[columns] <= room
        rows, columns = rows[fits], columns[fits]
    if not len(rows):
        return None
    best = int((moves.loss[rows] + moves.loss[columns]).argmin())
    return int(rows[best]), int(columns[best])
