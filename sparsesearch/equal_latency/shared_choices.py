"""What choosing tiles costs a layer, dealt to the heads that really choose there."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from sparsesearch.cost.layer_costs import LayerCosts
from sparsesearch.profiling.record import Profile
from sparsesearch.scores import ScoreTable
from sparsesearch.scoring import Question
from sparsesearch.shapes import Unit

USUAL_HEADS = 8
"""Heads that share a layer's choice in the price of one head, as cost models have it."""


@dataclass(frozen=True)
class SharedChoices:
    """A layer's choice, shared.

    A layer's choice is a few launches for all its heads, so the first head costs nearly as much as all of them together. Prices of single
    heads assume that `USUAL_HEADS` share it; after a search each layer's price is dealt to the heads that the search made dynamic, and the
    search is repeated, so that dynamic rules gather in the layers where they are worth most.

    Attributes:
        seconds: rule kind -> seconds of a call for n heads of every sequence, by n from 1.
        kinds: per candidate, the kind of the rule that chooses, or None.
        layers: per unit, its layer.
        heads: per unit, how many query heads it has.
    """

    seconds: Mapping[str, tuple[float, ...]]
    kinds: tuple[str | None, ...]
    layers: Int[ndarray, " U"]
    heads: Int[ndarray, " U"]

    @classmethod
    def of(cls, profile: Profile, question: Question, table: ScoreTable) -> "SharedChoices | None":
        """None where nothing chooses, or the cost model does not know whole layers."""
        costs, (workload,) = question.cost_model, question.workloads
        rules = [profile.manifest.candidates[profile.labels.index(label)] for label in table.candidates]
        kinds = tuple(rule.kind if rule.dynamic and not rule.reuses else None for rule in rules)
        if not isinstance(costs, LayerCosts) or not any(kinds):
            return None
        units = [unit for unit in table.units if isinstance(unit, Unit)]
        modules = profile.manifest.base_model.modules
        most = max(profile.manifest.base_model.num_heads)
        return cls(
            {
                kind: tuple(
                    costs.estimator_s(kind, workload.prompt_tokens, workload.batch * count)
                    for count in range(1, max(most, USUAL_HEADS) + 1)
                )
                for kind in dict.fromkeys(kinds)
                if kind is not None
            },
            kinds,
            np.array([modules.index(unit.module) for unit in units]),
            np.array([len(unit.heads) for unit in units]),
        )

    def charged(self, table: ScoreTable, choice: Int[ndarray, " U"]) -> ScoreTable:
        """The table with every layer's choosing dealt to the heads that choose under `choice`; a layer without any charges a first one all."""
        extra = np.zeros_like(table.loss)
        for kind, seconds in self.seconds.items():
            columns = np.array([own == kind for own in self.kinds])
            choosing = np.bincount(self.layers, self.heads * columns[choice], minlength=self.layers.max() + 1).astype(
                int
            )
            dealt = np.array([seconds[max(count, 1) - 1] / max(count, 1) for count in choosing])
            per_head = dealt[self.layers] - seconds[USUAL_HEADS - 1] / USUAL_HEADS
            extra[:, columns] += (per_head * self.heads)[:, None]
        costs = {
            name: cost + extra[:, :, None] if name in ("latency", "ttft") else cost
            for name, cost in table.costs.items()
        }
        return replace(table, costs=costs)
