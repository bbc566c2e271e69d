import copy

import pytest
import torch
from runtime_plans import cycled_plan, dense_plan, group_plan, left_padded
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, T5Config

import sparsesearch
from sparsesearch.errors import PlanMismatchError, SparseSearchError, SpecError, UnsupportedModelError
from sparsesearch.runtime.fingerprint import weights_sha256

NAMES = ["stream", "elastic", "zero", "mean", "pooled"]


def state(model):
    """Everything `apply` could leave behind."""
    return (
        model.config.to_json_string(),
        model.config._attn_implementation,
        [(name, sorted(module.__dict__)) for name, module in model.named_modules()],
        [len(module._forward_pre_hooks) for module in model.modules()],
        list(model.state_dict()),
    )


def logits(model):
    ids, mask = left_padded((100, 60), 64)
    with torch.no_grad():
        return model(ids, attention_mask=mask).logits


def test_leaving_restores_exactly(any_tiny):
    plan = group_plan(any_tiny, NAMES)
    before, exact = state(any_tiny), logits(any_tiny)
    with sparsesearch.apply(any_tiny, plan) as handle:
        assert not torch.equal(logits(any_tiny), exact)
        assert handle.heads_patched == plan.base_model.geometry.total_heads
    assert state(any_tiny) == before
    assert torch.equal(logits(any_tiny), exact)


def test_a_handle_may_be_entered_again(tiny):
    model = tiny("llama")
    before, exact = state(model), logits(model)
    handle = sparsesearch.apply(model, group_plan(model, NAMES))
    first = logits(model)
    handle.remove()
    with sparsesearch.apply(model, group_plan(model, ["stream"])):
        between = logits(model)
        with handle:
            assert torch.equal(logits(model), first)
        assert torch.equal(logits(model), between)
    assert state(model) == before
    assert torch.equal(logits(model), exact)


def test_restores_after_an_exception(tiny):
    model = tiny("llama")
    before, exact = state(model), logits(model)
    with pytest.raises(ZeroDivisionError), sparsesearch.apply(model, group_plan(model, NAMES)):
        raise ZeroDivisionError
    assert state(model) == before
    assert torch.equal(logits(model), exact)


def test_nested_plans_come_off_in_order(tiny):
    model = tiny("llama")
    exact = logits(model)
    outer = sparsesearch.apply(model, group_plan(model, ["stream"]))
    first = logits(model)
    inner = sparsesearch.apply(model, dense_plan(model))
    assert torch.equal(logits(model), exact)
    with pytest.raises(SparseSearchError, match="reverse order"):
        outer.remove()
    inner.remove()
    assert torch.equal(logits(model), first)
    outer.remove()
    outer.remove()
    assert torch.equal(logits(model), exact)


def test_a_copy_keeps_the_plan(tiny):
    model = tiny("llama")
    exact = logits(model)
    with sparsesearch.apply(model, group_plan(model, NAMES)):
        twin, inside = copy.deepcopy(model), logits(model)
    assert torch.equal(logits(twin), inside)
    assert torch.equal(logits(model), exact)


def test_switching_the_implementation_switches_the_plan(tiny):
    model = tiny("llama")
    exact = logits(model)
    with sparsesearch.apply(model, group_plan(model, NAMES)):
        inside = logits(model)
        model.set_attn_implementation("sdpa")
        assert torch.equal(logits(model), exact)
        model.set_attn_implementation("sparsesearch")
        assert torch.equal(logits(model), inside)


@pytest.mark.parametrize(
    "change",
    [{"num_hidden_layers": 3}, {"num_hidden_layers": 1}, {"num_attention_heads": 8}, {"num_key_value_heads": 4}],
    ids=str,
)
def test_another_geometry_is_refused_and_untouched(tiny, change):
    plan, other = cycled_plan(tiny("llama"), NAMES), tiny("llama", **change)
    before = state(other)
    with pytest.raises(PlanMismatchError, match="was made for"):
        sparsesearch.apply(other, plan)
    assert state(other) == before


def test_other_weights_are_refused_unless_allowed(tiny):
    model = tiny("llama")
    plan = cycled_plan(model, NAMES)
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.up_proj").weight.mul_(1.1)
    before = state(model)
    with pytest.raises(PlanMismatchError, match="allow_other_weights"):
        sparsesearch.apply(model, plan)
    assert state(model) == before
    with sparsesearch.apply(model, plan, allow_other_weights=True):
        logits(model)


def test_unknown_backend_is_refused_and_untouched(tiny):
    model = tiny("llama")
    plan, before = cycled_plan(model, NAMES), state(model)
    with pytest.raises(SpecError, match="Did you mean 'torch'"):
        sparsesearch.apply(model, plan, backend="torhc")
    assert state(model) == before


def test_describe_leaves_no_trace_and_knows_the_heads(tiny):
    model = tiny("llama").train()
    before = state(model)
    info = sparsesearch.describe(model, "mine")
    assert state(model) == before
    assert model.training
    assert info.modules == ("model.layers.0.self_attn", "model.layers.1.self_attn")
    assert (info.num_heads, info.num_kv_heads, info.head_dim) == ((4, 4), (2, 2), (8, 8))
    assert sparsesearch.describe(model.model, "mine") == info


def test_fingerprint_follows_values_not_precision(tiny):
    model = tiny("llama").to(torch.bfloat16)
    digest = weights_sha256(model)
    assert digest == weights_sha256(model.float())
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] += 1
    assert weights_sha256(model) != digest
    assert weights_sha256(tiny("llama").to("meta")) is None


def test_unsupported_models_are_refused_by_name():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
    capped = Gemma2Config(**sizes, num_key_value_heads=2, head_dim=8, intermediate_size=48, attn_logit_softcapping=50.0)
    bloom = AutoConfig.for_model("bloom", hidden_size=32, n_layer=1, n_head=4, vocab_size=64)
    sinks = AutoConfig.for_model(
        "gpt_oss",
        **sizes,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    for config, word in ((capped, "softcap"), (sinks, "attention sinks"), (bloom, "AttentionInterface")):
        model = AutoModelForCausalLM.from_config(config)
        before = state(model)
        with pytest.raises(UnsupportedModelError, match=word):
            sparsesearch.describe(model, "x")
        assert state(model) == before
    from transformers import T5ForConditionalGeneration

    t5 = T5ForConditionalGeneration(T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4, vocab_size=32))
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        sparsesearch.describe(t5, "x")
    with pytest.raises(UnsupportedModelError, match="PreTrainedModel"):
        sparsesearch.describe(torch.nn.Linear(2, 2), "x")
