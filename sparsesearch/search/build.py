"""From the search's choice to a plan."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Int
from numpy import ndarray

from sparsesearch.errors import PlanMismatchError
from sparsesearch.plan import BaseModelInfo, BudgetRecord, Certificate, Plan
from sparsesearch.rules import Rule
from sparsesearch.rules.dense import Dense
from sparsesearch.scores import ScoreTable
from sparsesearch.search.budget import PRICED_BY_DEVICE, Budget
from sparsesearch.search.solve import Solution, relative_gap
from sparsesearch.shapes import Granularity, Unit


def plan_from_choice(
    table: ScoreTable,
    choice: Int[ndarray, " U"],
    rules_for: Callable[[Unit, int], Sequence[Rule]],
    *,
    base_model: BaseModelInfo,
    block_tokens: int,
    granularity: Granularity,
    budgets: Sequence[Budget],
    solution: Solution | None = None,
    objective: str = "additive loss",
    cost_model: str | None = None,
    provenance: dict[str, Any] | None = None,
) -> Plan:
    """Write a choice as a plan. Only rules in use are written; heads that no unit covers stay dense.

    Args:
        table: whose units, candidates and costs the choice refers to.
        choice: candidate index per unit.
        rules_for: the rules of a unit's heads under a candidate; calibrated rules differ from head to head.
        base_model: which model the plan is for.
        block_tokens: side of a tile.
        granularity: what the units are.
        budgets: what was asked for; the plan records what it uses of each.
        solution: what was proved about the choice. A choice that was refined by true evaluations afterwards keeps the
            bound but has its own loss.
        objective: name of the loss that was minimised.
        cost_model: who priced `latency`.
        provenance: where everything came from.

    Raises:
        PlanMismatchError: a unit names a module or head that the model lacks.
    """
    rules = [rules_for(unit, int(candidate)) for unit, candidate in zip(table.units, choice, strict=True)]
    assignments = _assignments(table.units, rules, base_model)
    used = {name for names in assignments.values() for name in names}
    return Plan(
        base_model=base_model,
        block_tokens=block_tokens,
        unit=granularity,
        lengths_tokens=table.lengths,
        rules={
            rule.label: rule for rule in [Dense(), *(rule for heads in rules for rule in heads)] if rule.label in used
        },
        assignments=assignments,
        budgets=tuple(_record(table, choice, budget, cost_model) for budget in budgets),
        certificate=None if solution is None else _certificate(table, choice, solution, objective),
        provenance=provenance or {},
    )


def _assignments(
    units: Sequence[Unit], rules: Sequence[Sequence[Rule]], base_model: BaseModelInfo
) -> dict[str, tuple[str, ...]]:
    """The rule's label of every head, for the modules that some unit covers."""
    num_heads = dict(zip(base_model.modules, base_model.num_heads, strict=True))
    labels: dict[str, list[str]] = {}
    for unit, rule in zip(units, rules, strict=True):
        if unit.module not in num_heads or max(unit.heads) >= num_heads[unit.module]:
            raise PlanMismatchError(
                f"unit {unit} must be a part of {base_model.name_or_path}, but that has no such head. "
                "Profile this model, or give the model that was profiled."
            )
        names = labels.setdefault(unit.module, [Dense().label] * num_heads[unit.module])
        for head, own in zip(unit.heads, rule, strict=True):
            names[head] = own.label
    return {module: tuple(labels[module]) for module in base_model.modules if module in labels}


def _record(table: ScoreTable, choice: Int[ndarray, " U"], budget: Budget, cost_model: str | None) -> BudgetRecord:
    used = table.used(budget.metric, choice, absolute=budget.absolute)
    return BudgetRecord(
        metric=budget.metric,
        bound=budget.bound,
        absolute=budget.absolute,
        predicted={str(length or "workload"): value for length, value in used.items() if budget.holds_at(length)},
        cost_model=cost_model if budget.metric in PRICED_BY_DEVICE else None,
    )


def _certificate(table: ScoreTable, choice: Int[ndarray, " U"], solution: Solution, objective: str) -> Certificate:
    """The bound of the search beside the loss of the choice that is written."""
    same = bool((choice == solution.choice).all())
    loss = solution.loss if same else table.loss_of(choice)
    return Certificate(
        objective=objective,
        loss=loss,
        lower_bound=solution.lower_bound,
        gap=solution.gap if same else relative_gap(loss, solution.lower_bound),
        solver=solution.solver if same else f"{solution.solver} + refinement",
    )
