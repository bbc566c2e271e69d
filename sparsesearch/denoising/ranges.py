"""Ranges of steps chosen with the plan: profiled slices are merged by interval DP, so that a plan changes its rules where it pays."""

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sparsesearch.denoising.planning import SOLVER_LIMIT_S, candidate_columns, write_step_plan
from sparsesearch.errors import SpecError
from sparsesearch.plan import Plan
from sparsesearch.profiling.denoising.record import DenoisingProfile
from sparsesearch.search.step_ranges import StepSolution, StepTable, solve_steps
from sparsesearch.search_space import SearchSpace
from sparsesearch.shapes import Unit


def slices_table(
    profile: DenoisingProfile, *, weight: Float[Tensor, "R L H"] | None = None, space: SearchSpace | None = None
) -> StepTable:
    """Losses and tiles of every candidate in every head and profiled slice of steps, counted from the profile's first step.

    Raises:
        SpecError: bitmaps were calibrated for each slice apart, so a merged range has none; or the space was not profiled.
    """
    manifest, columns = profile.manifest, candidate_columns(profile, space)
    if manifest.bitmaps == "range" and len(manifest.ranges) > 1:
        asked = [label for label in manifest.calibrated if space is None or label in space.labels]
        if asked:
            raise SpecError(
                f"merging ranges of steps needs bitmaps that hold in all of them, but those of {asked[0]} differ. "
                "Profile with `bitmaps: run`, or search a space without calibrated rules."
            )
    steps = np.array([end - first for first, end in manifest.ranges], float)
    scale = (profile.sensitivity if weight is None else weight)[..., None]
    share = torch.tensor(steps / manifest.num_steps)[:, None, None, None]
    loss = (profile.error * scale * share)[..., columns].double().flatten(1, 2).numpy()
    orders = [manifest.candidates[column].token_order for column in columns]
    known = {order: index for index, order in enumerate(dict.fromkeys(orders))}
    start = manifest.ranges[0][0]
    return StepTable(
        slices=tuple((first - start, end - start) for first, end in manifest.ranges),
        units=tuple(
            Unit(module, (head,))
            for module in manifest.base_model.modules
            for head in range(manifest.base_model.num_heads[0])
        ),
        candidates=tuple(manifest.candidates[column].label for column in columns),
        loss=loss,
        tiles=profile.tiles.double().mean(0)[..., columns].flatten(0, 1).numpy(),
        dense_index=columns.index(0),
        group=tuple(known[order] for order in orders),
    )


def find_ranges(
    profile: DenoisingProfile,
    density: float,
    *,
    max_ranges: int,
    max_orders: int | None = None,
    weight: Float[Tensor, "R L H"] | None = None,
    space: SearchSpace | None = None,
) -> StepSolution:
    """The best ranges and choices together, with a bound on both; steps count from the profile's first.

    Args:
        profile: one slice of steps per place where a range may end.
        density: budget over all steps.
        max_ranges: at most so many ranges.
        max_orders: at most so many token orders per layer and range besides the model's own.
        weight: of each head's error; the profile's sensitivities by default.
        space: a subset of the profile's candidates.

    Raises:
        BudgetInfeasibleError: no plan fits.
        SpecError: see `slices_table`.
    """
    table = slices_table(profile, weight=weight, space=space)
    return solve_steps(table, density, max_ranges=max_ranges, max_groups=max_orders, time_limit_s=SOLVER_LIMIT_S)


def range_plan(
    profile: DenoisingProfile,
    density: float,
    found: StepSolution,
    *,
    space: SearchSpace | None = None,
    objective: str = "relative output error, weighted by sensitivity; ranges of steps by interval DP",
) -> Plan:
    """What `find_ranges` found, as a plan; profile, density and space are those it was found with."""
    start, columns = profile.manifest.ranges[0][0], np.array(candidate_columns(profile, space))
    return write_step_plan(
        profile,
        columns[found.choice].ravel(),
        density=density,
        solution=found,
        objective=objective,
        space=space,
        merged=[(first + start, end + start) for first, end in found.ranges],
    )


def ends_of(profile: DenoisingProfile, solution: StepSolution) -> tuple[float, ...]:
    """Where the ranges end, as `StepsRequest.ends` says it: to profile once more with bitmaps of their own."""
    total = sum(end - first for first, end in profile.manifest.ranges)
    return tuple(end / total for _, end in solution.ranges)


def spread_sensitivity(coarse: DenoisingProfile, fine: DenoisingProfile) -> DenoisingProfile:
    """The fine profile with sensitivities that were measured for longer ranges: each slice takes those of the range that holds most of it.

    A sensitivity is a change per unit of error times share of steps, so it does not depend on how long a range is.
    """
    overlap = [
        [min(end, other_end) - max(first, other_first) for other_first, other_end in coarse.manifest.ranges]
        for first, end in fine.manifest.ranges
    ]
    found = coarse.sensitivity[torch.tensor(overlap).argmax(1)]
    return replace(fine, sensitivity=found) if fine.folder is None else fine.with_sensitivity(found.contiguous())
