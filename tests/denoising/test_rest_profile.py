"""Rest terms as candidates: profiled, priced, searched, and run over the steps of a sampler."""

from pathlib import Path

import pytest
import torch
from tiny_run import STEPS, Run, make_run

from sparsesearch.denoising.judge import static_density
from sparsesearch.denoising.planning import find_step_plan, write_step_plan
from sparsesearch.plan import Plan
from sparsesearch.profiling.denoising.menu import static_work
from sparsesearch.profiling.denoising.record import DenoisingProfile
from sparsesearch.profiling.denoising.request import StepsRequest
from sparsesearch.profiling.denoising.run import profile_transformer
from sparsesearch.runtime.diffusion.attention import LayerCall
from sparsesearch.runtime.diffusion.live import apply_to_transformer, describe_transformer, output_weights
from sparsesearch.search_space import SearchSpace

SPACE = """
name: rests
source: test
description: test
unit: query_head
block_tokens: 32
candidates:
  - {kind: diagonal_band, reach: {b: 0.1}}
  - {kind: taylor_rest, terms: [0, 1], of: {kind: diagonal_band, reach: {b: 0.1}}}
  - {kind: taylor_rest, terms: 0, of: {kind: calibrated_tiles, keep: 0.25, order: axes(hwf)}}
  - {kind: rectified_rest, of: {kind: pooled_mass, keep: 0.25, order: "tile(2,4,4)"}}
  - {kind: pyramid, shares: 0.2/0.2/0.2/0.4}
  - {kind: cached_rest, every: 4, of: {kind: diagonal_band, reach: {b: 0.1}}}
  - {kind: cached_rest, every: 4, of: {kind: calibrated_tiles, keep: 0.25, order: "tile(2,4,4)"}}
"""


@pytest.fixture(scope="module")
def run() -> Run:
    return make_run()


@pytest.fixture(scope="module")
def made(run: Run, tmp_path_factory: pytest.TempPathFactory) -> DenoisingProfile:
    request = StepsRequest(
        describe_transformer(run.model, "tiny"), SearchSpace.parse(SPACE, where="test"), STEPS, ends=(0.5, 1.0),
        captured_per_range=1,
    )  # fmt: skip
    return profile_transformer(run.model, run, request, tmp_path_factory.mktemp("profile") / "p")


def test_errors_are_those_of_running_the_plan(run: Run, made: DenoisingProfile) -> None:
    """One layer, the captured step of the second range, on a dense trajectory; a cached residual is that of its plan, two steps old."""
    captured, weight = made.manifest.captured[1][0], output_weights(run.model)["blocks.1.attn1"].view(-1, 2, 16)
    assert captured == 4
    for column, rule in enumerate(made.manifest.candidates):
        if column == 0:
            continue
        choice = torch.zeros(made.error.shape[:3], dtype=torch.long)
        choice[:, 1] = column
        plan = write_step_plan(made, choice.flatten().numpy(), density=1.0)
        if rule.kind == "cached_rest":  # one range, so that the residual of step 2 is still there at step 4
            plan = (
                plan.model_copy(update={"schedule": None, "assignments": plan.schedule.assignments(1)})
                if plan.schedule
                else plan
            )
        found: list[torch.Tensor] = []
        with apply_to_transformer(run.model, plan) as applied:
            layer = applied.layers["blocks.1.attn1"]

            def probe(seen: LayerCall, layer=layer, found=found, first=2 if rule.kind == "cached_rest" else captured):  # type: ignore[no-untyped-def]
                if seen.path != "blocks.1.attn1":
                    return None
                dense = torch.nn.functional.scaled_dot_product_attention(seen.q, seen.k, seen.v, scale=seen.scale)
                assert seen.call.step is not None
                if seen.call.step[0] >= first:
                    sparse = layer.attend(seen.q, seen.k, seen.v, seen.rules, seen.call, seen.scale)
                    delta = torch.einsum("bhtd,ohd->bhto", sparse - dense, weight).square().sum((2, 3))
                    whole = torch.einsum("bhtd,ohd->bto", dense, weight).square().sum((1, 2))
                    found.append((delta / whole[:, None]).mean(0))
                return dense

            applied.probe(probe)
            run()
        share = 2 / 3 if rule.kind == "cached_rest" else 1.0  # one of the range's three steps is dense
        at = captured - 2 if rule.kind == "cached_rest" else 0
        torch.testing.assert_close(made.error[1, 1, :, column], found[at] * share, rtol=2e-3, atol=1e-7)


def test_tiles_are_the_work_of_the_rules(made: DenoisingProfile) -> None:
    layout, dense = made.manifest.layout, float(made.tiles[0, 0, 0, 0])
    for column, rule in enumerate(made.manifest.candidates):
        if not rule.dynamic and not rule.needs_calibration:
            assert float(made.tiles[0, 0, 0, column]) == pytest.approx(static_work(rule, layout, 32, 3) * dense)
    labels = [rule.kind for rule in made.manifest.candidates]
    assert made.tiles[0, 0, 0, labels.index("pyramid")] > 0


def test_plans_with_rests_keep_their_budget_and_survive_their_file(
    made: DenoisingProfile, run: Run, tmp_path: Path
) -> None:
    plan = find_step_plan(made, 0.45)
    kinds = {rule.kind for rule in plan.rules.values()}
    assert kinds & {"taylor_rest", "rectified_rest", "pyramid", "cached_rest"}
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    (budget,) = plan.budgets
    found = static_density(plan, made.manifest.layout, STEPS)
    assert found == pytest.approx(max(budget.predicted.values()))
    assert found is not None
    assert 0 < found <= 0.45 + 1e-6
    with apply_to_transformer(run.model, plan):
        assert run().isfinite().all()


def test_a_cached_rest_runs_over_the_steps_of_two_passes(run: Run, made: DenoisingProfile) -> None:
    """Two guidance passes keep residuals of their own, and a second run starts anew: it repeats the first one exactly."""
    column = [rule.kind for rule in made.manifest.candidates].index("cached_rest")
    choice = torch.full(made.error.shape[:3], column)
    plan = write_step_plan(made, choice.flatten().numpy(), density=1.0)
    inputs = run.noise, run.noise.flip(0) * 0.5

    def sample(names: tuple[str, ...]) -> dict[str, torch.Tensor]:
        found = {}
        for step in range(STEPS):
            for name, x in zip(("cond", "uncond"), inputs, strict=True):
                if name in names:
                    with run.model.cache_context(name, step_index=step, num_inference_steps=STEPS), torch.no_grad():
                        found[name] = run.model(
                            x * (1 - 0.1 * step), torch.full((2,), 500), run.text, return_dict=False
                        )[0]
        return found

    dense = sample(("cond", "uncond"))
    with apply_to_transformer(run.model, plan):
        both, again = sample(("cond", "uncond")), sample(("cond", "uncond"))
    with apply_to_transformer(run.model, plan):
        alone = sample(("uncond",))
    assert torch.equal(both["cond"], again["cond"])
    torch.testing.assert_close(both["uncond"], alone["uncond"])
    assert not torch.allclose(both["cond"], dense["cond"], atol=1e-6)
