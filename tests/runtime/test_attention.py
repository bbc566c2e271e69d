import pytest
import torch
from runtime_plans import BLOCK_TOKENS, RULES, cycled_plan, dense_plan, left_padded, oracle_logits, rule
from transformers import DynamicCache, StaticCache

import sparsesearch
from sparsesearch.errors import UnsupportedModelError
from sparsesearch.plan import uniform_plan
from sparsesearch.rules import LengthLaw
from sparsesearch.runtime.cache_keyword import CACHE_KEYWORD
from sparsesearch.runtime.fingerprint import describe

MIXTURE = [*RULES, "bitmap"]
ROWS = (157, 65, 3)


def close(ours: torch.Tensor, exact: torch.Tensor, dense: torch.Tensor) -> None:
    """Within float32's error of two layers, and far from what dense attention gives."""
    scale = exact.abs().max()
    assert (ours - exact).abs().max() <= 2**10 * torch.finfo(torch.float32).eps * scale
    if len(exact) > 4 * BLOCK_TOKENS:
        assert (dense - exact).abs().max() > 0.01 * scale


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_every_rule_equals_the_oracle_on_every_architecture(any_tiny, backend):
    plan = cycled_plan(any_tiny, MIXTURE)
    ids, _ = left_padded([157], 64)
    with torch.no_grad():
        dense = any_tiny(ids).logits[0]
        with sparsesearch.apply(any_tiny, plan, backend=backend):
            ours = any_tiny(ids).logits[0]
    close(ours, oracle_logits(any_tiny, plan, ids[0]), dense)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(any_tiny, side):
    plan = cycled_plan(any_tiny, MIXTURE)
    ids, mask = left_padded(ROWS, 64)
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    with sparsesearch.apply(any_tiny, plan), torch.no_grad():
        padded = any_tiny(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        for row, keep in enumerate(mask.bool()):
            alone = any_tiny(ids[row, keep][None]).logits[0]
            torch.testing.assert_close(padded[row, keep], alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))
    assert padded.isfinite().all()


def test_packed_sequences_stay_apart(tiny):
    model = tiny("llama")
    plan = cycled_plan(model, MIXTURE)
    ids, _ = left_padded([100], 64)
    positions = torch.cat([torch.arange(61), torch.arange(39)])[None]
    with sparsesearch.apply(model, plan), torch.no_grad():
        packed = model(ids, position_ids=positions, use_cache=False).logits[0]
        alone = torch.cat([model(part[None]).logits[0] for part in (ids[0, :61], ids[0, 61:])])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))


def test_packed_sequences_with_a_cache_are_refused(tiny):
    from sparsesearch.runtime.mask_code import mask_code

    def apart(batch, head, query, key):
        return (key <= query) & (query // 8 == key // 8)

    with pytest.raises(UnsupportedModelError, match="without a cache"):
        mask_code(1, 1, 20, 19, 0, apart)


def test_a_mask_that_looks_ahead_is_refused():
    from transformers.masking_utils import bidirectional_mask_function

    from sparsesearch.runtime.mask_code import mask_code

    with pytest.raises(UnsupportedModelError, match="look ahead"):
        mask_code(1, 8, 8, 0, 0, bidirectional_mask_function)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("static", [True, False])
def test_decoding_equals_the_oracle(any_tiny, cache, static):
    """Prefill of 65 tokens, then one by one; laws stay at 65, dynamic rules turn dense, but for bounds, which a sliding window leaves no keys."""
    slides = getattr(any_tiny.config, "sliding_window", None)
    plan = cycled_plan(any_tiny, [name for name in MIXTURE if not (slides and name.startswith("bounds"))])
    ids, _ = left_padded([100], 64)
    exact = oracle_logits(any_tiny, plan, ids[0], 65)
    kv = StaticCache(any_tiny.config, max_cache_len=128) if static else None
    with sparsesearch.apply(any_tiny, plan, cache=cache), torch.no_grad():
        output = any_tiny(ids[:, :65], **{CACHE_KEYWORD: kv}, use_cache=True)
        logits = [output.logits[0]]
        for token in range(65, 100):
            output = any_tiny(ids[:, token : token + 1], **{CACHE_KEYWORD: output[CACHE_KEYWORD]})
            logits.append(output.logits[0])
    with torch.no_grad():
        close(torch.cat(logits), exact, any_tiny(ids).logits[0])


def test_a_rule_that_decodes_needs_the_keys_a_sliding_window_drops(tiny):
    model = tiny("mistral")
    ids, _ = left_padded([40], 64)
    with sparsesearch.apply(model, cycled_plan(model, ["bounds"])), torch.no_grad():
        cache = model(ids)[CACHE_KEYWORD]
        with pytest.raises(UnsupportedModelError, match="bounds_topk must see all keys"):
            model(ids[:, :1], **{CACHE_KEYWORD: cache})


def test_all_dense_plan_is_bit_identical(any_tiny):
    ids, mask = left_padded(ROWS, 64)
    cases = [(ids[:1], None), (ids, mask), (ids.flip(1), mask.flip(1))]
    with torch.no_grad():
        before = [any_tiny(i, attention_mask=m).logits for i, m in cases]
        tokens = any_tiny.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False)
        with sparsesearch.apply(any_tiny, dense_plan(any_tiny)):
            inside = [any_tiny(i, attention_mask=m).logits for i, m in cases]
            same = any_tiny.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False)
    assert all(torch.equal(one, other) for one, other in zip(before, inside, strict=True))
    assert torch.equal(tokens, same)


