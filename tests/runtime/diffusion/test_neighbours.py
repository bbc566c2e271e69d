"""Caches, offloading and casting of diffusers and accelerate beside a plan: put on before it or after, each still does its work."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_families import RULES, plan_of
from tiny_models import FAMILIES, Tiny, wan
from torch import Tensor

from sparsesearch.rules.dense import Dense
from sparsesearch.runtime.diffusion.attention import LayerCall
from sparsesearch.runtime.diffusion.live import apply_to_transformer

STEPS = 4


@pytest.fixture
def tiny() -> Tiny:
    torch.manual_seed(0)
    return wan()


def sampled(tiny: Tiny) -> Tensor:
    """Outputs of a few steps with guidance, each pass in its own cache context."""
    outputs = []
    for step in range(STEPS):
        for name in ("cond", "uncond"):
            with tiny.model.cache_context(name, step_index=step, num_inference_steps=STEPS):
                outputs.append(tiny.run())
    return torch.stack(outputs)


def broadcast(model: Any) -> None:
    from diffusers import PyramidAttentionBroadcastConfig

    model.enable_cache(
        PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500)
    )


def first_block(model: Any) -> None:
    from diffusers import FirstBlockCacheConfig

    model.enable_cache(FirstBlockCacheConfig(threshold=0.5))


def taylor(model: Any) -> None:
    from diffusers import TaylorSeerCacheConfig

    model.enable_cache(
        TaylorSeerCacheConfig(
            cache_interval=3, disable_cache_before_step=1, max_order=1, cache_identifiers=[r"blocks\.\d\.attn1"]
        )
    )


CACHES: dict[str, Callable[[Any], None]] = {"pab": broadcast, "first block": first_block, "taylor": taylor}


@pytest.fixture(params=sorted(CACHES))
def cache(request: pytest.FixtureRequest) -> Callable[[Any], None]:
    return CACHES[request.param]


def reset(tiny: Tiny) -> None:
    tiny.model._reset_stateful_cache()


def test_a_cache_of_dense_attention_gives_the_same_bits(tiny: Tiny, cache: Callable[[Any], None]) -> None:
    cache(tiny.model)
    cached = sampled(tiny)
    reset(tiny)
    with apply_to_transformer(tiny.model, plan_of(tiny, Dense(), Dense())):
        assert torch.equal(sampled(tiny), cached)
    reset(tiny)
    assert torch.equal(sampled(tiny), cached)
    tiny.model.disable_cache()


@pytest.mark.parametrize("plan_first", [True, False])
def test_a_cache_skips_what_it_skips_and_the_rest_is_sparse(
    tiny: Tiny, cache: Callable[[Any], None], plan_first: bool
) -> None:
    """Attention is asked less often under a cache, whichever came first; what is asked runs the plan."""
    counts, outputs = [], []
    for cached in (False, True):
        seen: list[str] = []

        def count(call: LayerCall, seen: list[str] = seen) -> None:
            seen.append(call.path)

        if cached and not plan_first:
            cache(tiny.model)
        with apply_to_transformer(tiny.model, plan_of(tiny, *RULES)) as applied:
            if cached and plan_first:
                cache(tiny.model)
            applied.probe(count)
            outputs.append(sampled(tiny))
            if cached:
                tiny.model.disable_cache()
        counts.append(len(seen))
    assert 0 < counts[1] < counts[0]
    assert torch.equal(outputs[1][0], outputs[0][0]), "nothing is cached in the first step"
    assert "_diffusers_hook" not in tiny.model.__dict__ or not tiny.model._diffusers_hook.hooks


def offloaded_groups(model: Any) -> None:
    model.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )


def cast_layers(model: Any) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def dispatched(model: Any) -> None:
    from accelerate import cpu_offload

    cpu_offload(model, execution_device=torch.device("cpu"))


MOVERS: dict[str, Callable[[Any], None]] = {
    "group offload": offloaded_groups,
    "layerwise casting": cast_layers,
    "cpu offload": dispatched,
}


@pytest.fixture(params=sorted(MOVERS))
def mover(request: pytest.FixtureRequest) -> Callable[[Any], None]:
    return MOVERS[request.param]


def test_weights_that_come_and_go(mover: Callable[[Any], None]) -> None:
    """Put on before the plan, the outputs are those of the plan on the same model; without the plan they are as before."""
    torch.manual_seed(0)
    tiny = wan()
    plan, every = plan_of(tiny, *RULES), plan_of(tiny, Dense(), Dense())
    mover(tiny.model)
    dense = tiny.run()
    with apply_to_transformer(tiny.model, every, allow_other_weights=True):
        assert torch.equal(tiny.run(), dense)
    with apply_to_transformer(tiny.model, plan, allow_other_weights=True):
        before = tiny.run()
    assert torch.equal(tiny.run(), dense)
    torch.manual_seed(0)
    tiny = wan()
    with apply_to_transformer(tiny.model, plan, allow_other_weights=True):
        mover(tiny.model)
        assert torch.equal(tiny.run(), before)
    assert not torch.equal(before, dense)


def families() -> Iterator[str]:
    yield from sorted(FAMILIES)


@pytest.mark.parametrize("family", list(families()))
def test_guidance_in_one_batch_equals_guidance_in_two_calls(family: str) -> None:
    torch.manual_seed(0)
    tiny = FAMILIES[family]()
    rows = [
        {k: v[i : i + 1] if isinstance(v, Tensor) and v.shape[:1] == (2,) else v for k, v in tiny.inputs.items()}
        for i in range(2)
    ]
    with apply_to_transformer(tiny.model, plan_of(tiny, *RULES)):
        both = tiny.run()
        apart = torch.cat([tiny.run(**row) for row in rows])
    torch.testing.assert_close(both, apart, rtol=1e-4, atol=1e-5)
