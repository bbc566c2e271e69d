"""How far the pruning criteria can be trusted: rank agreement with the loss change that is measured."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from numpy import ndarray
from scipy.stats import kendalltau
from transformers import PreTrainedModel

from sparsesearch.errors import SpecError
from sparsesearch.pruning.live import narrowed
from sparsesearch.pruning.menus import CRITERIA
from sparsesearch.pruning.quality import Batch, dense_rows, mean_distance
from sparsesearch.pruning.record import Kind, PruningProfile
from sparsesearch.pruning.search import PruningQuestion, PruningTable, cut_of, pruning_table
from sparsesearch.search.budget import Budget
from sparsesearch.search.solve import solve

_SHARE = 0.8  # of parameters left, the same for all cuts: else their size alone would rank them
_NOISE = (0.0, 0.5, 1.5, 3.0)


@dataclass(frozen=True)
class CriterionAgreement:
    """Kendall's tau-b of every criterion.

    Attributes:
        tau: criterion -> `single`: over (sublayer, size) cells, against the profile's cuts measured one at a time after refitting;
            `whole`: over whole cuts, not refitted, against held-out data. What goes at each size is the reconstruction criterion's choice;
            a criterion is asked what that size costs.
        single: measured distance of the single cuts.
        whole: per whole cut of equal size, parameters left (share of dense) and measured distance.
    """

    tau: dict[str, dict[str, float]]
    single: list[float]
    whole: list[dict[str, float]]


def validate_criteria(
    model: PreTrainedModel,
    profile: PruningProfile,
    held_out: list[Batch],
    *,
    num_plans: int = 30,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> CriterionAgreement:
    """Compare every criterion with what is measured.

    Raises:
        SpecError: fewer than ten whole cuts.
    """
    if num_plans < 10:
        raise SpecError(f"at least 10 plans must be drawn for a rank correlation, but got {num_plans}.")
    names = [*CRITERIA, *(["learned"] if profile.has("learned") else []), "measured"]
    cells = [(i, kind, place) for (i, kind) in profile.sublayers() for place in profile.measured(i, kind)[0]]
    truth = [loss for (i, kind) in profile.sublayers() for loss in profile.measured(i, kind)[1]]
    losses = {
        name: {(i, kind): [o.loss for o in profile.options(i, kind, name)] for i, kind in profile.sublayers()}
        for name in names
    }
    dense, rng = dense_rows(model, held_out), np.random.default_rng(seed)
    question = PruningQuestion((Budget("params", 0.9),), (1,), "reconstruction")
    table = pruning_table(profile, question)
    choices, whole = [], []
    for index in range(num_plans):
        progress("validate criteria", index, num_plans)
        choice = _draw(table, rng)
        with narrowed(model, cut_of(profile, question, table, choice)):
            found = mean_distance(model, held_out, dense)
        choices.append(choice)
        whole.append({"params": float(table.scores.cost_of("params", choice)[0]), "distance": found})
    progress("validate criteria", num_plans, num_plans)
    tau = {
        name: {
            "single": float(kendalltau([losses[name][(i, kind)][place] for i, kind, place in cells], truth).statistic),
            "whole": float(kendalltau(_sums(losses[name], table, choices), [p["distance"] for p in whole]).statistic),
        }
        for name in names
    }
    return CriterionAgreement(tau, truth, whole)


def _sums(
    losses: Mapping[tuple[int, Kind], Sequence[float]], table: PruningTable, choices: Sequence[Int[ndarray, " U"]]
) -> list[float]:
    """What a criterion says whole cuts cost."""
    return [
        sum(losses[sublayer][int(place)] for sublayer, place in zip(table.sublayers, choice, strict=True))
        for choice in choices
    ]


def _draw(table: PruningTable, rng: np.random.Generator) -> Int[ndarray, " U"]:
    """An optimum of the losses times log-normal noise."""
    loss = table.scores.loss * np.exp(rng.normal(0.0, rng.choice(_NOISE), table.scores.loss.shape))
    return solve(table.scores, [Budget("params", _SHARE)], loss=loss, gap_target=1e-2).choice
