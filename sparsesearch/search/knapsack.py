"""The problem behind every search: a multiple-choice knapsack with several constraints.

    minimise Σ_u loss[u, x_u]   subject to   Σ_u use[k, u, x_u] <= limit[k]   for every constraint k

A constraint is one metric at one point; `use` is a unit's share of the dense plan's cost, what no choice changes being
spread evenly over the units. Heads of a KV group are coupled by making the group the unit, units of a layer by menus.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from sparsesearch.errors import SpecError, nearest
from sparsesearch.scores import ScoreTable
from sparsesearch.search.budget import Budget
from sparsesearch.search.menus import Menus

TOLERANCE = 1e-12
"""How far a sum of shares may exceed its limit: the rounding of the sum itself."""


@dataclass(frozen=True)
class Knapsack:
    """One choice per unit. Letters: U units, C candidates, K constraints.

    Units stand in an order that depends on their content alone, so that the order of heads cannot change a result.
    Candidates that are invalid, or beaten in loss and in all uses by another one of the same unit, are gone (of equal
    ones dense stays, else the first); the rest stand first, padded to equal count.

    Attributes:
        loss: inf in padding.
        use: share of the dense plan's cost; 0 in padding.
        limit: bound of each constraint.
        names: constraint k as (metric, length in tokens).
        candidate: the table's candidate index of each entry; -1 in padding.
        unit: the table's unit index of each row.
        owner: which of the budgets sets each limit.
        menus: launch groups per layer, where they are limited.
    """

    loss: Float[ndarray, "U C"]
    use: Float[ndarray, "K U C"]
    limit: Float[ndarray, " K"]
    names: tuple[tuple[str, int], ...]
    candidate: Int[ndarray, "U C"]
    unit: Int[ndarray, " U"]
    owner: tuple[int, ...] = ()
    menus: Menus | None = None

    @property
    def allowed(self) -> Bool[ndarray, "U C"]:
        """Entries that are not padding."""
        return self.candidate >= 0

    def loss_of(self, choice: Int[ndarray, " U"]) -> float:
        """Summed loss."""
        return float(self.loss[np.arange(len(choice)), choice].sum())

    def use_of(self, choice: Int[ndarray, " U"]) -> Float[ndarray, " K"]:
        """Summed use per constraint."""
        return np.asarray(self.use[:, np.arange(len(choice)), choice].sum(1))

    def fits(self, choice: Int[ndarray, " U"]) -> bool:
        """Whether a plan keeps every limit and every layer's menu."""
        within = bool((self.use_of(choice) <= self.limit + TOLERANCE).all())
        return within and (self.menus is None or self.menus.allow(choice))

    def cheapest(self, priced: Float[ndarray, "U C"]) -> tuple[Int[ndarray, " U"], Float[ndarray, "U C"]]:
        """The plan of least price among all that keep the menus.

        Returns:
            The plan, and the prices with those entries at inf that its menus do not have.
        """
        if self.menus is not None:
            priced = np.where(self.menus.open_under(self.menus.cheapest(priced)), priced, np.inf)
        return priced.argmin(1), priced

    def with_limit(self, limit: Float[ndarray, " K"]) -> "Knapsack":
        """The same units under other limits."""
        return replace(self, limit=limit)

    def restore(self, choice: Int[ndarray, " U"]) -> Int[ndarray, " U"]:
        """A choice in the table's own order of units and candidates."""
        restored = np.empty(len(choice), dtype=np.int64)
        restored[self.unit] = self.candidate[np.arange(len(choice)), choice]
        return restored


def knapsack_of(table: ScoreTable, budgets: Sequence[Budget], *, loss: Float[ndarray, "U C"] | None = None) -> Knapsack:
    """State a table and its budgets as a knapsack.

    Args:
        table: losses and costs.
        budgets: all of them must hold; of two on the same metric and length the tighter one counts.
        loss: replaces the table's losses, for example another weighting of the objectives.

    Raises:
        SpecError: there is no budget, the table lacks its metric or length, or a cost is negative or not finite.
    """
    places = _places(table, budgets)
    if not places:
        raise SpecError("at least one budget must be given, such as density=0.25.")
    losses = table.loss if loss is None else loss
    if losses.shape != table.valid.shape or not np.isfinite(losses[table.valid]).all():
        raise SpecError(f"loss must be finite and of shape {table.valid.shape}, but has shape {losses.shape}.")
    use = np.stack([_share(table, metric, position) for metric, position in places])
    dense_first = np.argsort(np.arange(len(table.candidates)) != table.dense_index, kind="stable")
    group = None if table.menus is None else table.menus.group[dense_first]
    problem = reduced(np.where(table.valid, losses, np.inf)[:, dense_first], use[:, :, dense_first], group)
    candidate = np.where(problem.candidate >= 0, dense_first[problem.candidate], -1)
    menus = None if table.menus is None else Menus.of(table.menus, problem.unit, candidate)
    names = tuple((metric, table.points_of(metric)[position]) for metric, position in places)
    limit, owner = _tightest(table, budgets)
    return replace(problem, limit=limit, names=names, candidate=candidate, owner=owner, menus=menus)


