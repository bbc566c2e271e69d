"""Plans over steps and heads: budgets, replay, sensitivities, the verdict and its controls."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import STEPS, Run, make_run, profile, request_of

from sparsesearch.denoising.controls import permuted_plan
from sparsesearch.denoising.corridor import Corridor
from sparsesearch.denoising.judge import judge, static_density
from sparsesearch.denoising.judgement import Judgement, Variant
from sparsesearch.denoising.planning import find_step_plan, plan_density, step_table, write_step_plan
from sparsesearch.denoising.replay import Replay, measure_sensitivity
from sparsesearch.denoising.weighting import STARTS, Weighting, descend
from sparsesearch.errors import BudgetInfeasibleError
from sparsesearch.layout import video_layout
from sparsesearch.plan import Plan
from sparsesearch.profiling.denoising.record import DenoisingProfile


@pytest.fixture(scope="module")
def run() -> Run:
    return make_run()


@pytest.fixture(scope="module")
def made(run: Run, tmp_path_factory: pytest.TempPathFactory) -> DenoisingProfile:
    folder = tmp_path_factory.mktemp("profile") / "p"
    return measure_sensitivity(profile(run, folder, captured_per_range=1), Replay.of(run.model, run), density=0.5)


@pytest.mark.parametrize("density", [0.2, 0.4, 0.6, 1.0])
def test_density_holds_over_all_steps(made: DenoisingProfile, density: float) -> None:
    plan = find_step_plan(made, density)
    found = static_density(plan, made.manifest.layout, STEPS)
    assert found is not None
    assert found <= density + 1e-9
    assert found == pytest.approx(plan.budgets[0].predicted[str(made.manifest.layout.num_tokens)], abs=1e-6)
    assert plan.certificate is not None
    assert plan.certificate.lower_bound <= plan.certificate.loss


def test_a_larger_budget_loses_less(made: DenoisingProfile) -> None:
    losses = [plan.certificate.loss for d in (0.3, 0.5, 0.8) if (plan := find_step_plan(made, d)).certificate]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[2]


def test_sensitivities_predict_single_changes(run: Run, made: DenoisingProfile) -> None:
    """The loss of a plan that changes one head is the change of the samples that its replay finds, up to the shrinkage to its layer."""
    replay, table = Replay.of(run.model, run), step_table(made)
    assert DenoisingProfile.load(made.folder or Path()).sensitivity.equal(made.sensitivity)
    assert (made.sensitivity > 0).all()
    ratios = []
    for unit in range(len(table.units)):
        column = int(np.argsort(table.loss[unit])[len(table.candidates) // 2])
        choice = np.zeros(len(table.units), int)
        choice[unit] = column
        changed = float(replay.error(write_step_plan(made, choice, density=1.0)).mean())
        ratios.append(table.loss[unit, column] / changed)
    assert 0.3 < np.median(ratios) < 3


def test_the_corridor_takes_what_the_replay_takes(run: Run, tmp_path: Path) -> None:
    corridor = Corridor(run.model, run, request_of(run, captured_per_range=1), tmp_path)
    found = corridor.profile(density=0.5, per_head=False)
    rivals = {"all dense": find_step_plan(found, 1.0), "poor": find_step_plan(found, 0.2)}
    accepted = corridor.search(found, 0.5, rivals=rivals)
    logs = accepted.log10_error
    assert set(logs) == {str(weighting) for weighting in STARTS} | set(rivals)
    assert accepted.weighting == "all dense" == min(logs, key=lambda name: logs[name])
    assert max(logs, key=lambda name: logs[name]) == "poor"
    accepted = corridor.search(found, 0.5, evaluations=4)
    logs = accepted.log10_error
    assert len(STARTS) < len(logs) <= len(STARTS) + 4
    assert logs[accepted.weighting] == min(logs.values())
    for name, plan in ((accepted.weighting, accepted.plan),):
        assert logs[name] == pytest.approx(float(corridor.replay.error(plan).clamp_min(1e-12).log10().mean()))
    again = corridor.search_again(found, 0.5, accepted)
    assert min(again.log10_error.values()) == again.log10_error[again.weighting] <= logs[accepted.weighting]
    assert "_diffusers_hook" not in run.model.__dict__


def test_weightings_lie_between_nothing_and_what_was_measured(made: DenoisingProfile) -> None:
    measured = made.sensitivity.clamp_min(1e-12)
    torch.testing.assert_close(Weighting(1, 1, 1).of(made), measured)
    equal = Weighting(0, 0, 0).of(made)
    assert bool((equal == equal.flatten()[0]).all())
    by_layer = Weighting(1, 1, 0).of(made)
    assert bool((by_layer == by_layer[..., :1]).all())
    torch.testing.assert_close(by_layer.log().sum(), measured.log().sum())


def test_the_descent_finds_the_best_powers_of_a_bowl() -> None:
    def bowl(weighting: Weighting) -> float:
        return (weighting.range - 0.5) ** 2 + (weighting.layer - 1.0) ** 2 + (weighting.rest - 0.25) ** 2

    tried = list(descend(bowl, Weighting(0, 0, 0), evaluations=60))
    assert min(tried, key=bowl) == Weighting(0.5, 1, 0.25)
    assert len(tried) == len(set(tried))
    assert len(list(descend(bowl, Weighting(0, 0, 0), evaluations=5))) == 5


def test_permuted_plans_do_the_same_work(made: DenoisingProfile) -> None:
    plan = find_step_plan(made, 0.5)
    mixed = permuted_plan(plan, 0)
    layout = made.manifest.layout
    assert static_density(mixed, layout, STEPS) == pytest.approx(static_density(plan, layout, STEPS))
    assert mixed.schedule != plan.schedule
    assert permuted_plan(plan, 0) == mixed


def test_a_plan_survives_its_file(made: DenoisingProfile, tmp_path: Path) -> None:
    plan = find_step_plan(made, 0.5)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_the_verdict_is_paired(run: Run, made: DenoisingProfile) -> None:
    plans = {"plan": find_step_plan(made, 0.5), "dense": find_step_plan(made, 1.0)}
    measures = {"psnr_db": lambda a, b: -(a - b).square().flatten(1).mean(1)}
    found = judge(Replay.of(run.model, run), plans, measures, layout=made.manifest.layout, num_steps=STEPS)
    pair = found.paired("dense", "plan")
    assert pair.won == 2
    assert pair.mean == pytest.approx(found.variants["dense"].mean("psnr_db") - found.variants["plan"].mean("psnr_db"))


def test_standard_error_of_known_numbers() -> None:
    variants = {
        "a": Variant(density=0.5, values={"psnr_db": (3.0, 5.0, 7.0, 9.0)}),
        "b": Variant(density=0.5, values={"psnr_db": (2.0, 5.0, 5.0, 6.0)}),
    }
    found = Judgement(num_steps=2, layout=video_layout(1, 2, 2), variants=variants).paired("a", "b")
    assert found.mean == 1.5
    assert found.standard_error == pytest.approx(np.std([1, 0, 2, 3], ddof=1) / 2)
    assert found.won == 3


def test_too_small_a_budget_says_what_is_possible(made: DenoisingProfile) -> None:
    kinds = [rule.kind for rule in made.manifest.candidates]
    assert plan_density(made, np.full(8, kinds.index("zero"))) == 0.0
    made_dense_only = DenoisingProfile(
        None,
        made.manifest.model_copy(update={"candidates": made.manifest.candidates[:2]}),
        made.error[..., :2],
        made.tiles[..., :2],
        torch.ones_like(made.sensitivity),
    )
    with pytest.raises(BudgetInfeasibleError):
        find_step_plan(made_dense_only, 0.05)
