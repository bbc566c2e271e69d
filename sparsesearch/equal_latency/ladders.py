"""A family's plans in order of their predicted latency: what the search finds within a budget, or windows of every width."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from sparsesearch.cost.base import CostModel
from sparsesearch.cost.predict import LayerCosts, predict_layers
from sparsesearch.errors import BudgetInfeasibleError, SpecError, nearest
from sparsesearch.measured_front import FAMILIES, UNIFORM
from sparsesearch.model_shapes import heads_alone
from sparsesearch.plan import Plan, uniform_plan
from sparsesearch.planning import write_plan
from sparsesearch.profiling.record import Profile
from sparsesearch.rules import LengthLaw, Rule
from sparsesearch.rules.sink_window import SinkWindow
from sparsesearch.scores import ScoreTable
from sparsesearch.scoring import Question, score_table
from sparsesearch.search.budget import Budget
from sparsesearch.search.pareto import feasible_bounds
from sparsesearch.search.solve import solve
from sparsesearch.search_space import SearchSpace
from sparsesearch.shapes import Granularity, Unit
from sparsesearch.workload import Workload

USUAL_HEADS = 8
"""Heads that share a layer's choice in the price of one head, as cost models have it."""
MOST_CHARGES = 3
"""Searches that are repeated with the price of choosing dealt anew."""
DEFAULT_FAMILIES = ("mixture", "MoA", "MInference", "DuoAttention", UNIFORM)


class Ladder(Protocol):
    """A family's plans in order of their predicted latency."""

    @property
    def lowest(self) -> float:
        """The smallest bound that has a plan."""

    def at(self, bound: float) -> Plan:
        """The best plan within a bound, a share of dense in (0, 1]."""


class Replay:
    """Attention time of a plan over dense's, by replay of its schedules: the sums that a search works with are off by several per cent."""

    def __init__(self, profile: Profile, workload: Workload, costs: LayerCosts) -> None:
        info = profile.manifest.base_model
        self._shape = heads_alone(info.name_or_path, info.geometry)
        self._workload, self._costs = workload, costs
        self._dense_s = self._seconds(None)

    def __call__(self, plan: Plan) -> float:
        """The share."""
        return self._seconds(plan) / self._dense_s

    def _seconds(self, plan: Plan | None) -> float:
        layers = predict_layers(plan, self._shape, self._workload, self._costs)
        return sum(layer.attention_s + layer.index_s for layer in layers)


class SearchedLadder:
    """The best plans of a search space, by an exact search under a budget in predicted latency."""

    def __init__(self, profile: Profile, question: Question) -> None:
        self._profile, self._question = profile, question
        self._table = score_table(profile, self._question)
        self.lowest = feasible_bounds(self._table, "latency", 2, others=self._question.constraints[1:])[0]
        self._solved: dict[float, Plan] = {}
        self._shared = SharedChoices.of(profile, question, self._table)

    def at(self, bound: float) -> Plan:
        """Solve within max(bound, lowest), once."""
        bound = min(1.0, max(bound, self.lowest))
        if bound not in self._solved:
            self._solved[bound] = self._within(Budget("latency", bound))
        return self._solved[bound]

    def _within(self, budget: Budget) -> Plan:
        table = self._table
        found = solve(table, (budget, *self._question.constraints[1:]))
        for _ in range(MOST_CHARGES if self._shared is not None else 0):
            assert self._shared is not None
            table = self._shared.charged(self._table, found.choice)
            try:
                again = solve(table, (budget, *self._question.constraints[1:]))
            except (
                BudgetInfeasibleError
            ):  # with every layer's choosing paid in full; what is measured will move the bound
                break
            if (again.choice == found.choice).all():
                break
            found = again
        question = replace(self._question, budgets=(budget,))
        return write_plan(self._profile, question, self._table, found.choice, found)


