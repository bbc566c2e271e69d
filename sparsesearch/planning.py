"""From a profile and a budget to a plan: price the candidates, search, write down what was proved."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from sparsesearch.block_mask import BlockGrid
from sparsesearch.cost.base import CostModel, UnitWork, WorkKind
from sparsesearch.errors import SpecError
from sparsesearch.plan import Plan
from sparsesearch.profiling.proxies import length_terms, objective_loss, profile_units
from sparsesearch.profiling.record import Profile
from sparsesearch.rules import Rule
from sparsesearch.scores import ScoreTable
from sparsesearch.search.budget import Budget
from sparsesearch.search.build import plan_from_choice
from sparsesearch.search.pareto import feasible_bounds, pareto
from sparsesearch.search.solve import Solution, solve
from sparsesearch.search_space import SearchSpace
from sparsesearch.shapes import Granularity, Unit

DEFAULT_ANSWER_WEIGHT = 1.0


@dataclass(frozen=True)
class Question:
    """What is asked of a profile.

    Attributes:
        budgets: all must hold at every profiled length.
        space: a subset of the profile's candidates; None takes all.
        granularity: what a unit is.
        objective: a name of `proxies.OBJECTIVES`.
        answer_weight: weight of the answer proxy in `combined`.
        cost_model: prices `latency`; needed only by such budgets.
        sample_weights: of the calibration sequences, in the profile's order; None weighs them equally.
    """

    budgets: tuple[Budget, ...]
    space: SearchSpace | None = None
    granularity: Granularity = "query_head"
    objective: str = "combined"
    answer_weight: float = DEFAULT_ANSWER_WEIGHT
    cost_model: CostModel | None = None
    sample_weights: tuple[float, ...] | None = None


def score_table(profile: Profile, question: Question) -> ScoreTable:
    """Losses and costs of the question's candidates in every unit.

    Raises:
        SpecError: the space has rules that were not profiled; a latency budget has no cost model; kv_fraction is asked per query head.
    """
    rules = profile.manifest.candidates
    columns = list(range(len(rules))) if question.space is None else profile.indices(question.space.candidates)
    metrics = {"density", *(budget.metric for budget in question.budgets)}
    if "kv_fraction" in metrics and question.granularity != "kv_group":
        raise SpecError(
            "kv_fraction must be decided per KV group, because heads that share a KV head share its cache. Pass --unit kv_group."
        )
    if "latency" in metrics and question.cost_model is None:
        raise SpecError("a latency budget must have a cost model. Pass --device cpu or --device roofline:h100.")
    loss = objective_loss(
        profile,
        question.objective,
        question.granularity,
        answer_weight=question.answer_weight,
        sample_weights=question.sample_weights,
    )[:, columns]
    units = profile_units(profile, question.granularity)
    tiles = [length_terms(profile, length, question.granularity).tiles for length in profile.manifest.lengths]
    costs = {"density": np.stack(tiles, -1)[:, columns]}
    if "kv_fraction" in metrics:
        costs["kv_fraction"] = _kv_tokens(profile, units)[:, columns]
    if question.cost_model is not None:
        costs["latency"] = _latency_s(profile, units, costs["density"], columns, question.cost_model)
    return ScoreTable(
        units=units,
        candidates=tuple(rules[column].label for column in columns),
        lengths=profile.manifest.lengths,
        loss=np.where(np.isfinite(loss), loss, 0.0),
        costs=costs,
        dense_index=columns.index(0),
        valid=np.isfinite(loss),
    )


def find_choice(profile: Profile, question: Question) -> tuple[ScoreTable, Solution]:
    """Solve the question exactly on its additive table."""
    table = score_table(profile, question)
    return table, solve(table, question.budgets)


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
            **(provenance or {}),
        },
    )


def _kv_tokens(profile: Profile, units: Sequence[Unit]) -> Float[ndarray, "U C P"]:
    """Keys a KV group must cache, the same for every unit of equal head size."""
    manifest = profile.manifest
    grids = [BlockGrid(length, length, manifest.block_tokens) for length in manifest.lengths]
    kept = np.array([[float(rule.kept_tokens(grid)) for grid in grids] for rule in manifest.candidates])
    size = dict(zip(manifest.base_model.modules, manifest.base_model.head_dim, strict=True))
    return np.stack([kept * size[unit.module] for unit in units])


def _latency_s(
    profile: Profile,
    units: Sequence[Unit],
    tiles: Float[ndarray, "U C P"],
    columns: Sequence[int],
    cost_model: CostModel,
) -> Float[ndarray, "U C P"]:
    """Seconds per unit, candidate and length."""
    manifest = profile.manifest
    size = dict(zip(manifest.base_model.modules, manifest.base_model.head_dim, strict=True))
    works = [
        _work(manifest.candidates[column], float(tiles[row, place, index]), grid, size[unit.module], len(unit.heads))
        for row, unit in enumerate(units)
        for place, column in enumerate(columns)
        for index, grid in enumerate(BlockGrid(length, length, manifest.block_tokens) for length in manifest.lengths)
    ]
    return np.asarray(cost_model.latency_s(works)).reshape(tiles.shape)


def _work(rule: Rule, tiles: float, grid: BlockGrid, head_dim: int, query_heads: int) -> UnitWork:
    """What a unit under a rule computes, in the words of the cost models."""
    kind: WorkKind = "dense" if rule.kind == "dense" else "tiles"
    match rule.rest:
        case "zero":
            kind = "zero"
        case "mean_value":
            kind = "mean_value"
    return UnitWork(
        kind=kind,
        q_len=grid.q_len,
        kv_len=grid.kv_len,
        head_dim=head_dim,
        query_heads=query_heads,
        tiles=tiles,
        query_blocks=grid.num_q_blocks,
        block_tokens=grid.block_tokens,
        estimator=rule.kind if rule.dynamic else None,
    )


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
