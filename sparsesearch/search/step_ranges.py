"""Which candidate each head follows in which range of denoising steps: ranges by interval DP, choices by the exact search, and a bound on both.

Slices of the trajectory (single steps, or what a profile looked at) are merged into at most `max_ranges` ranges; within one a head keeps its
candidate. For a price λ of a tile, the best value of every range is a sum of independent minima, and the best segmentation a shortest path;
its value minus λ times the budget bounds every plan from below. The segmentations met on the way to the best λ are then solved exactly.

A layer may be held to `max_groups` token orders per range, because heads of one order share one copy and one launch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from sparsesearch.errors import BudgetInfeasibleError, SpecError
from sparsesearch.scores import ScoreTable
from sparsesearch.search.budget import Budget
from sparsesearch.search.solve import relative_gap, solve
from sparsesearch.shapes import Unit
from sparsesearch.step_schedule import StepSchedule

_PRICES = 40
_SEGMENTATIONS = 3


@dataclass(frozen=True)
class StepTable:
    """What every candidate loses and costs in every unit and slice of steps.

    Attributes:
        slices: first and end step of each of S slices; they follow one another from step 0.
        units: U units, the heads of a layer side by side.
        candidates: C labels.
        loss: summed over the slice's steps.
        tiles: per step, the same in every slice; any cost that adds up serves.
        dense_index: which candidate is dense.
        group: token order of each candidate, as a number; the dense one's group is free.
    """

    slices: tuple[tuple[int, int], ...]
    units: tuple[Unit, ...]
    candidates: tuple[str, ...]
    loss: Float[ndarray, "S U C"]
    tiles: Float[ndarray, "U C"]
    dense_index: int
    group: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        shape = (len(self.slices), len(self.units), len(self.candidates))
        if self.loss.shape != shape or self.tiles.shape != shape[1:]:
            raise SpecError(
                f"loss must be {shape} and tiles {shape[1:]}, but they are {self.loss.shape} and {self.tiles.shape}."
            )
        ends = [0, *(end for _, end in self.slices)]
        if any(first != end or last <= first for (first, last), end in zip(self.slices, ends, strict=False)):
            raise SpecError(f"slices must follow one another from step 0, but are {self.slices}.")
        if self.group and len(self.group) != len(self.candidates):
            raise SpecError(f"group must name one order per candidate, but has {len(self.group)}.")
        if not (np.isfinite(self.loss).all() and np.isfinite(self.tiles).all()):
            raise SpecError("losses and tiles must be finite; profile again.")

    @property
    def num_steps(self) -> int:
        """Steps of the trajectory."""
        return self.slices[-1][1]

    @cached_property
    def steps(self) -> Float[ndarray, " S"]:
        """Steps per slice."""
        return np.array([end - first for first, end in self.slices], float)

    @property
    def dense_tiles(self) -> float:
        """Tiles of dense attention over the whole trajectory."""
        return float(self.tiles[:, self.dense_index].sum() * self.num_steps)


@dataclass(frozen=True)
class StepSolution:
    """Ranges and choices, and what was proved.

    Attributes:
        ranges: first and end step.
        choice: candidate of each unit in each range.
        density: tiles over dense attention's, all steps together.
        loss: summed loss.
        lower_bound: no plan of at most that many ranges (and groups) within the budget loses less.
        gap: (loss - lower_bound) / max(|loss|, 1e-12).
    """

    ranges: tuple[tuple[int, int], ...]
    choice: Int[ndarray, "R U"]
    density: float
    loss: float
    lower_bound: float
    gap: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "gap", relative_gap(self.loss, self.lower_bound))

    def schedule(self, table: StepTable) -> StepSchedule:
        """The choices as a plan's schedule, rules named by their labels, heads in order."""
        written = []
        for (first, end), row in zip(self.ranges, self.choice, strict=True):
            heads: dict[str, list[tuple[int, str]]] = {}
            for unit, candidate in zip(table.units, row, strict=True):
                heads.setdefault(unit.module, []).extend(
                    (head, table.candidates[int(candidate)]) for head in unit.heads
                )
            written.append((first, end, {module: [label for _, label in sorted(own)] for module, own in heads.items()}))
        return StepSchedule.of(table.num_steps, written)


