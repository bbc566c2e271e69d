"""Plans whose generated tokens follow other rules than their prompt."""

import pytest
import torch
from runtime_plans import cycled_plan, group_plan, left_padded

import sparsesearch
from sparsesearch.errors import SpecError
from sparsesearch.runtime.cache import PlanCacheLayer
from sparsesearch.runtime.cache_keyword import CACHE_KEYWORD
from sparsesearch.runtime.oracle import oracle_logits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PREFILL = ["slash", "stream", "dense", "bitmap", "mean"]
DECODE = ["stream", "mean", "zero", "dense", "elastic", "slash"]


def with_decode(model, plan_of):
    plan, other = plan_of(model, PREFILL), plan_of(model, DECODE)
    return plan.model_copy(update={"decode": other.assignments, "rules": plan.rules | other.rules})


@pytest.mark.parametrize("way", ["dynamic", "static", "masked", "kernels"])
@pytest.mark.parametrize("plan_of", [group_plan, cycled_plan])
def test_decoding_equals_the_oracle(tiny, plan_of, way):
    model, prompt, end = tiny("llama", num_hidden_layers=3).to(DEVICE), 60, 140
    if way == "kernels":  # interpreted: a few steps, across a block's end
        prompt, end = 62, 66
    plan = with_decode(model, plan_of)
    ids = left_padded([end], 64)[0].to(DEVICE)
    backend = "triton" if way == "kernels" else "auto"
    with sparsesearch.apply(model, plan, cache=way != "masked", backend=backend), torch.no_grad():
        cache = sparsesearch.sparse_cache(model, max_tokens=end if way in ("static", "kernels") else None)
        parts = [ids[:, :prompt], *ids[:, prompt:].split(1, 1)]
        ours = torch.cat([model(part, **{CACHE_KEYWORD: cache}).logits[0] for part in parts])
        exact = oracle_logits(model, ids[0], prompt)
        same = sparsesearch.apply(model, plan.model_copy(update={"decode": {}}))
        assert not torch.allclose(exact[-1], oracle_logits(model, ids[0], prompt)[-1], atol=1e-2)
        same.remove()
    assert (ours - exact).abs().max() <= 2**10 * torch.finfo(torch.float32).eps * exact.abs().max()


def test_memory_follows_the_rules_of_decoding(tiny):
    model = tiny("llama", max_position_embeddings=2048)
    plan = group_plan(model, ["dense"])
    other = group_plan(model, ["stream"])
    plan = plan.model_copy(update={"decode": other.assignments, "rules": plan.rules | other.rules})
    ids, _ = left_padded([1000], 64)
    with torch.no_grad():
        dense = model(ids).logits
        with sparsesearch.apply(model, plan):
            output = model(ids)
            layers = output[CACHE_KEYWORD].layers
    assert all(isinstance(layer, PlanCacheLayer) and layer.nbytes < 0.1 * 2 * 1000 * 16 * 4 for layer in layers)
    torch.testing.assert_close(output.logits, dense, rtol=1e-4, atol=1e-4 * float(dense.abs().max()))


@pytest.mark.parametrize("max_tokens", [None, 120])
def test_a_prompt_in_chunks_is_refused_where_its_keys_are_gone(tiny, max_tokens):
    model = tiny("llama")
    ids, _ = left_padded([90], 64)
    with sparsesearch.apply(model, with_decode(model, group_plan)), torch.no_grad():
        cache = sparsesearch.sparse_cache(model, prompt_tokens=90, max_tokens=max_tokens)
        model(ids[:, :40], **{CACHE_KEYWORD: cache})
        with pytest.raises(SpecError, match="in one call"):
            model(ids[:, 40:], **{CACHE_KEYWORD: cache})