def test_all_dense_plan_is_bit_identical_in_chunks(any_tiny):
    ids, _ = left_padded([90], 64)

    def logits():
        cache = DynamicCache(config=any_tiny.config)
        with torch.no_grad():
            return [any_tiny(part, **{CACHE_KEYWORD: cache}).logits for part in ids.split(37, 1)]

    before = logits()
    with sparsesearch.apply(any_tiny, dense_plan(any_tiny)):
        assert all(torch.equal(one, other) for one, other in zip(before, logits(), strict=True))


def test_gradients_flow_through_a_plan(tiny):
    """Gradients of the torch backend equal those of the oracle."""
    model = tiny("llama")
    plan = cycled_plan(model, MIXTURE)
    ids, mask = left_padded((100, 40), 64)
    gradients = []
    for backend in ("torch", "reference"):
        model.zero_grad()
        with sparsesearch.apply(model, plan, backend=backend):
            model(ids, attention_mask=mask, labels=ids).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()


def test_gradients_flow_after_inference_mode(tiny):
    """Choices that were cached in inference mode must not poison later training."""
    model = tiny("llama")
    ids, _ = left_padded([70], 64)
    with sparsesearch.apply(model, cycled_plan(model, MIXTURE)):
        for mode in (torch.inference_mode, torch.enable_grad):
            with mode():
                cache = model(ids[:, :-1])[CACHE_KEYWORD]
                last = model(ids[:, -1:], **{CACHE_KEYWORD: cache}).logits
        last.sum().backward()
    assert model.get_input_embeddings().weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"output_attentions": True}, "output_attentions"),
        ({"attention_mask": torch.ones(1, 1, 20, 20, dtype=torch.bool)}, "2-D padding mask"),
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"position_bias": torch.zeros(1, 4, 20, 20)}, "position_bias"),
    ],
)
def test_what_no_rule_can_express_is_refused_by_name(tiny, change, word):
    model = tiny("llama")
    ids, _ = left_padded([20], 64)
    with sparsesearch.apply(model, cycled_plan(model, MIXTURE)), pytest.raises(UnsupportedModelError, match=word):
        model(ids, **change)


def test_attention_dropout_is_refused(tiny):
    model = tiny("llama", attention_dropout=0.1).train()
    ids, _ = left_padded([20], 64)
    with sparsesearch.apply(model, cycled_plan(model, MIXTURE)), pytest.raises(UnsupportedModelError, match="dropout"):
        model(ids)


def test_model_without_a_plan_is_refused(tiny):
    model = tiny("llama")
    model.set_attn_implementation("sparsesearch")
    with pytest.raises(UnsupportedModelError, match=r"sparsesearch\.apply"):
        model(torch.ones(1, 3, dtype=torch.long))


def test_a_rule_whose_law_keeps_all_chooses_nothing(tiny, monkeypatch):
    """Short prompts run dense; it chooses where its law leaves something out."""
    model, one = tiny("llama"), rule("pooled").model_copy(update={"keep": LengthLaw(a=64)})
    plan = uniform_plan(describe(model, "tests"), one, block_tokens=BLOCK_TOKENS, lengths_tokens=(256,))
    chosen = []
    select = type(one).select
    with sparsesearch.apply(model, plan), torch.no_grad():
        model(torch.ones(1, 40, dtype=torch.long), use_cache=False)  # binding asks once whether laws matter
        monkeypatch.setattr(type(one), "select", lambda self, *args: chosen.append(1) or select(self, *args))
        model(torch.ones(1, 60, dtype=torch.long), use_cache=False)
        assert not chosen
        model(torch.ones(1, 100, dtype=torch.long), use_cache=False)
    assert chosen
