"""A family's plans in order of their predicted latency: what the search finds within a budget, or windows of every width."""

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import Protocol

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from sparsesearch.cost.base import CostModel
from sparsesearch.equal_latency.shared_choices import SharedChoices
from sparsesearch.equal_latency.unit_prices import bound_for, replayed
from sparsesearch.errors import BudgetInfeasibleError, SpecError, nearest
from sparsesearch.measured_front import FAMILIES, UNIFORM
from sparsesearch.plan import Plan, uniform_plan
from sparsesearch.planning import write_plan
from sparsesearch.profiling.record import Profile
from sparsesearch.rules import LengthLaw
from sparsesearch.rules.sink_window import SinkWindow
from sparsesearch.scoring import Question, score_table
from sparsesearch.search.budget import Budget
from sparsesearch.search.pareto import feasible_bounds
from sparsesearch.search.solve import Solution, solve
from sparsesearch.search_space import SearchSpace
from sparsesearch.shapes import Granularity
from sparsesearch.workload import Workload

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


class SearchedLadder:
    """The best plans of a search space, by an exact search under a budget in predicted latency."""

    def __init__(self, profile: Profile, question: Question) -> None:
        self._profile, self.question = profile, question
        self._table = replayed(profile, question, score_table(profile, question))
        self.lowest = feasible_bounds(self._table, "latency", 2, others=question.constraints[1:])[0]
        self._solved: dict[float, Solution] = {}
        self._plans: dict[float, Plan] = {}
        self._shared = SharedChoices.of(profile, question, self._table)
        self.columns = tuple(profile.labels.index(label) for label in self._table.candidates)

    def choice_of(self, plan: Plan) -> Int[ndarray, " U"] | None:
        """The candidate of every unit under a plan; None where the plan has a rule that the space lacks."""
        wanted = [tuple(plan.rule(unit.module, head) for head in unit.heads) for unit in self._table.units]
        found = [
            next(
                (index for index, column in enumerate(self.columns) if self._profile.rule_for(unit, column) == own), -1
            )
            for unit, own in zip(self._table.units, wanted, strict=True)
        ]
        return None if -1 in found else np.array(found)

    def bound_of(self, choice: Int[ndarray, " U"]) -> float:
        """The least budget that allows a choice: its summed latency over dense's, each layer's choosing dealt to the heads that choose."""
        table = self._table if self._shared is None else self._shared.charged(self._table, choice)
        return min(1.0, max(table.used("latency", choice).values()))

    def bound_for(self, share: float) -> float | None:
        """The budget whose plans take a share of dense's time by the prices of heads; None where these do not know."""
        return bound_for(self._profile, self.question, self._table, share)

    def around(self, loss: Float[ndarray, "U C"], objective: str, answer_weight: float) -> "SearchedLadder":
        """The same space and prices with other losses, in which answers have that weight."""
        other = copy(self)
        other.question = replace(self.question, objective=objective, answer_weight=answer_weight)
        other._table = replace(self._table, loss=loss)
        other._solved, other._plans = {}, {}
        return other

    def at(self, bound: float) -> Plan:
        """Solve within max(bound, lowest), once."""
        bound = self._allowed(bound)
        if bound not in self._plans:
            question = replace(self.question, budgets=(Budget("latency", bound),))
            found = self._solution(bound)
            self._plans[bound] = write_plan(self._profile, question, self._table, found.choice, found)
        return self._plans[bound]

    def choice_at(self, bound: float) -> Int[ndarray, " U"]:
        """The candidate of every unit in `at`."""
        return self._solution(self._allowed(bound)).choice

    def _allowed(self, bound: float) -> float:
        return min(1.0, max(bound, self.lowest))

    def _solution(self, bound: float) -> Solution:
        if bound not in self._solved:
            self._solved[bound] = self._within(Budget("latency", bound))
        return self._solved[bound]

    def _within(self, budget: Budget) -> Solution:
        table = self._table
        found = solve(table, (budget, *self.question.constraints[1:]))
        for _ in range(MOST_CHARGES if self._shared is not None else 0):
            assert self._shared is not None
            table = self._shared.charged(self._table, found.choice)
            try:
                again = solve(table, (budget, *self.question.constraints[1:]))
            except (
                BudgetInfeasibleError
            ):  # with every layer's choosing paid in full; what is measured will move the bound
                break
            if (again.choice == found.choice).all():
                break
            found = again
        return found


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
        found[family] = SearchedLadder(profile, question_of(menu, granularity, workload, cost_model, 1.0))
    return found


def question_of(
    space: SearchSpace | None, granularity: Granularity, workload: Workload, cost_model: CostModel, answer_weight: float
) -> Question:
    """What is asked of a profile for a ladder; the budget is moved later."""
    return Question(
        budgets=(Budget("latency", 1.0),),
        space=space,
        granularity=granularity,
        answer_weight=answer_weight,
        cost_model=cost_model,
        workloads=(workload,),
    )