def solve_steps(
    table: StepTable,
    density: float,
    *,
    max_ranges: int | None = None,
    max_groups: int | None = None,
    gap_target: float = 1e-3,
    time_limit_s: float = 20.0,
) -> StepSolution:
    """The plan of least loss whose tiles over all steps are at most `density` of dense attention's.

    Args:
        table: losses and tiles.
        density: the budget, dense steps included.
        max_ranges: at most so many ranges; every slice its own by default.
        max_groups: at most so many token orders per layer and range besides dense's own.
        gap_target: where to stop; the proven gap is returned whatever it is.
        time_limit_s: for the exact search of one segmentation.

    Raises:
        BudgetInfeasibleError: even the cheapest candidates cost more.
        SpecError: max_groups is given, but the table names no groups.
    """
    if max_groups is not None and not table.group:
        raise SpecError("max_groups needs the token order of every candidate: give StepTable group=...")
    lowest = float(table.tiles.min(1).sum() * table.num_steps) / table.dense_tiles
    if lowest > density * (1 + 1e-12):
        raise BudgetInfeasibleError(
            f"density must be at least {lowest:.4g} with these candidates, but the budget is {density:g}."
        )
    relaxed = _Relaxed(table, min(max_ranges or len(table.slices), len(table.slices)), max_groups)
    bound, found = relaxed.search(density * table.dense_tiles, gap_target)
    solutions = [
        _exact(table, cuts, _allowed(table, relaxed, cuts, price), density, gap_target, time_limit_s)
        for price, cuts in found
    ]
    best = min(solutions, key=lambda pair: pair[1])
    ranges = tuple((table.slices[a][0], table.slices[b - 1][1]) for a, b in best[0])
    spent = sum(
        float(np.take_along_axis(table.tiles, row[:, None], 1).sum()) * (end - first)
        for (first, end), row in zip(ranges, best[2], strict=True)
    )
    return StepSolution(ranges, best[2], spent / table.dense_tiles, best[1], min(bound, best[1]))


Cuts = tuple[tuple[int, int], ...]


