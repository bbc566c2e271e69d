"""From a profile and a budget to a plan over ranges of steps, layers and heads."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from sparsesearch.errors import SpecError, nearest
from sparsesearch.plan import BudgetRecord, Certificate, Plan
from sparsesearch.profiling.denoising.record import DenoisingProfile
from sparsesearch.rules import Rule
from sparsesearch.rules.dense import Dense
from sparsesearch.scores import ScoreTable
from sparsesearch.search.budget import Budget
from sparsesearch.search.solve import Solution, solve
from sparsesearch.search.step_ranges import StepSolution
from sparsesearch.search_space import SearchSpace
from sparsesearch.shapes import Unit
from sparsesearch.step_schedule import StepSchedule

SOLVER_LIMIT_S = 3.0
"""For closing the last gap of one plan: several are made and a replay judges them, so the gap that remains is stated and not waited for."""


def step_table(
    profile: DenoisingProfile, *, weight: Float[Tensor, "R L H"] | None = None, space: SearchSpace | None = None
) -> ScoreTable:
    """Losses and tiles of every candidate in every head of every range of steps.

    A unit is one head in one range. Its loss is the relative output error after the projection, times `weight`, times the range's share of
    all steps; its cost is its tiles times its steps.

    Args:
        profile: the profile.
        weight: of each head's error; the profile's sensitivities by default.
        space: a subset of the profile's candidates; all by default.

    Raises:
        SpecError: the space has a candidate that was not profiled.
    """
    manifest, columns = profile.manifest, candidate_columns(profile, space)
    steps = np.array([end - first for first, end in manifest.ranges], float)
    share = torch.tensor(steps / manifest.num_steps)[:, None, None, None]
    scale = (profile.sensitivity if weight is None else weight)[..., None]
    loss = (profile.error * scale * share)[..., columns].double().flatten(0, 2).numpy()
    tiles = profile.tiles.double() * torch.tensor(steps)[:, None, None, None]
    heads = range(manifest.base_model.num_heads[0])
    return ScoreTable(
        units=tuple(
            Unit(f"{place}:{module}", (head,))
            for place in range(len(manifest.ranges))
            for module in manifest.base_model.modules
            for head in heads
        ),
        candidates=tuple(manifest.candidates[column].label for column in columns),
        lengths=(manifest.layout.num_tokens,),
        loss=loss,
        costs={"density": tiles[..., columns].flatten(0, 2).numpy()[..., None]},
        dense_index=columns.index(0),
        valid=np.ones_like(loss, dtype=bool),
    )


def candidate_columns(profile: DenoisingProfile, space: SearchSpace | None) -> list[int]:
    """Where the candidates of a space stand in the profile.

    Raises:
        SpecError: one of them was not profiled.
    """
    labels = [rule.label for rule in profile.manifest.candidates]
    wanted = labels if space is None else list(space.labels)
    for label in wanted:
        if label not in labels:
            raise SpecError(
                f"the profile must have scored {label}, but used space {profile.manifest.space!r}.{nearest(label, labels)}"
            )
    return [labels.index(label) for label in wanted]


def find_step_plan(
    profile: DenoisingProfile,
    density: float,
    *,
    weight: Float[Tensor, "R L H"] | None = None,
    space: SearchSpace | None = None,
    objective: str = "relative output error, weighted by sensitivity",
) -> Plan:
    """The plan of least summed loss whose computed tiles over all steps, dense ones included, are at most `density` of dense attention's.

    Raises:
        BudgetInfeasibleError: no plan fits.
        SpecError: the space was not profiled.
    """
    table = step_table(profile, weight=weight, space=space)
    budget = Budget("density", density)
    solution = solve(table, (budget,), time_limit_s=SOLVER_LIMIT_S)
    columns = candidate_columns(profile, space)
    choice = np.array(columns)[solution.choice]
    return write_step_plan(profile, choice, density=density, solution=solution, objective=objective, space=space)


def write_step_plan(
    profile: DenoisingProfile,
    choice: Int[ndarray, " U"],
    *,
    density: float,
    solution: Solution | StepSolution | None = None,
    objective: str = "",
    space: SearchSpace | None = None,
    merged: Sequence[tuple[int, int]] | None = None,
    provenance: dict[str, Any] | None = None,
) -> Plan:
    """A choice of candidates, one per range and head, as a plan; one range needs no schedule.

    Args:
        profile: the profile.
        choice: a candidate's column per range, layer and head.
        density: the budget it was made for.
        solution: what the search proved about it.
        objective: what it minimises, in words.
        space: the part of the profile's space that was searched.
        merged: ranges of steps, each of which joins some of the profile's; those of the profile by default.
        provenance: what else to record.
    """
    manifest = profile.manifest
    steps = manifest.ranges if merged is None else tuple(merged)
    starts = [first for first, _ in manifest.ranges]
    rules, tables = _tables(profile, choice, [starts.index(first) for first, _ in steps])
    ranges = [(first, end, table) for (first, end), table in zip(steps, tables, strict=True)]
    used = plan_density(profile, choice, steps)
    return Plan(
        base_model=manifest.base_model,
        block_tokens=manifest.block_tokens,
        unit="query_head",
        lengths_tokens=(manifest.layout.num_tokens,),
        rules={**rules, Dense().label: Dense()} if len(ranges) > 1 else rules,
        assignments=tables[0] if len(ranges) == 1 else {},
        schedule=None if len(ranges) == 1 else StepSchedule.of(manifest.num_steps, ranges),
        layout=manifest.layout,
        budgets=(BudgetRecord(metric="density", bound=density, predicted={str(manifest.layout.num_tokens): used}),),
        certificate=None if solution is None else _certificate(solution, objective),
        provenance={
            "objective": objective,
            "space": manifest.space if space is None else space.name,
            "calibration": manifest.calibration,
            "num_steps": manifest.num_steps,
            "captured_steps": [list(steps) for steps in manifest.captured],
            "versions": manifest.versions,
            **(provenance or {}),
        },
    )


def _tables(
    profile: DenoisingProfile, choice: Int[ndarray, " U"], places: Sequence[int]
) -> tuple[dict[str, Rule], list[dict[str, tuple[str, ...]]]]:
    """The rules of a choice by name, and per range of steps what every module's heads follow; `places` are the profile's ranges."""
    model = profile.manifest.base_model
    rules: dict[str, Rule] = {}
    tables = []
    for place, layers in zip(places, choice.reshape(len(places), len(model.modules), model.num_heads[0]), strict=True):
        table = {}
        for module, heads in zip(model.modules, layers, strict=True):
            own = [profile.rule_for(place, module, head, int(column)) for head, column in enumerate(heads)]
            rules |= {rule.label: rule for rule in own}
            table[module] = tuple(rule.label for rule in own)
        tables.append(table)
    return rules, tables


def _certificate(solution: Solution | StepSolution, objective: str) -> Certificate:
    solver = "interval dp + lagrangian + highs" if isinstance(solution, StepSolution) else solution.solver
    return Certificate(
        objective=objective,
        loss=solution.loss,
        lower_bound=solution.lower_bound,
        gap=solution.gap,
        solver=solver,
    )


def plan_density(
    profile: DenoisingProfile, choice: Int[ndarray, " U"], merged: Sequence[tuple[int, int]] | None = None
) -> float:
    """Computed tiles over all steps of a choice (see `write_step_plan`) as a share of dense attention's."""
    manifest = profile.manifest
    rows = torch.as_tensor(choice).view(-1, *profile.tiles.shape[1:3])
    used = whole = 0.0
    for place, (first, end) in enumerate(manifest.ranges):
        inside = [m[0] <= first and end <= m[1] for m in merged or manifest.ranges].index(True)
        tiles = profile.tiles[place].double()
        used += (end - first) * float(tiles.gather(-1, rows[inside][..., None]).sum())
        whole += (end - first) * float(tiles[..., 0].sum())
    return used / whole
