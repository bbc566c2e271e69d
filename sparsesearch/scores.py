"""The score table: what every candidate costs and loses in every unit. The only thing the search sees."""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from sparsesearch.errors import SpecError
from sparsesearch.shapes import Unit


@dataclass(frozen=True)
class ScoreTable:
    """Units x candidates x lengths.

    Losses and costs of different units are summed; that sum is an approximation (units interact), so a plan's true loss and latency are
    always measured beside the prediction.

    Attributes:
        units: U units.
        candidates: C labels, the same menu for every unit.
        lengths: P sequence lengths in tokens.
        loss: quality loss of choosing candidate c in unit u, in the objective's own unit; dense is 0.
        costs: metric -> cost in absolute units: `density` in tiles, `kv_fraction` in cached tokens x KV heads, `latency` in seconds.
        dense_index: which candidate is dense; each budget is a share of its summed cost.
        valid: where a candidate may be chosen at all.
    """

    units: tuple[Unit, ...]
    candidates: tuple[str, ...]
    lengths: tuple[int, ...]
    loss: Float[ndarray, "U C"]
    costs: dict[str, Float[ndarray, "U C P"]]
    dense_index: int
    valid: Bool[ndarray, "U C"] = field(repr=False)

    def __post_init__(self) -> None:
        shape = (len(self.units), len(self.candidates))
        if self.loss.shape != shape or self.valid.shape != shape:
            raise SpecError(
                f"loss and valid must have shape {shape}, but have {self.loss.shape} and {self.valid.shape}."
            )
        for metric, cost in self.costs.items():
            if cost.shape != (*shape, len(self.lengths)):
                raise SpecError(f"cost {metric!r} must have shape {(*shape, len(self.lengths))}, but has {cost.shape}.")
        if not np.isfinite(self.loss[self.valid]).all():
            raise SpecError("every valid candidate must have a finite loss; profile again.")
        if not self.valid[:, self.dense_index].all():
            raise SpecError("dense must be a valid choice in every unit.")

    def dense_cost(self, metric: str) -> Float[ndarray, " P"]:
        """Summed cost of the all-dense plan per length."""
        return np.asarray(self.costs[metric][:, self.dense_index].sum(0))

    def cost_of(self, metric: str, choice: ndarray) -> Float[ndarray, " P"]:
        """Summed cost per length of a plan, as a share of dense."""
        return np.asarray(self.costs[metric][np.arange(len(self.units)), choice].sum(0) / self.dense_cost(metric))

    def loss_of(self, choice: ndarray) -> float:
        """Summed loss of a plan."""
        return float(self.loss[np.arange(len(self.units)), choice].sum())