@dataclass(frozen=True)
class SharedChoices:
    """What choosing costs a layer, dealt to the heads that really choose there.

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


@dataclass(frozen=True)
class Menu:
    """A part of the family on trial that is searched by itself, and how much its answers weigh.

    Additive losses flatter some rules: bitmaps are scored on the sequences that they were calibrated on, and heads that attend to nothing
    lose more together than the sum of what each loses alone. Which part of the space is best at a device and a budget is therefore decided by
    replaying each part's plan on calibration sequences that were not profiled.
    """

    bitmaps: bool = True
    silent_heads: bool = True
    dynamic: bool = True
    answer_weight: float = 1.0

    @property
    def label(self) -> str:
        """What it leaves out."""
        left_out = [
            name for name, there in (("bitmaps", self.bitmaps), ("silent heads", self.silent_heads)) if not there
        ]
        menu = f"without {' and '.join(left_out)}" if left_out else "all rules"
        return menu if self.answer_weight == 1 else f"{menu}, answers x {self.answer_weight:g}"

    def allows(self, rule: Rule) -> bool:
        """Whether a rule is in it."""
        silent = rule.rest != "drop"
        return not (
            (rule.needs_calibration and not self.bitmaps)
            or (silent and not self.silent_heads)
            or (rule.dynamic and not self.dynamic)
        )


MENUS = (
    Menu(),
    Menu(bitmaps=False),
    Menu(silent_heads=False),
    Menu(bitmaps=False, silent_heads=False),
    Menu(bitmaps=False, silent_heads=False, answer_weight=3.0),
)
"""Parts without dynamic rules are left to the rivals: windows alone are MoA's."""


class UniformLadder:
    """The same window in every head, from one block up to the prompt; a bound is the share of the widest window."""

    def __init__(self, profile: Profile, workload: Workload) -> None:
        self._profile = profile
        self._blocks = -(-workload.prompt_tokens // profile.manifest.block_tokens)
        self.lowest = 1 / self._blocks

    def at(self, bound: float) -> Plan:
        """A window of that share of the prompt's blocks, with a sink of 64 tokens."""
        manifest = self._profile.manifest
        width = max(1, int(bound * self._blocks + 1e-9)) * manifest.block_tokens
        return uniform_plan(
            manifest.base_model,
            SinkWindow(sink=64, window=LengthLaw(a=width)),
            block_tokens=manifest.block_tokens,
            lengths_tokens=manifest.lengths,
        )


def ladders(profile: Profile, families: Sequence[str], workload: Workload, cost_model: CostModel) -> dict[str, Ladder]:
    """The ladder of every family.

    Raises:
        SpecError: unknown family, or the profile lacks a family's candidates.
    """
    found: dict[str, Ladder] = {}
    for family in families:
        if family == UNIFORM:
            found[family] = UniformLadder(profile, workload)
            continue
        if family not in FAMILIES:
            raise SpecError(f"unknown family {family!r}.{nearest(family, (*FAMILIES, UNIFORM))}")
        space, _, granularity = FAMILIES[family]
        menu = None if space is None else SearchSpace.load(space)
        found[family] = SearchedLadder(profile, _question(menu, granularity, workload, cost_model, 1.0))
    return found


def menu_ladders(
    profile: Profile, family: str, menus: Sequence[Menu], workload: Workload, cost_model: CostModel
) -> dict[str, Ladder]:
    """A ladder for every part of a family's space, by label; parts that leave out nothing that was profiled are not repeated."""
    name, _, granularity = FAMILIES[family]
    manifest = profile.manifest
    whole = manifest.candidates if name is None else SearchSpace.load(name).candidates
    found: dict[str, Ladder] = {}
    seen = set()
    for menu in menus:
        rules = tuple(rule for rule in whole if menu.allows(rule))
        if (rules, menu.answer_weight) not in seen:
            seen.add((rules, menu.answer_weight))
            part = SearchSpace(family, "", menu.label, manifest.block_tokens, granularity, rules)
            question = _question(part, granularity, workload, cost_model, menu.answer_weight)
            found[menu.label] = SearchedLadder(profile, question)
    return found


def _question(
    space: SearchSpace | None, granularity: Granularity, workload: Workload, cost_model: CostModel, answer_weight: float
) -> Question:
    return Question(
        budgets=(Budget("latency", 1.0),),
        space=space,
        granularity=granularity,
        answer_weight=answer_weight,
        cost_model=cost_model,
        workloads=(workload,),
    )
