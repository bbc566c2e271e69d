"""A family's plans in order of their predicted latency: what the search finds within a budget, or windows of every width."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from sparsesearch.cost.base import CostModel
from sparsesearch.cost.predict import LayerCosts, predict_layers
from sparsesearch.errors import SpecError, nearest
from sparsesearch.measured_front import FAMILIES, UNIFORM
from sparsesearch.model_shapes import heads_alone
from sparsesearch.plan import Plan, uniform_plan
from sparsesearch.planning import write_plan
from sparsesearch.profiling.record import Profile
from sparsesearch.rules import LengthLaw
from sparsesearch.rules.sink_window import SinkWindow
from sparsesearch.scoring import Question, score_table
from sparsesearch.search.budget import Budget
from sparsesearch.search.pareto import feasible_bounds
from sparsesearch.search.solve import solve
from sparsesearch.search_space import SearchSpace
from sparsesearch.workload import Workload

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

    def __init__(self, profile: Profile, family: str, workload: Workload, cost_model: CostModel) -> None:
        space, _, granularity = FAMILIES[family]
        self._profile = profile
        self._question = Question(
            budgets=(Budget("latency", 1.0),),
            space=None if space is None else SearchSpace.load(space),
            granularity=granularity,
            cost_model=cost_model,
            workloads=(workload,),
        )
        self._table = score_table(profile, self._question)
        self.lowest = feasible_bounds(self._table, "latency", 2, others=self._question.constraints[1:])[0]
        self._solved: dict[float, Plan] = {}

    def at(self, bound: float) -> Plan:
        """Solve within max(bound, lowest), once."""
        bound = min(1.0, max(bound, self.lowest))
        if bound not in self._solved:
            self._solved[bound] = self._within(Budget("latency", bound))
        return self._solved[bound]

    def _within(self, budget: Budget) -> Plan:
        found = solve(self._table, (budget, *self._question.constraints[1:]))
        question = replace(self._question, budgets=(budget,))
        return write_plan(self._profile, question, self._table, found.choice, found)


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
    for family in families:
        if family not in (*FAMILIES, UNIFORM):
            raise SpecError(f"unknown family {family!r}.{nearest(family, (*FAMILIES, UNIFORM))}")
    return {
        family: UniformLadder(profile, workload)
        if family == UNIFORM
        else SearchedLadder(profile, family, workload, cost_model)
        for family in families
    }
