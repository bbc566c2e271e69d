"""Ranges of steps chosen with the plan, and Sparse-vDiT's own rule of choice, on the profile of a tiny transformer."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import STEPS, Run, make_run, profile

from sparsesearch.denoising.judge import static_density
from sparsesearch.denoising.planning import find_step_plan, plan_density, write_step_plan
from sparsesearch.denoising.ranges import ends_of, find_ranges, range_plan, spread_sensitivity
from sparsesearch.denoising.replay import Replay
from sparsesearch.denoising.threshold import find_threshold_plan
from sparsesearch.errors import BudgetInfeasibleError, SpecError
from sparsesearch.plan import Plan
from sparsesearch.profiling.denoising.record import DenoisingProfile

SLICES = tuple((step + 1) / STEPS for step in range(STEPS))


@pytest.fixture(scope="module")
def run() -> Run:
    return make_run()


@pytest.fixture(scope="module")
def fine(run: Run, tmp_path_factory: pytest.TempPathFactory) -> DenoisingProfile:
    """Every step is a slice, and bitmaps are those of the whole run."""
    folder = tmp_path_factory.mktemp("fine") / "p"
    return profile(run, folder, ends=SLICES, captured_per_range=1, bitmaps="run")


@pytest.fixture(scope="module")
def changing(fine: DenoisingProfile) -> DenoisingProfile:
    """The same with errors that make other candidates good in the last two steps."""
    error = fine.error.clone()
    error[4:, ..., 1:] = error[4:, ..., 1:].flip(-1)
    return replace(fine, error=error, folder=None)


def loss_of(made: DenoisingProfile, plan: Plan) -> float:
    """What the profile predicts of a plan, step by step."""
    columns = {rule.label: column for column, rule in enumerate(made.manifest.candidates)}
    for label, places in made.manifest.calibrated.items():
        for table in places:
            columns |= {rule.label: columns[label] for heads in table.values() for rule in heads}
    total = 0.0
    for step in range(STEPS):
        for layer, module in enumerate(made.manifest.base_model.modules):
            for head, rule in enumerate(plan.at_step(step).module_rules(module)):
                total += float(made.error[step, layer, head, columns[rule.label]]) / STEPS
    return total


def segmentations(most: int) -> Iterator[list[tuple[int, int]]]:
    for count in range(most):
        for cuts in combinations(range(1, STEPS), count):
            bounds = [0, *cuts, STEPS]
            yield list(pairwise(bounds))


def test_bitmaps_of_the_run_are_the_same_in_all_slices(fine: DenoisingProfile) -> None:
    assert fine.manifest.bitmaps == "run"
    for places in fine.manifest.calibrated.values():
        assert len(places) == STEPS
        assert all(place == places[0] for place in places)


@pytest.mark.parametrize("max_ranges", [1, 2, 3])
def test_the_plan_has_the_loss_density_and_ranges_it_says(changing: DenoisingProfile, max_ranges: int) -> None:
    plan = range_plan(changing, 0.4, find_ranges(changing, 0.4, max_ranges=max_ranges))
    assert (0 if plan.schedule is None else len(plan.schedule.ranges)) <= max_ranges
    density = static_density(plan, changing.manifest.layout, STEPS)
    assert density is not None
    assert density <= 0.4 + 1e-9
    assert density == pytest.approx(next(iter(plan.budgets[0].predicted.values())), abs=1e-6)
    assert plan.certificate is not None
    assert loss_of(changing, plan) == pytest.approx(plan.certificate.loss, rel=1e-5)
    assert plan.certificate.lower_bound <= plan.certificate.loss


def test_no_segmentation_is_better_than_the_bound(changing: DenoisingProfile) -> None:
    found = find_ranges(changing, 0.4, max_ranges=2)
    best = np.inf
    for ranges in segmentations(2):
        error = torch.stack([changing.error[first:end].sum(0) for first, end in ranges])
        merged = replace(
            changing,
            error=error / torch.tensor([end - first for first, end in ranges])[:, None, None, None],
            tiles=torch.stack([changing.tiles[first] for first, _ in ranges]),
            sensitivity=torch.ones(len(ranges), *changing.sensitivity.shape[1:]),
            manifest=changing.manifest.model_copy(update={"ranges": tuple(ranges)}),
        )
        certificate = find_step_plan(merged, 0.4).certificate
        assert certificate is not None
        best = min(best, certificate.loss)
    assert found.lower_bound <= best * (1 + 1e-6)
    assert found.loss <= best * 1.01
    assert ends_of(changing, found)[-1] == 1
    assert [end for _, end in found.ranges][:-1] == [4], "the planted change"


def test_more_ranges_lose_less_and_one_is_the_plain_search(changing: DenoisingProfile) -> None:
    losses = [find_ranges(changing, 0.4, max_ranges=count).loss for count in (1, 2, 6)]
    assert losses[0] > losses[1] >= losses[2] * (1 - 1e-3)
    by_step = find_step_plan(changing, 0.4).certificate
    assert by_step is not None
    assert losses[2] == pytest.approx(by_step.loss, rel=1e-3)


def test_orders_per_layer_can_be_limited(changing: DenoisingProfile) -> None:
    plan = range_plan(changing, 0.4, find_ranges(changing, 0.4, max_ranges=2, max_orders=1))
    for step in range(STEPS):
        for module in changing.manifest.base_model.modules:
            rules = plan.at_step(step).module_rules(module)
            assert len({rule.token_order for rule in rules if not rule.token_order.is_identity}) <= 1


def test_bitmaps_that_differ_cannot_be_merged(run: Run, tmp_path: Path) -> None:
    apart = profile(run, tmp_path / "p", captured_per_range=1)
    with pytest.raises(SpecError, match="bitmaps: run"):
        range_plan(apart, 0.5, find_ranges(apart, 0.5, max_ranges=1))


def test_sensitivities_of_long_ranges_hold_for_their_slices(fine: DenoisingProfile) -> None:
    coarse = replace(
        fine,
        folder=None,
        sensitivity=torch.arange(8.0).view(2, 2, 2) + 1,
        manifest=fine.manifest.model_copy(update={"ranges": ((0, 2), (2, 6))}),
    )
    found = spread_sensitivity(coarse, replace(fine, folder=None)).sensitivity
    assert torch.equal(found, coarse.sensitivity[[0, 0, 1, 1, 1, 1]])


def test_the_plan_runs(run: Run, fine: DenoisingProfile) -> None:
    replay = Replay.of(run.model, run)
    plans = [range_plan(fine, d, find_ranges(fine, d, max_ranges=2)) for d in (0.3, 0.8)]
    errors = [float(replay.error(plan).mean()) for plan in plans]
    assert errors[0] > errors[1] > 0


def test_threshold_of_the_paper(fine: DenoisingProfile) -> None:
    plan = find_threshold_plan(fine, weight=0.5, threshold=1.0)
    share = fine.tiles / fine.tiles[..., :1]
    wanted = (fine.error + 0.5 * share)[..., 1:].argmin(-1) + 1
    assert plan == write_step_plan(
        fine, wanted.flatten().numpy(), density=plan.budgets[0].bound, objective="sparse_vdit",
        provenance={"weight": 0.5, "threshold": 1.0},
    )  # fmt: skip
    strict = find_threshold_plan(fine, weight=0.5, threshold=1e-9)
    assert set(strict.at_step(0).kind_counts()) == {"dense"}


@pytest.mark.parametrize("density", [0.3, 0.6])
def test_threshold_within_a_budget_never_beats_the_exact_search(fine: DenoisingProfile, density: float) -> None:
    plan, exact = find_threshold_plan(fine, density), find_step_plan(fine, density).certificate
    used = next(iter(plan.budgets[0].predicted.values()))
    assert used <= density
    assert used > density - 0.1
    assert exact is not None
    assert loss_of(fine, plan) >= exact.lower_bound * (1 - 1e-6)


def test_threshold_says_what_is_wrong(fine: DenoisingProfile) -> None:
    with pytest.raises(SpecError, match="not both"):
        find_threshold_plan(fine, 0.5, weight=0.5)
    with pytest.raises(SpecError, match="not both"):
        find_threshold_plan(fine)
    with pytest.raises(BudgetInfeasibleError, match="at least 1"):
        find_threshold_plan(fine, 0.5, threshold=1e-9)
    assert plan_density(fine, np.zeros(fine.error[..., 0].numel(), int)) == 1.0
