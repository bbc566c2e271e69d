"""Sparse-vDiT's own search on a profile: head by head, without an optimiser; the price of a tile is bisected to a budget."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from sparsesearch.denoising.planning import candidate_columns, plan_density, write_step_plan
from sparsesearch.errors import BudgetInfeasibleError, SpecError
from sparsesearch.plan import Plan
from sparsesearch.profiling.denoising.record import DenoisingProfile
from sparsesearch.search.threshold import threshold_choice
from sparsesearch.search_space import SearchSpace

OBJECTIVE = "sparse_vdit"
_HALVINGS = 50


def find_threshold_plan(
    profile: DenoisingProfile,
    density: float | None = None,
    *,
    weight: float | None = None,
    threshold: float | None = None,
    space: SearchSpace | None = None,
) -> Plan:
    """Each head of each range takes the candidate of least error + weight · density, or stays dense where every sum exceeds the threshold.

    Source: Sparse-vDiT, arXiv:2506.03065, section 3.3; `search.threshold` says how errors differ. The paper fixes the weight at 0.5 and has
    no budget; given one, the least weight is taken whose plan fits.

    Args:
        profile: the profile; its sensitivities are not used.
        density: budget over all steps; instead of a weight.
        weight: λ, the price of a whole head's tiles.
        threshold: ε; the weight itself by default, which is what a dense head costs.
        space: a subset of the profile's candidates.

    Raises:
        SpecError: neither or both of density and weight are given, or the space has dense alone.
        BudgetInfeasibleError: no weight gives so few tiles.
    """
    columns = np.array(candidate_columns(profile, space))
    error = profile.error[..., columns].double().numpy()
    share = (profile.tiles / profile.tiles[..., :1])[..., columns].double().numpy()
    dense = int(np.flatnonzero(columns == 0)[0])

    def chosen(price: float) -> Int[ndarray, " U"]:
        limit = price if threshold is None else threshold
        found = threshold_choice(error, share, dense_index=dense, weight=price, threshold=limit)
        return np.asarray(columns[found]).ravel()

    match (density, weight):
        case (None, float(price)):
            choice = chosen(price)
        case (float(budget), None):
            choice, price = _bisected(profile, chosen, budget)
        case _:
            raise SpecError(f"give a density or a weight, and not both, but got {density} and {weight}.")
    used = plan_density(profile, choice)
    return write_step_plan(
        profile,
        choice,
        density=used if density is None else density,
        objective=OBJECTIVE,
        space=space,
        provenance={"weight": price, "threshold": price if threshold is None else threshold},
    )


def _bisected(
    profile: DenoisingProfile, chosen: Callable[[float], Int[ndarray, " U"]], budget: float
) -> tuple[Int[ndarray, " U"], float]:
    """The choice of the least weight within the budget, and that weight."""
    low, high = 1e-9, 1e9
    if (least := plan_density(profile, chosen(high))) > budget:
        raise BudgetInfeasibleError(
            f"density must be at least {least:.4g} with these candidates and this threshold, but the budget is {budget:g}."
        )
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        if plan_density(profile, chosen(middle)) > budget:
            low = middle
        else:
            high = middle
    return chosen(high), high
