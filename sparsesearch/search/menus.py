"""Layer menus: at most G different launch groups among the units of a layer.

A layer first takes a menu (a set of G groups), then each of its units takes the best candidate on it. Under prices for the
constraints the layers fall apart, and a layer's cheapest menu is found by looking at all of them:

    min over menus S of  Σ_u min_{c: group(c) in S} (loss[u, c] + λ·use[u, c])

So the Lagrangian bound is that of all whole-layer plans, far tighter than the relaxation of one program with a binary per layer
and group, whose layers would take fractions of every group.

Source: Fu et al. 2024, MoA, arXiv:2406.14909, section 4.2 (two rules per layer). Differs: exact, by decomposition.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import combinations

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from sparsesearch.errors import SpecError
from sparsesearch.scores import LayerMenus

MAX_MENUS = 250_000
PADDING = -2
ENTRIES_AT_ONCE = 1 << 21
"""Prices that are gathered at once, which bounds the memory of looking at all menus."""


@dataclass(frozen=True, eq=False)
class Menus:
    """The menus of a knapsack's layers.

    Attributes:
        layer: of each unit; -1 where a unit belongs to none.
        group: of each entry; -1 is on every menu, PADDING is no entry.
        max_groups: groups on a menu.
    """

    layer: Int[ndarray, " U"]
    group: Int[ndarray, "U C"]
    max_groups: int

    @classmethod
    def of(cls, menus: LayerMenus, unit: Int[ndarray, " U"], candidate: Int[ndarray, "U C"]) -> "Menus":
        """The menus of a table for the rows and entries of its knapsack.

        Raises:
            SpecError: there are too many to look at.
        """
        group = np.where(candidate >= 0, menus.group[candidate], PADDING)
        found = cls(menus.layer[unit], group, menus.max_groups)
        if found.num_menus > MAX_MENUS:
            raise SpecError(
                f"at most {MAX_MENUS} menus of launch groups must be possible in a layer, but {found.num_groups} groups make "
                f"{found.num_menus} of {menus.max_groups}. Search fewer rules, or lower --max-groups-per-layer."
            )
        return found

    @cached_property
    def num_groups(self) -> int:
        """Groups that some entry has."""
        return int(self.group.max(initial=-1)) + 1

    @property
    def size(self) -> int:
        """Groups on each menu."""
        return min(self.max_groups, self.num_groups)

    @property
    def num_menus(self) -> int:
        """Menus of a layer."""
        return math.comb(self.num_groups, self.size)

    @cached_property
    def all(self) -> Int[ndarray, "S G"]:
        """Every menu, in lexicographic order."""
        return _combinations(self.num_groups, self.size)

    @cached_property
    def rows(self) -> Int[ndarray, "L n"]:
        """The units of each layer; -1 in padding."""
        layers = [np.flatnonzero(self.layer == layer) for layer in np.unique(self.layer[self.layer >= 0])]
        rows = np.full((len(layers), max(map(len, layers), default=0)), -1, dtype=np.int64)
        for row, layer in zip(rows, layers, strict=True):
            row[: len(layer)] = layer
        return rows

    def per_group(self, priced: Float[ndarray, "U C"]) -> Float[ndarray, "U G"]:
        """The least price of each unit if a group, or what is on every menu, may be taken."""
        least = np.full((len(priced), self.num_groups + 1), np.inf)
        rows, columns = np.nonzero(self.group > PADDING)
        np.minimum.at(least, (rows, self.group[rows, columns]), priced[rows, columns])  # group -1 is the last column
        return np.asarray(np.minimum(least[:, :-1], least[:, -1:]))

    def totals(self, priced: Float[ndarray, "U C"]) -> Float[ndarray, "L S"]:
        """The least price of each layer under each menu."""
        padded = np.concatenate([self.per_group(priced), np.zeros((1, self.num_groups))])[self.rows]  # [L, n, G]
        if not self.num_groups:  # only what is on every menu
            free = np.append(np.where(self.group == -1, priced, np.inf).min(1), 0.0)[self.rows]
            return np.asarray(free.sum(1, keepdims=True))
        if self.size == 1:
            return np.asarray(padded.sum(1))
        first, second = np.triu_indices(self.num_groups, 1)
        pairs = np.minimum(padded[:, :, first], padded[:, :, second])
        begin = np.searchsorted(first, np.arange(self.num_groups))  # where the pairs of later groups begin
        tails = ((least, pairs[:, :, begin[after] :]) for least, after in _prefixes(padded, None, 0, self.size - 2))
        return np.concatenate(
            [(tail if least is None else np.minimum(least, tail)).sum(1) for least, tail in tails], axis=1
        )

    def cheapest(self, priced: Float[ndarray, "U C"]) -> Int[ndarray, " L"]:
        """A menu of least price of each layer: among groups that no other one undercuts, the first of equal ones."""
        if not self.num_groups:
            return np.zeros(len(self.rows), dtype=np.int64)
        of_unit = self.per_group(priced)
        chosen = []
        for rows in self.rows:
            prices = of_unit[rows[rows >= 0]]
            kept = _undominated(prices)
            best = _least(prices, kept[_combinations(len(kept), min(self.size, len(kept)))])
            others = np.setdiff1d(np.arange(self.num_groups), best)[: self.size - len(best)]
            chosen.append(_rank(np.sort(np.concatenate([best, others])).tolist(), self.num_groups))
        return np.array(chosen, dtype=np.int64)

    def open_under(self, chosen: Int[ndarray, " L"]) -> Bool[ndarray, "U C"]:
        """Entries that the menus chosen for the layers have; all of them where a unit has no layer."""
        on_menu = np.ones((len(self.layer) + 1, self.num_groups + 2), dtype=bool)
        for rows, menu in zip(self.rows, self.all[chosen], strict=True):
            on_menu[rows, : self.num_groups] = False
            on_menu[np.ix_(rows, menu)] = True
        opened = np.take_along_axis(on_menu[:-1], np.maximum(self.group, -1) % (self.num_groups + 2), 1)
        return np.asarray(opened & (self.group > PADDING))

    def open_with(self, choice: Int[ndarray, " U"]) -> Bool[ndarray, "U C"]:
        """Entries that units may take while no layer of a plan needs another group than it has."""
        opened = self.group > PADDING
        taken = self.group[np.arange(len(choice)), choice]
        for layer in self.rows:
            rows = layer[layer >= 0]
            opened[rows] &= np.isin(self.group[rows], [-1, *taken[rows].tolist()])
        return np.asarray(opened)

    def allow(self, choice: Int[ndarray, " U"]) -> bool:
        """Whether no layer of a plan has more groups than its menu may hold."""
        taken = self.group[np.arange(len(choice)), choice]
        return all(len(set(taken[rows[rows >= 0]]) - {-1}) <= self.max_groups for rows in self.rows)


def _prefixes(
    prices: Float[ndarray, "L n G"], least: Float[ndarray, "L n 1"] | None, start: int, left: int
) -> Iterator[tuple[Float[ndarray, "L n 1"] | None, int]]:
    """The least prices under the first `left` groups of menus, from `start` on, and the first group that may follow; in lexicographic order."""
    if not left:
        yield least, start
        return
    for group in range(start, prices.shape[2] - left - 1):
        own = prices[:, :, [group]]
        yield from _prefixes(prices, own if least is None else np.minimum(least, own), group + 1, left - 1)


@lru_cache(maxsize=64)
def _combinations(num_groups: int, size: int) -> Int[ndarray, "S size"]:
    """Every choice of so many groups, in lexicographic order."""
    return np.array(list(combinations(range(num_groups), size)), dtype=np.int64).reshape(-1, size)


def _least(prices: Float[ndarray, "n G"], menus: Int[ndarray, "S size"]) -> Int[ndarray, " size"]:
    """The first menu of least price."""
    step = max(1, ENTRIES_AT_ONCE // (prices.shape[0] * menus.shape[1]))
    totals = [prices[:, menus[at : at + step]].min(2).sum(0) for at in range(0, len(menus), step)]
    return np.asarray(menus[np.concatenate(totals).argmin()])


def _rank(menu: Sequence[int], num_groups: int) -> int:
    """The place of a menu, ascending, among all of its size."""
    rank, after = 0, 0
    for place, group in enumerate(menu):
        left = len(menu) - place - 1
        rank += sum(math.comb(num_groups - skipped - 1, left) for skipped in range(after, group))
        after = group + 1
    return rank


def _undominated(prices: Float[ndarray, "n G"]) -> Int[ndarray, " g"]:
    """Groups that no other group undercuts in every unit; of equal ones the first."""
    lower = (prices[:, :, None] <= prices[:, None, :]).all(0)  # [G, G]: the first is nowhere dearer than the second
    first = np.tril(np.ones_like(lower), -1).T  # the first comes before the second
    return np.flatnonzero(~(lower & (~lower.T | first)).any(0))