def limits_of(table: ScoreTable, budgets: Sequence[Budget]) -> Float[ndarray, " K"]:
    """The limit of each constraint of `knapsack_of`, as a share of dense."""
    return _tightest(table, budgets)[0]


def _tightest(table: ScoreTable, budgets: Sequence[Budget]) -> tuple[Float[ndarray, " K"], tuple[int, ...]]:
    """Of the budgets on each constraint the smallest share of dense, and which budget that is."""
    limits = []
    for metric, position in _places(table, budgets):
        length, dense = table.points_of(metric)[position], float(table.dense_cost(metric)[position])
        limits.append(
            min(
                (budget.bound / dense if budget.absolute else budget.bound, index)
                for index, budget in enumerate(budgets)
                if budget.metric == metric and budget.holds_at(length)
            )
        )
    return np.array([limit for limit, _ in limits]), tuple(owner for _, owner in limits)


def _places(table: ScoreTable, budgets: Sequence[Budget]) -> list[tuple[str, int]]:
    """The constraints: every metric and position on its last axis that some budget limits."""
    places: dict[tuple[str, int], None] = {}
    for budget in budgets:
        metric = budget.metric
        if metric not in table.costs:
            raise SpecError(f"{budget}: the score table must price {metric!r}.{nearest(metric, table.costs)}")
        known = table.points_of(metric)
        if missing := set(budget.lengths or ()) - set(known):
            raise SpecError(f"{budget}: length {min(missing)} must be one of the priced lengths {list(known)}.")
        places |= {(metric, position): None for position, length in enumerate(known) if budget.holds_at(length)}
    return list(places)


def _share(table: ScoreTable, metric: str, position: int) -> Float[ndarray, "U C"]:
    dense, fixed = table.dense_cost(metric)[position], table.fixed_cost(metric)[position] / len(table.units)
    length, cost = table.points_of(metric)[position], np.where(table.valid, table.costs[metric][:, :, position], 0.0)
    if not np.isfinite(cost).all() or cost.min() < 0 or not dense > 0:
        raise SpecError(
            f"{metric} at length {length} must be finite, non-negative, and positive for dense; "
            f"got minimum {cost.min():g} and dense {dense:g}. Score the profile again."
        )
    return np.asarray((cost + fixed) / dense)


def reduced(loss: Float[ndarray, "U C"], use: Float[ndarray, "K U C"], group: Int[ndarray, " C"] | None) -> Knapsack:
    """Drop what cannot matter, move the rest to the front, and order the units by content."""
    kept = ~dominated(loss, use, group)
    order = np.argsort(~kept, axis=1, kind="stable")[:, : kept.sum(1).max()]
    kept = np.take_along_axis(kept, order, 1)
    loss = np.where(kept, np.take_along_axis(loss, order, 1), np.inf)
    use = np.where(kept, np.take_along_axis(use, order[None], 2), 0.0)
    candidate = np.where(kept, order, -1)
    content = np.concatenate([loss, *use], axis=1) + 0.0  # -0.0 becomes 0.0
    unit = np.array(sorted(range(len(loss)), key=lambda row: content[row].tobytes()))
    return Knapsack(loss[unit], use[:, unit], np.ones(len(use)), (), candidate[unit], unit)


def dominated(
    loss: Float[ndarray, "U C"], use: Float[ndarray, "K U C"], group: Int[ndarray, " C"] | None = None
) -> Bool[ndarray, "U C"]:
    """Entries of infinite loss, and those that another entry of the unit equals or beats in loss and in every use.

    Of equal entries the first one stays. With launch groups, an entry is beaten only by those that are on every menu it is on.
    """
    num_candidates = loss.shape[1]
    values = [loss, *use]
    result: Bool[ndarray, "U C"] = ~np.isfinite(loss)
    for rival in range(num_candidates):
        beaten = np.isfinite(loss[:, [rival]]) & ~result[:, [rival]]
        equal = np.ones_like(result)
        for value in values:
            beaten = beaten & (value[:, [rival]] <= value)
            equal &= value[:, [rival]] == value
        earlier = np.arange(num_candidates) < rival
        beaten &= ~(equal & earlier)
        beaten[:, rival] = False
        if group is not None and group[rival] != -1:
            beaten &= group == group[rival]
        result |= beaten
    return result
