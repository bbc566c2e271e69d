"""The additive problem of index reuse: what is asked, and the lanes that `search.layer_budget` solves."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from sparsesearch.block_mask import BlockGrid
from sparsesearch.cost.base import CostModel, UnitWork
from sparsesearch.cost.layer_calls import unit_work
from sparsesearch.errors import SpecError
from sparsesearch.profiling.reuse import HeadMap, ReuseScores
from sparsesearch.profiling.reuse_menu import ReuseMenu
from sparsesearch.search.budget import Budget
from sparsesearch.search.layer_dp import Lane

ReuseObjective = Literal["reuse", "hylra", "rals"]
Resource = tuple[str, int]
"""A metric at a length in tokens."""


@dataclass(frozen=True)
class ReuseQuestion:
    """What is asked.

    Attributes:
        menu: candidates, emitters, span and unit. The published objectives use the first emitter alone.
        objective: see the module.
        budgets: on density, or on latency (attention, as shares of dense); for `reuse`.
        cost_model: prices latency. Choosing costs seconds there and nothing in density, so only latency can reward a reuse for it.
        answer_weight: of the answer proxy, as in `proxies.objective_loss`.
        threshold: least overlap of a reuse, for `hylra`.
        max_refreshes: refreshing layers after layer 0, for `rals`.
    """

    menu: ReuseMenu
    objective: ReuseObjective = "reuse"
    budgets: tuple[Budget, ...] = ()
    answer_weight: float = 1.0
    threshold: float = 0.85
    max_refreshes: int = 2
    cost_model: CostModel | None = None

    def __post_init__(self) -> None:
        if self.objective == "reuse" and not self.budgets:
            raise SpecError("the objective reuse must have a budget. Pass --budget density=0.25.")
        if self.objective != "reuse" and self.menu.unit != "layer":
            raise SpecError(f"{self.objective} decides per layer. Pass --unit layer.")
        for budget in self.budgets:
            if budget.metric not in ("density", "latency") or budget.absolute:
                raise SpecError(
                    f"index reuse must be searched under density or latency budgets, as shares of dense, but got {budget}."
                )
            if budget.metric == "latency" and self.cost_model is None:
                raise SpecError("a latency budget must have a cost model. Pass --cost-model h200.")


def resources(question: ReuseQuestion, lengths: tuple[int, ...]) -> list[Resource]:
    """What the budgets limit, in the order of the lanes' costs."""
    found = {
        (budget.metric, length): None for budget in question.budgets for length in lengths if budget.holds_at(length)
    }
    return list(found)


def lanes_of(
    question: ReuseQuestion,
    heads: HeadMap,
    scores: dict[int, ReuseScores],
    norms: dict[int, tuple[float, float]],
) -> list[Lane]:
    """The additive problem: one lane per KV group, or one for whole layers; a resource is one of `resources`."""
    menu, layers = question.menu, question.menu.num_layers
    groups = [heads.lanes[:, lane] for lane in range(menu.num_groups)]
    members: list[list[Int[ndarray, " L"]]] = [[group] for group in groups] if menu.unit == "kv_group" else [groups]
    allowed = np.array([[source in menu.pairs(target) for target in range(layers)] for source in range(layers)])
    every, lanes = np.arange(layers), []
    spent = {place: _spent(question, scores[place[1]], *place) for place in resources(question, tuple(sorted(scores)))}
    for member in members:
        loss: Float[ndarray, "L O"] = np.zeros((layers, len(menu.rules)))
        reuse: Float[ndarray, "L E L"] = np.zeros((layers, len(menu.emitters), layers))
        for length, one in sorted(scores.items()):
            for name, norm, weight in zip(
                ("text", "answer"), norms[length], (1.0, question.answer_weight), strict=True
            ):
                loss = loss + sum(getattr(one, name)[every, group] for group in member) * (weight / norm)
                own = getattr(one, f"reuse_{name}")
                reuse = reuse + sum(own[:, :, every, group] for group in member) * (weight / norm)
        costs = [sum(own[every, group] for group in member) for own, _ in spent.values()]
        reuse_costs = [sum(own[:, :, every, group] for group in member) for _, own in spent.values()]
        for place, rule in enumerate(menu.rules):
            if rule.kind in ("dense", "dense_source"):
                loss[:, place] = 0.0  # dense differs from itself by rounding only
        lanes.append(
            Lane(
                loss=loss,
                cost=np.stack(costs, -1),
                emitters=menu.emitters,
                reuse_loss=np.where(allowed[:, None], reuse, np.inf),
                reuse_cost=np.stack(reuse_costs, -1),
            )
        )
    return lanes


def _spent(
    question: ReuseQuestion, scores: ReuseScores, metric: str, length: int
) -> tuple[Float[ndarray, "L G O"], Float[ndarray, "L E L G"]]:
    """What every candidate and every reuse spends: tiles, or seconds with and without choosing."""
    if metric == "density":
        return scores.tiles, scores.reuse_tiles
    menu, model = question.menu, question.cost_model
    assert model is not None, "checked when the question was made"
    info = menu.profile.manifest.base_model
    grid = BlockGrid(length, length, menu.profile.manifest.block_tokens)

    def seconds(works: list[UnitWork], shape: tuple[int, ...]) -> Float[ndarray, "..."]:
        return np.asarray(model.latency_s(works)).reshape(shape)

    own = [
        unit_work(rule, float(tiles), grid, info.head_dim[layer], menu.group_size)
        for layer in range(menu.num_layers)
        for group in scores.tiles[layer]
        for rule, tiles in zip(menu.rules, group, strict=True)
    ]
    reused = [
        UnitWork(
            "tiles",
            length,
            length,
            info.head_dim[0],
            menu.group_size,
            float(tiles),
            grid.num_q_blocks,
            grid.block_tokens,
        )
        for tiles in scores.reuse_tiles.ravel()
    ]
    return seconds(own, scores.tiles.shape), seconds(reused, scores.reuse_tiles.shape)
