"""Which step a call belongs to, caches and backends that live beside a plan, and what is refused."""

from typing import Any

import pytest
import torch
from test_families import BLOCK, RULES, plan_of
from tiny_models import FAMILIES, Tiny, wan
from torch import Tensor, nn

from sparsesearch.errors import PlanMismatchError, SparseSearchError, SpecError, UnsupportedModelError
from sparsesearch.plan import Plan
from sparsesearch.rules.dense import Dense
from sparsesearch.runtime.diffusion.live import apply_diffusers, apply_to_transformer
from sparsesearch.step_schedule import StepSchedule


@pytest.fixture
def tiny() -> Tiny:
    torch.manual_seed(0)
    return wan()


def scheduled(tiny: Tiny) -> Plan:
    """Dense in the first half of ten steps, sparse in the second."""
    plan = plan_of(tiny, *RULES)
    schedule = StepSchedule.of(10, [(5, 10, plan.assignments)])
    rules = {**plan.rules, Dense().label: Dense()}
    return plan.model_copy(update={"schedule": schedule, "assignments": {}, "rules": rules})


def test_the_cache_context_of_the_pipeline_tells_the_step(tiny: Tiny) -> None:
    dense = tiny.run()
    with apply_to_transformer(tiny.model, plan_of(tiny, *RULES)):
        sparse = tiny.run()
    found = []
    with apply_to_transformer(tiny.model, scheduled(tiny)):
        for step in range(4):
            for name in ("cond", "uncond"):
                with tiny.model.cache_context(name, step_index=step, num_inference_steps=4):
                    found.append(tiny.run())
    assert all(torch.equal(output, dense) for output in found[:4])
    assert all(torch.equal(output, sparse) for output in found[4:])


def test_the_scheduler_tells_the_step_where_the_pipeline_does_not(tiny: Tiny) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(20)
    dense = tiny.run()
    with apply_to_transformer(tiny.model, scheduled(tiny)) as applied:
        applied.watch(scheduler)
        same = [torch.equal(tiny.run(timestep=time.expand(2)), dense) for time in (scheduler.timesteps[9:11])]
        alone = tiny.run(timestep=scheduler.timesteps[9].expand(2))
    assert torch.equal(alone, tiny.run(timestep=scheduler.timesteps[9].expand(2)))
    assert same == [False, False]  # other timesteps than the dense run's
    with apply_to_transformer(tiny.model, scheduled(tiny)) as applied:
        applied.watch(scheduler)
        late = tiny.run(timestep=scheduler.timesteps[10].expand(2))
    assert not torch.equal(late, tiny.run(timestep=scheduler.timesteps[10].expand(2)))


def test_a_step_given_by_hand_comes_first(tiny: Tiny) -> None:
    dense = tiny.run()
    with apply_to_transformer(tiny.model, scheduled(tiny)) as applied:
        applied.at_step(0, 2)
        assert torch.equal(tiny.run(), dense)
        applied.at_step(1, 2)
        assert not torch.equal(tiny.run(), dense)
        applied.at_step(None)
        with pytest.raises(UnsupportedModelError, match="at_step"):
            tiny.run()


def test_a_batch_of_both_guidance_passes_equals_the_two_apart(tiny: Tiny) -> None:
    with apply_to_transformer(tiny.model, plan_of(tiny, *RULES)):
        both = tiny.run()
        apart = [tiny.run(**{k: v[row : row + 1] for k, v in tiny.inputs.items()}) for row in range(2)]
    torch.testing.assert_close(both, torch.cat(apart))


def test_a_cache_works_on_beside_a_plan(tiny: Tiny) -> None:
    from diffusers import FirstBlockCacheConfig

    def two_steps() -> list[Tensor]:
        outputs = []
        for step in range(2):
            with tiny.model.cache_context("cond", step_index=step, num_inference_steps=2):
                outputs.append(tiny.run())
        return outputs

    dense = tiny.run()
    tiny.model.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    cached = two_steps()
    with apply_to_transformer(tiny.model, plan_of(tiny, Dense(), Dense())):
        tiny.model._reset_stateful_cache()
        assert all(torch.equal(a, b) for a, b in zip(two_steps(), cached, strict=True))
    with apply_to_transformer(tiny.model, plan_of(tiny, *RULES)):
        tiny.model._reset_stateful_cache()
        assert not torch.equal(two_steps()[0], cached[0])
    tiny.model._reset_stateful_cache()
    assert all(torch.equal(a, b) for a, b in zip(two_steps(), cached, strict=True))
    tiny.model.disable_cache()
    assert torch.equal(tiny.run(), dense)


