"""Plans as published: SVG's choice offline, dense first steps and dense layers."""

from pathlib import Path

import pytest
import torch
from tiny_run import STEPS, Run, make_run, profile

from sparsesearch.denoising.judge import static_density
from sparsesearch.denoising.published import least_error_plan, light_forcing_plan, with_dense
from sparsesearch.errors import SpecError
from sparsesearch.plan import Plan, uniform_plan
from sparsesearch.profiling.denoising.record import DenoisingProfile
from sparsesearch.rules.dense import Dense
from sparsesearch.runtime.diffusion.live import apply_to_transformer

BANDS = ("diagonal_band(reach=0.3N,order=identity)", "diagonal_band(reach=0.3N,order=axes(hwf))")


@pytest.fixture(scope="module")
def run() -> Run:
    return make_run()


@pytest.fixture(scope="module")
def made(run: Run, tmp_path_factory: pytest.TempPathFactory) -> DenoisingProfile:
    return profile(run, tmp_path_factory.mktemp("profile") / "p", captured_per_range=1)


def test_each_head_is_spatial_or_temporal_by_its_error(made: DenoisingProfile) -> None:
    plan = least_error_plan(made, BANDS)
    labels = [rule.label for rule in made.manifest.candidates]
    columns = [labels.index(label) for label in BANDS]
    for place, (first, _) in enumerate(made.manifest.ranges):
        for layer, module in enumerate(made.manifest.base_model.modules):
            for head in range(2):
                errors = [float(made.error[place, layer, head, column]) for column in columns]
                assert plan.at_step(first).rule(module, head).label == BANDS[errors.index(min(errors))]
    with pytest.raises(SpecError, match="must have scored"):
        least_error_plan(made, ["diagonal_band(reach=0.4N,order=identity)"])


def uniform(made: DenoisingProfile) -> Plan:
    return uniform_plan(made.manifest.base_model, made.manifest.candidates[1], block_tokens=32, lengths_tokens=(400,))


def test_dense_first_steps_and_layers(run: Run, made: DenoisingProfile, tmp_path: Path) -> None:
    plan = with_dense(uniform(made), first_share=0.2, layers=[0], num_steps=STEPS)
    kinds = [[rule.kind for _, _, rule in plan.at_step(step).heads()] for step in range(STEPS)]
    assert kinds == [["dense"] * 4] * 2 + [["dense"] * 2 + ["diagonal_band"] * 2] * 4
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    sparse = static_density(uniform(made), made.manifest.layout, STEPS)
    assert sparse is not None
    assert static_density(plan, made.manifest.layout, STEPS) == pytest.approx((2 + 4 * (1 + sparse) / 2) / 6)
    with apply_to_transformer(run.model, plan):
        assert torch.isfinite(run()).all()


def test_a_schedule_keeps_its_ranges_behind_the_dense_steps(made: DenoisingProfile) -> None:
    scheduled = least_error_plan(made, BANDS)
    plan = with_dense(scheduled, first_share=0.5)
    for step in range(STEPS):
        wanted = {Dense().label} if step < 3 else {rule.label for _, _, rule in scheduled.at_step(step).heads()}
        assert {rule.label for _, _, rule in plan.at_step(step).heads()} == wanted
    chunked = light_forcing_plan(
        made.manifest.base_model, num_steps=6, num_chunks=3, density=0.6, least=0.3, layout=made.manifest.layout
    )
    kept = with_dense(chunked, first_share=0.2)
    assert {rule.kind for _, _, rule in kept.at_step(1, chunk=2).heads()} == {"dense"}
    assert kept.at_step(4, chunk=2).rules == chunked.rules
    assert {rule.kind for _, _, rule in kept.at_step(4, chunk=2).heads()} == {"frame_topk"}


def test_what_cannot_be_made_dense_is_named(made: DenoisingProfile) -> None:
    with pytest.raises(SpecError, match="layers must lie"):
        with_dense(uniform(made), layers=[2], num_steps=6)
    with pytest.raises(SpecError, match="number of steps"):
        with_dense(uniform(made), first_share=0.1)
