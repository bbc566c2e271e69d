"""From a profile and a budget to a plan: search, and write down what was proved."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from sparsesearch.cost.step_work import unpriced
from sparsesearch.loss_growth import beyond
from sparsesearch.plan import Plan
from sparsesearch.pricing import Pricer
from sparsesearch.profiling.record import Profile
from sparsesearch.scores import ScoreTable
from sparsesearch.scoring import DEFAULT_ANSWER_WEIGHT, Question, priced_lengths, score_table
from sparsesearch.search.budget import Budget
from sparsesearch.search.build import plan_from_choice
from sparsesearch.search.pareto import feasible_bounds, pareto
from sparsesearch.search.solve import Solution, solve

__all__ = [
    "DEFAULT_ANSWER_WEIGHT",
    "Question",
    "find_choice",
    "front_rows",
    "score_table",
    "surface_rows",
    "write_plan",
]


def find_choice(profile: Profile, question: Question) -> tuple[ScoreTable, Solution]:
    """Solve the question exactly on its additive table."""
    table = score_table(profile, question)
    return table, solve(table, question.constraints)


def write_plan(
    profile: Profile,
    question: Question,
    table: ScoreTable,
    choice: Int[ndarray, " U"],
    solution: Solution | None,
    provenance: dict[str, Any] | None = None,
) -> Plan:
    """A choice of the table as a plan."""
    manifest = profile.manifest
    columns = [profile.labels.index(label) for label in table.candidates]
    return plan_from_choice(
        table,
        choice,
        lambda unit, candidate: profile.rule_for(unit, columns[candidate]),
        base_model=manifest.base_model,
        block_tokens=manifest.block_tokens,
        granularity=question.granularity,
        budgets=question.budgets,
        solution=solution,
        objective=question.objective,
        cost_model=None if question.cost_model is None else question.cost_model.name,
        provenance={
            "objective": question.objective,
            "answer_weight": question.answer_weight,
            "space": manifest.space if question.space is None else question.space.name,
            "calibration": manifest.calibration,
            "samples_per_length": manifest.num_samples,
            "profile_dtype": manifest.dtype,
            "seed": manifest.seed,
            "versions": manifest.versions,
            **_assumptions(profile, question),
            **(provenance or {}),
        },
    )


def _assumptions(profile: Profile, question: Question) -> dict[str, Any]:
    """What was asked for, and what the prices rest on, beyond a budget at the profiled lengths."""
    found: dict[str, Any] = {}
    if question.workloads:
        found["workloads"] = [str(workload) for workload in question.workloads]
    if question.decode == "separate":
        found["decode"] = "separate rules; a pair loses the sum of what its rules lose in their phases"
    if question.max_groups_per_layer is not None:
        found["max_groups_per_layer"] = question.max_groups_per_layer
    if question.cost_model is not None:
        whole, prompts = question.layer_costs is not None, question.prefill_costs is not None
        scope = (
            "whole model"
            if whole
            else "whole prompts, and of decoded tokens attention"
            if prompts
            else "attention only"
        )
        found["seconds"] = f"{scope}; decoding halfway through the generated tokens"
        rules = profile.manifest.candidates if question.space is None else question.space.candidates
        generates = any(workload.generate_tokens for workload in question.workloads)
        if generates and (kinds := unpriced(rules, question.cost_model)):
            found["choices"] = (
                f"{', '.join(kinds)} while decoding: no price in this cost model, so taken to read every key"
            )
    if any(budget.metric == "memory" for budget in question.budgets):
        found["memory"] = "keys, values and weights" if question.shape else "keys and values; weights unknown"
    lengths = priced_lengths(profile, question)
    pricer = Pricer(profile, question.granularity)
    if law := [length for length in lengths if pricer.is_extrapolated(length)]:
        found["extrapolated"] = (
            f"tiles of dynamic rules at {', '.join(map(str, law))} tokens follow their profiled density"
        )
    contexts = [workload.last_context_tokens for workload in question.workloads if workload.generate_tokens]
    if far := beyond(profile, (*lengths, *contexts)):
        longest = max(profile.manifest.lengths)
        found["losses"] = (
            f"measured up to {longest} tokens; at {', '.join(map(str, far))} tokens taken to grow with the share that a rule leaves out, and rules "
            f"that leave nothing out up to {longest} tokens are not chosen"
        )
    return found


def front_rows(profile: Profile, question: Question, *, num_points: int = 24) -> list[dict[str, Any]]:
    """The front over the first budget's metric, from the smallest feasible share to dense, as rows for a CSV file."""
    table = score_table(profile, question)
    swept, *others = question.constraints
    return _sweep(table, swept, others, num_points)


def surface_rows(
    profile: Profile, question: Question, *, num_points: int = 24, num_levels: int = 5
) -> list[dict[str, Any]]:
    """The front over quality, the first budget's metric and memory: plans that no other one beats in all three.

    Memory is a second axis where caches are decided per KV group, and the first budget is not about it. Each of `num_levels` bounds on
    it gets a sweep of its own; shares and amounts of every metric stand beside the loss.
    """
    swept, *others = question.budgets
    grouped = question.granularity == "kv_group" or question.decode == "separate"
    if not grouped or swept.metric in ("memory", "kv_fraction"):
        return front_rows(profile, question, num_points=num_points)
    asked = replace(question, budgets=(*question.budgets, Budget("memory", 1.0)))
    table = score_table(profile, asked)
    others = [budget for budget in asked.constraints[1:] if budget.metric != "memory" or budget.bound < 1.0]
    rows: list[dict[str, Any]] = []
    for level in feasible_bounds(table, "memory", num_levels, others=others):
        held = Budget("memory", level)
        rows += [{"memory_bound": level, **row} for row in _sweep(table, swept, [*others, held], num_points)]
    return _undominated(rows, swept.metric)


def _sweep(table: ScoreTable, swept: Budget, others: Sequence[Budget], num_points: int) -> list[dict[str, Any]]:
    bounds = feasible_bounds(table, swept.metric, num_points, others=others, lengths=swept.lengths)
    front = pareto(table, swept.metric, bounds, others=others, lengths=swept.lengths)
    return [
        {
            "bound": bound,
            "loss": found.loss,
            "lower_bound": found.lower_bound,
            **{
                f"{name}@{length or 'workload'}": share
                for name, shares in found.used.items()
                for length, share in shares.items()
            },
            **_amounts(table, found),
        }
        for bound, found in zip(bounds, front, strict=True)
    ]


def _amounts(table: ScoreTable, found: Solution) -> dict[str, float]:
    """Seconds and bytes of a plan, by metric and length."""
    units = {"latency": "s", "ttft": "s", "tpot": "s", "memory": "bytes"}
    return {
        f"{metric}_{unit}@{length or 'workload'}": amount
        for metric, unit in units.items()
        if metric in table.costs
        for length, amount in table.used(metric, found.choice, absolute=True).items()
    }


def _undominated(rows: list[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """Rows that no other one equals or beats in loss, in the swept metric and in memory; of equal ones the first."""

    def largest(row: dict[str, Any], name: str) -> float:
        return max(float(value) for key, value in row.items() if key.startswith(f"{name}@"))

    points = np.array([[row["loss"], largest(row, metric), largest(row, "memory")] for row in rows])
    kept = []
    for index, point in enumerate(points):
        beaten = (points <= point).all(1) & ((points < point).any(1) | (np.arange(len(points)) < index))
        if not beaten.any():
            kept.append(rows[index])
    return kept