class _Relaxed:
    """The problem with tiles priced instead of limited."""

    def __init__(self, table: StepTable, max_ranges: int, max_groups: int | None) -> None:
        self.table, self.max_ranges = table, max_ranges
        count = len(table.slices)
        self.single = max_ranges == count  # no range can do better than its slices
        self.pairs = [(a, a + 1) for a in range(count)] if self.single else list(combinations(range(count + 1), 2))
        self.loss_until = np.concatenate([np.zeros((1, *table.loss.shape[1:])), table.loss.cumsum(0)])
        self.steps_until = np.concatenate([[0.0], table.steps.cumsum()])
        self.subsets = None if max_groups is None else _subsets(table, max_groups)
        modules = [unit.module for unit in table.units]
        self.layer_starts = np.flatnonzero([i == 0 or modules[i] != modules[i - 1] for i in range(len(modules))])

    def range_costs(self, a: int, b: int, price: float) -> Float[ndarray, "U C"]:
        """Loss plus priced tiles of every candidate over slices a … b - 1."""
        steps = self.steps_until[b] - self.steps_until[a]
        return np.asarray(self.loss_until[b] - self.loss_until[a] + price * steps * self.table.tiles)

    def layer_subset(self, costs: Float[ndarray, "U C"]) -> tuple[Float[ndarray, " L"], Int[ndarray, " L"]]:
        """Best value and best set of groups of each layer."""
        assert self.subsets is not None
        values = np.stack([np.add.reduceat(costs[:, subset].min(1), self.layer_starts) for subset in self.subsets])
        return values.min(0), values.argmin(0)

    def value(self, a: int, b: int, price: float) -> float:
        """Least loss plus priced tiles of one range."""
        costs = self.range_costs(a, b, price)
        if self.subsets is None:
            return float(costs.min(1).sum())
        return float(self.layer_subset(costs)[0].sum())

    def cuts(self, price: float) -> tuple[float, Cuts]:
        """The best segmentation and its value."""
        values = {pair: self.value(*pair, price) for pair in self.pairs}
        count = len(self.table.slices)
        if self.single:
            return sum(values.values()), tuple(self.pairs)
        best = np.full((self.max_ranges + 1, count + 1), np.inf)
        best[:, 0] = 0.0
        before = np.zeros((self.max_ranges + 1, count + 1), int)
        for used in range(1, self.max_ranges + 1):
            for b in range(1, count + 1):
                options = [best[used - 1, a] + values[a, b] for a in range(b)]
                before[used, b] = int(np.argmin(options))
                best[used, b] = options[before[used, b]]
        cuts: list[tuple[int, int]] = []
        used, end = int(np.argmin(best[:, count])), count
        total = float(best[used, count])
        while end:
            start = int(before[used, end])
            cuts.append((start, end))
            used, end = used - 1, start
        return total, tuple(reversed(cuts))

    def spent(self, cuts: Cuts, price: float) -> float:
        """Tiles of the choices that are best at this price."""
        total = 0.0
        for a, b in cuts:
            costs = self.range_costs(a, b, price)
            if self.subsets is not None:
                costs = np.where(self.mask(costs), costs, np.inf)
            row = costs.argmin(1)
            total += float(np.take_along_axis(self.table.tiles, row[:, None], 1).sum()) * (
                self.steps_until[b] - self.steps_until[a]
            )
        return total

    def mask(self, costs: Float[ndarray, "U C"]) -> Bool[ndarray, "U C"]:
        """Candidates of each unit that its layer's best set of groups allows."""
        assert self.subsets is not None
        chosen = self.layer_subset(costs)[1]
        sizes = np.diff([*self.layer_starts, len(costs)])
        return np.asarray(np.stack(self.subsets)[np.repeat(chosen, sizes)])

    def search(self, budget: float, gap_target: float) -> tuple[float, list[tuple[float, Cuts]]]:
        """Bisect the price. The best bound, and distinct segmentations with their prices, the last met first."""
        scale = float(np.abs(self.table.loss).sum(0).max()) / max(
            float(self.table.tiles[self.table.tiles > 0].min(initial=1.0)), 1e-12
        )
        low, high, bound = 0.0, max(scale, 1e-12), -np.inf
        met: dict[Cuts, float] = {}
        for turn in range(_PRICES):
            price = 0.0 if turn == 0 else high if turn == 1 else float(np.sqrt(max(low, high * 1e-9) * high))
            value, cuts = self.cuts(price)
            bound = max(bound, value - price * budget)
            met.pop(cuts, None)
            met[cuts] = price
            over = self.spent(cuts, price) > budget
            if turn == 0 and not over:
                break
            if over:
                low = price
            elif turn:
                high = price
            if turn > 1 and high - low <= 0.1 * gap_target * high:
                break
        return float(bound), [(price, cuts) for cuts, price in reversed(met.items())][:_SEGMENTATIONS]


def _subsets(table: StepTable, max_groups: int) -> list[Bool[ndarray, " C"]]:
    """Sets of candidates that use at most so many orders besides dense's own."""
    group = np.array(table.group)
    free = group == group[table.dense_index]
    others = sorted(set(group[~free].tolist()))
    size = min(max_groups, len(others))
    return [free | np.isin(group, chosen) for chosen in combinations(others, size)]


def _allowed(table: StepTable, relaxed: _Relaxed, cuts: Cuts, price: float) -> list[Any]:
    """Per range, which candidates each unit may take."""
    if relaxed.subsets is None:
        return [np.ones(table.tiles.shape, bool)] * len(cuts)
    return [relaxed.mask(relaxed.range_costs(a, b, price)) for a, b in cuts]


def _exact(
    table: StepTable, cuts: Cuts, allowed: Sequence[Any], density: float, gap_target: float, time_limit_s: float
) -> tuple[Cuts, float, Int[ndarray, "R U"]]:
    """Solve one segmentation."""
    steps = [float(table.steps[a:b].sum()) for a, b in cuts]
    scores = ScoreTable(
        units=tuple(Unit(f"{place}:{unit.module}", unit.heads) for place in range(len(cuts)) for unit in table.units),
        candidates=table.candidates,
        lengths=(table.num_steps,),
        loss=np.concatenate([table.loss[a:b].sum(0) for a, b in cuts]),
        costs={"density": np.concatenate([table.tiles * count for count in steps])[..., None]},
        dense_index=table.dense_index,
        valid=np.concatenate(allowed),
    )
    found = solve(scores, (Budget("density", density),), gap_target=gap_target / 2, time_limit_s=time_limit_s)
    return cuts, found.loss, found.choice.reshape(len(cuts), len(table.units))