def test_setting_a_backend_does_not_wipe_the_plan(tiny: Tiny) -> None:
    with apply_to_transformer(tiny.model, plan_of(tiny, *RULES)):
        sparse = tiny.run()
        tiny.model.set_attention_backend("native")
        assert torch.equal(tiny.run(), sparse)
    backends = {str(p._attention_backend.value) for p in tiny.model.attn_processors.values()}
    assert backends == {"native"}


def test_two_plans_and_foreign_processors_are_refused(tiny: Tiny) -> None:
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    plan, dense = plan_of(tiny, *RULES), tiny.run()
    applied = apply_to_transformer(tiny.model, plan)
    sparse = tiny.run()
    with pytest.raises(SpecError, match="one plan at a time"):
        apply_to_transformer(tiny.model, plan)
    assert torch.equal(tiny.run(), sparse)
    module = tiny.model.blocks[0].attn1
    ours = module.processor
    module.set_processor(WanAttnProcessor())
    with pytest.raises(SparseSearchError, match="others have been set since"):
        applied.remove()
    module.set_processor(ours)
    applied.remove()
    applied.remove()
    assert torch.equal(tiny.run(), dense)


def test_what_does_not_fit_is_refused_before_anything_is_touched(tiny: Tiny) -> None:
    plan, before = plan_of(tiny, *RULES), set(tiny.model.__dict__)
    other = FAMILIES["ltx"]()
    with pytest.raises(PlanMismatchError, match="weights"):
        apply_to_transformer(other.model, plan)
    with pytest.raises(PlanMismatchError, match="attention differs"):
        apply_to_transformer(other.model, plan, allow_other_weights=True)
    with pytest.raises(UnsupportedModelError, match="no sparse runtime for the diffusers model Linear"):
        apply_to_transformer(nn.Linear(2, 2), plan, allow_other_weights=True)
    with pytest.raises(SpecError, match="unknown backend 'cudnn'"):
        apply_to_transformer(tiny.model, plan, backend="cudnn")
    with pytest.raises(SpecError, match="single plan"):
        apply_diffusers(tiny.model, {"transformer": plan})

    class Other:
        def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return hidden_states

    original = tiny.model.blocks[1].attn1.processor
    tiny.model.blocks[1].attn1.set_processor(Other())
    with pytest.raises(UnsupportedModelError, match="Other must call"):
        apply_to_transformer(tiny.model, plan)
    tiny.model.blocks[1].attn1.set_processor(original)
    assert set(tiny.model.__dict__) == before


def test_attention_called_on_its_own_is_refused(tiny: Tiny) -> None:
    attention = tiny.model.blocks[0].attn1
    with (
        apply_to_transformer(tiny.model, plan_of(tiny, *RULES)),
        pytest.raises(UnsupportedModelError, match="through its transformer"),
    ):
        attention(torch.randn(1, 72, 32))


def test_block_size_of_the_plan_counts(tiny: Tiny) -> None:
    plan = plan_of(tiny, *RULES)
    with apply_to_transformer(tiny.model, plan):
        narrow = tiny.run()
    with apply_to_transformer(tiny.model, plan.model_copy(update={"block_tokens": 4 * BLOCK})):
        assert not torch.equal(tiny.run(), narrow)


def test_budgets_per_chunk_follow_the_chunk_that_is_told(tiny: Tiny) -> None:
    plan = plan_of(tiny, *RULES)
    schedule = StepSchedule.of(10, [(0, 10, plan.assignments)], chunks=[(1, None)])
    chunked = plan.model_copy(
        update={"schedule": schedule, "assignments": {}, "rules": {**plan.rules, Dense().label: Dense()}}
    )
    dense = tiny.run()
    with apply_to_transformer(tiny.model, plan):
        sparse = tiny.run()
    with apply_to_transformer(tiny.model, chunked) as applied:
        applied.at_step(3, 10)
        with pytest.raises(SpecError, match="at_chunk"):
            tiny.run()
        found = []
        for chunk in (0, 1, 5):
            applied.at_chunk(chunk)
            found.append(tiny.run())
    assert torch.equal(found[0], dense)
    assert torch.equal(found[1], sparse)
    assert torch.equal(found[2], sparse)
