"""The score table: what every candidate costs and loses in every unit. The only thing the search sees."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from sparsesearch.errors import SpecError

WHOLE = 0
"""The point of a metric that has no sequence length: a workload's total, or parameters."""


@dataclass(frozen=True, eq=False)
class LayerMenus:
    """At most `max_groups` different launch groups among the units of a layer, where a backend launches each group by itself.

    Attributes:
        layer: of each unit; -1 where a unit is not limited.
        group: launch group of each candidate; -1 launches nothing and does not count.
        max_groups: at least 1.
    """

    layer: Int[ndarray, " U"]
    group: Int[ndarray, " C"]
    max_groups: int

    def __post_init__(self) -> None:
        if self.max_groups < 1:
            raise SpecError(f"a layer must be allowed at least 1 launch group, but got {self.max_groups}.")


@dataclass(frozen=True)
class ScoreTable:
    """Units x candidates, with a loss and any number of named costs.

    A unit is whatever receives one decision, and its address means nothing to the search: a `Unit` (heads under one attention rule), the
    decode phase of one, a block of an MLP whose candidates are widths, a head at one denoising step. Units of different kinds share a
    table; the columns are the union of their menus, and `valid` says which of them a unit may take, so menus may be ragged. One column,
    `dense_index`, is open to every unit and means "as in the unmodified model": it has loss 0, and budgets are shares of its summed cost.

    A cost is any name with an amount per unit, candidate and point. Points are sequence lengths (`lengths`) unless `points` names others:
    `points={"params": (WHOLE,)}` prices a metric once, `{"ttft": (4096, 32768)}` at lengths that were never profiled. Units that do
    not spend a metric cost 0 in it. `fixed` is what every plan spends besides its units (weights in memory, the linear layers' seconds);
    it belongs to the dense plan too, so that shares and absolute budgets speak of the whole.

    Losses and costs of different units are summed; that sum is an approximation (units interact), so a plan's true loss and latency are
    always measured beside the prediction.

    Attributes:
        units: U addresses.
        candidates: C labels.
        lengths: P sequence lengths in tokens.
        loss: quality loss of choosing candidate c in unit u, in the objective's own unit; dense is 0.
        costs: metric -> cost in absolute units: `density` in tiles, `kv_fraction` in cached elements, `latency` in seconds.
        dense_index: which candidate is dense; each budget is a share of its summed cost.
        valid: where a candidate may be chosen at all.
        points: metric -> the length of each entry of its last axis, where it is not `lengths`. A length may stand there more than once
            (two batch sizes); a budget on it then holds for each.
        fixed: metric -> cost per point that no choice changes; 0 where not named.
        menus: what couples the units of a layer; None where nothing does.
    """

    units: tuple[Any, ...]
    candidates: tuple[str, ...]
    lengths: tuple[int, ...]
    loss: Float[ndarray, "U C"]
    costs: dict[str, Float[ndarray, "U C P"]]
    dense_index: int
    valid: Bool[ndarray, "U C"] = field(repr=False)
    points: dict[str, tuple[int, ...]] = field(default_factory=dict)
    fixed: dict[str, Float[ndarray, " P"]] = field(default_factory=dict)
    menus: LayerMenus | None = None

    def __post_init__(self) -> None:
        shape = (len(self.units), len(self.candidates))
        if self.loss.shape != shape or self.valid.shape != shape:
            raise SpecError(
                f"loss and valid must have shape {shape}, but have {self.loss.shape} and {self.valid.shape}."
            )
        if self.menus is not None and (self.menus.layer.shape, self.menus.group.shape) != ((shape[0],), (shape[1],)):
            raise SpecError(
                f"menus must have a layer for each of {shape[0]} units and a group for each of {shape[1]} candidates."
            )
        for metric, cost in self.costs.items():
            expected = (*shape, len(self.points_of(metric)))
            if cost.shape != expected or self.fixed_cost(metric).shape != expected[2:]:
                raise SpecError(f"cost {metric!r} must have shape {expected}, but has {cost.shape}.")
        if unknown := {*self.points, *self.fixed} - set(self.costs):
            raise SpecError(f"points and fixed must name metrics of `costs`, but name {min(unknown)!r}.")
        if not np.isfinite(self.loss[self.valid]).all():
            raise SpecError("every valid candidate must have a finite loss; profile again.")
        if not self.valid[:, self.dense_index].all():
            raise SpecError("dense must be a valid choice in every unit.")

    def points_of(self, metric: str) -> tuple[int, ...]:
        """Where a metric is priced: the length of each entry of its last axis, WHOLE if it has none."""
        return self.points.get(metric, self.lengths)

    def fixed_cost(self, metric: str) -> Float[ndarray, " P"]:
        """What every plan spends besides its units."""
        return self.fixed.get(metric, np.zeros(len(self.points_of(metric))))

    def dense_cost(self, metric: str) -> Float[ndarray, " P"]:
        """Cost of the all-dense plan per point."""
        return np.asarray(self.costs[metric][:, self.dense_index].sum(0) + self.fixed_cost(metric))

    def cost_of(self, metric: str, choice: ndarray) -> Float[ndarray, " P"]:
        """Cost per point of a plan, as a share of dense."""
        spent = self.costs[metric][np.arange(len(self.units)), choice].sum(0) + self.fixed_cost(metric)
        return np.asarray(spent / self.dense_cost(metric))

    def used(self, metric: str, choice: ndarray, *, absolute: bool = False) -> dict[int, float]:
        """The cost by length, as a share of dense or in the metric's own unit; of points at one length the largest counts."""
        amounts = self.cost_of(metric, choice) * (self.dense_cost(metric) if absolute else 1.0)
        largest: dict[int, float] = {}
        for length, amount in zip(self.points_of(metric), amounts.tolist(), strict=True):
            largest[length] = max(amount, largest.get(length, 0.0))
        return largest

    def loss_of(self, choice: ndarray) -> float:
        """Summed loss of a plan."""
        return float(self.loss[np.arange(len(self.units)), choice].sum())
