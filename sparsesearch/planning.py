"""From a profile and a budget to a plan: search, and write down what was proved."""

from typing import Any

from jaxtyping import Int
from numpy import ndarray

from sparsesearch.plan import Plan
from sparsesearch.pricing import Pricer
from sparsesearch.profiling.record import Profile
from sparsesearch.scores import ScoreTable
from sparsesearch.scoring import DEFAULT_ANSWER_WEIGHT, Question, priced_lengths, score_table
from sparsesearch.search.build import plan_from_choice
from sparsesearch.search.pareto import feasible_bounds, pareto
from sparsesearch.search.solve import Solution, solve

__all__ = ["DEFAULT_ANSWER_WEIGHT", "Question", "find_choice", "front_rows", "score_table", "write_plan"]


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
    if question.cost_model is not None:
        found["seconds"] = "attention only; decoding halfway through the generated tokens"
    if any(budget.metric == "memory" for budget in question.budgets):
        found["memory"] = "keys, values and weights" if question.weight_bytes else "keys and values; weights unknown"
    pricer = Pricer(profile, question.granularity)
    if law := [length for length in priced_lengths(profile, question) if pricer.is_extrapolated(length)]:
        found["extrapolated"] = (
            f"tiles of dynamic rules at {', '.join(map(str, law))} tokens follow their profiled density"
        )
    return found


def front_rows(profile: Profile, question: Question, *, num_points: int = 24) -> list[dict[str, Any]]:
    """The front over the first budget's metric, from the smallest feasible share to dense, as rows for a CSV file."""
    table = score_table(profile, question)
    swept, *others = question.budgets
    bounds = feasible_bounds(table, swept.metric, num_points, others=others, lengths=swept.lengths)
    front = pareto(table, swept.metric, bounds, others=others, lengths=swept.lengths)
    return [
        {
            "bound": bound,
            "loss": found.loss,
            "lower_bound": found.lower_bound,
            **{f"{name}@{length}": share for name, shares in found.used.items() for length, share in shares.items()},
        }
        for bound, found in zip(bounds, front, strict=True)
    ]
