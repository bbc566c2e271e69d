import copy

import pytest
import torch
from runtime_plans import cycled_plan, dense_plan, greedy_oracle, group_plan, left_padded, oracle_logits
from transformers import DynamicCache

import sparsesearch
from sparsesearch.errors import SparseSearchError, SpecError
from sparsesearch.runtime.cache import PlanCacheLayer
from sparsesearch.runtime.cache_keyword import CACHE_KEYWORD

EVICTING = ["stream", "zero", "elastic", "mean", "dense"]
CONSTANT = ["stream", "zero", "mean", "dense"]
ROWS = (157, 65, 3)


def generated(model, ids, mask, new_tokens=40, **options):
    settings = {"do_sample": False, "pad_token_id": 0, **options}
    return model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, **settings)[:, ids.shape[1] :]


def cached_bytes(cache):
    return sum(layer.nbytes if isinstance(layer, PlanCacheLayer) else layer.keys.nbytes * 2 for layer in cache.layers)


@pytest.mark.parametrize("cache", [True, False])
def test_generate_equals_the_dense_recomputation_token_by_token(any_tiny, cache):
    ids, mask = left_padded(ROWS, 64)
    plan = group_plan(any_tiny, EVICTING)
    with sparsesearch.apply(any_tiny, plan, cache=cache):
        ours = generated(any_tiny, ids, mask)
    for row, length in enumerate(ROWS):
        exact = greedy_oracle(any_tiny, plan, ids[row, -length:], 40)
        assert torch.equal(ours[row], exact), row


def test_embedded_model_generates_what_the_recomputation_gives(needle_7m):
    ids, mask = left_padded(ROWS, 4096)
    plan = group_plan(needle_7m, EVICTING)
    dense = generated(needle_7m, ids, mask, 24)
    with sparsesearch.apply(needle_7m, plan):
        ours = generated(needle_7m, ids, mask, 24)
    exact = [greedy_oracle(needle_7m, plan, ids[row, -length:], 24) for row, length in enumerate(ROWS)]
    assert torch.equal(ours, torch.stack(exact))
    assert not torch.equal(ours, dense)


def test_cached_logits_equal_the_oracle_after_the_ring_has_wrapped(tiny):
    model = tiny("llama")
    plan = group_plan(model, EVICTING)
    ids, _ = left_padded([400], 64)
    exact = oracle_logits(model, plan, ids[0], 40)
    with sparsesearch.apply(model, plan), torch.no_grad():
        output = model(ids[:, :40])
        logits = [output.logits[0]]
        for token in range(40, 400):
            output = model(ids[:, token : token + 1], **{CACHE_KEYWORD: output[CACHE_KEYWORD]})
            logits.append(output.logits[0])
    torch.testing.assert_close(torch.cat(logits), exact, rtol=0, atol=1e-4 * float(exact.abs().max()))


@pytest.mark.parametrize("names", [EVICTING, CONSTANT, ["asks", "dense"]], ids=["elastic", "constant", "asks"])
@pytest.mark.parametrize("chunk", [1, 37, 64])
def test_chunked_prefill_changes_nothing(tiny, names, chunk):
    model = tiny("llama")
    ids, mask = left_padded(ROWS, 64)
    with sparsesearch.apply(model, group_plan(model, names)):
        whole = generated(model, ids, mask)
        cache = sparsesearch.sparse_cache(model, prompt_tokens=ids.shape[1])
        chunked = generated(model, ids, mask, prefill_chunk_size=chunk, **{CACHE_KEYWORD: cache})
        assert torch.equal(whole, chunked)
        if names is CONSTANT:  # nothing need be announced
            assert torch.equal(whole, generated(model, ids, mask, prefill_chunk_size=chunk))


@pytest.mark.parametrize("names", [EVICTING, ["asks", "dense"]], ids=["elastic", "asks"])
def test_unannounced_chunks_are_refused_when_rules_follow_the_prompts_length(tiny, names):
    model = tiny("llama")
    ids, mask = left_padded(ROWS, 64)
    with sparsesearch.apply(model, group_plan(model, names)), pytest.raises(SpecError, match="prompt_tokens="):
        generated(model, ids, mask, prefill_chunk_size=37)


def test_beam_search_equals_masked_beam_search(tiny):
    model = tiny("llama")
    ids, mask = left_padded(ROWS, 64)
    plan = group_plan(model, EVICTING)
    results = []
    for cache in (True, False):
        with sparsesearch.apply(model, plan, cache=cache):
            results.append(generated(model, ids, mask, num_beams=3, use_cache=True))
    assert torch.equal(*results)


def test_a_second_turn_keeps_the_first_prompts_laws(tiny):
    model = tiny("llama")
    plan = group_plan(model, EVICTING)
    ids, _ = left_padded([200], 64)
    exact = oracle_logits(model, plan, ids[0], 90)
    with sparsesearch.apply(model, plan), torch.no_grad():
        first = model(ids[:, :90])
        middle = model(ids[:, 90:91], **{CACHE_KEYWORD: first[CACHE_KEYWORD]})
        second = model(ids[:, 91:], **{CACHE_KEYWORD: middle[CACHE_KEYWORD]})
    ours = torch.cat([first.logits[0], middle.logits[0], second.logits[0]])
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-4 * float(exact.abs().max()))


def test_generate_continues_a_returned_cache(tiny):
    model = tiny("llama")
    ids, mask = left_padded((90, 30), 64)
    with sparsesearch.apply(model, group_plan(model, CONSTANT)):
        once = generated(model, ids, mask, 40)
        settings = {"do_sample": False, "return_dict_in_generate": True}
        first = model.generate(ids, attention_mask=mask, max_new_tokens=20, **settings)
        longer = torch.cat([mask, torch.ones(2, 20, dtype=torch.long)], 1)
        rest = model.generate(
            first.sequences,
            attention_mask=longer,
            max_new_tokens=20,
            **{CACHE_KEYWORD: first[CACHE_KEYWORD]},
            **settings,
        )
    assert torch.equal(rest.sequences[:, ids.shape[1] :], once)


@pytest.mark.parametrize("names", [EVICTING, CONSTANT], ids=["elastic", "constant"])
def test_prompt_lookup_decoding_changes_nothing(tiny, names):
    model = tiny("llama")
    ids, _ = left_padded([40], 8)
    with sparsesearch.apply(model, group_plan(model, names)):
        plain = generated(model, ids, None, 80)
        crops = []
        original = PlanCacheLayer.crop
        try:
            PlanCacheLayer.crop = lambda layer, count: crops.append(count) or original(layer, count)
            looked_up = generated(model, ids, None, 80, prompt_lookup_num_tokens=8)
        finally:
            PlanCacheLayer.crop = original
    assert torch.equal(plain, looked_up)
    assert min(crops) < -1, "something must have been taken back"


def test_assisted_decoding_changes_nothing(tiny):
    model, assistant = tiny("llama"), tiny("llama", num_hidden_layers=1)
    ids, _ = left_padded([60], 64)
    with sparsesearch.apply(model, group_plan(model, CONSTANT)):
        plain = generated(model, ids, None, 40)
        assert torch.equal(plain, generated(model, ids, None, 40, assistant_model=assistant))


def test_taking_back_tokens_restores_every_store(tiny):
    model = tiny("llama")
    ids, _ = left_padded([160], 64)
    with sparsesearch.apply(model, group_plan(model, EVICTING)), torch.no_grad():
        first = model(ids[:, :100])
        step = model(ids[:, 100:101], **{CACHE_KEYWORD: first[CACHE_KEYWORD]})[CACHE_KEYWORD]
        twin = copy.deepcopy(step)
        model(ids[:, 101:131], **{CACHE_KEYWORD: step})
        step.crop(-30)
        again, expected = (model(ids[:, 131:160], **{CACHE_KEYWORD: kv}).logits for kv in (step, twin))
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_taking_back_more_than_the_slack_is_refused(tiny):
    model = tiny("llama")
    ids, _ = left_padded([100], 64)
    with sparsesearch.apply(model, group_plan(model, EVICTING)), torch.no_grad():
        cache = model(ids)[CACHE_KEYWORD]
        with pytest.raises(SparseSearchError, match="at most 32"):
            cache.crop(-33)


def test_static_cache_generates_the_same(any_tiny):
    ids, mask = left_padded(ROWS, 64)
    with sparsesearch.apply(any_tiny, group_plan(any_tiny, EVICTING)):
        dynamic = generated(any_tiny, ids, mask)
        static = generated(any_tiny, ids, mask, cache_implementation="static")
    assert torch.equal(dynamic, static)


def test_memory_really_falls(needle_7m):
    ids, _ = left_padded([2048], 4096)
    plan = group_plan(needle_7m, ["stream", "zero", "mean", "dense"])
    with torch.no_grad():
        dense = cached_bytes(needle_7m(ids)[CACHE_KEYWORD])
        with sparsesearch.apply(needle_7m, plan):
            sparse = cached_bytes(needle_7m(ids)[CACHE_KEYWORD])
    assert sparse / dense == pytest.approx(0.25, abs=0.02)  # one KV head in four keeps everything


def test_a_cache_may_be_reset_and_used_again(tiny):
    model = tiny("llama")
    ids, _ = left_padded([90], 64)
    with sparsesearch.apply(model, group_plan(model, EVICTING)), torch.no_grad():
        cache = DynamicCache()
        first = model(ids, **{CACHE_KEYWORD: cache}).logits
        assert any(isinstance(layer, PlanCacheLayer) for layer in cache.layers)
        cache.reset()
        assert torch.equal(model(ids, **{CACHE_KEYWORD: cache}).logits, first)


def test_a_cache_of_another_plan_or_batch_is_refused(tiny):
    model = tiny("llama")
    ids, _ = left_padded((40, 40), 64)
    with torch.no_grad():
        with sparsesearch.apply(model, group_plan(model, EVICTING)):
            cache = model(ids)[CACHE_KEYWORD]
            with pytest.raises(SpecError, match="batch of 2"):
                model(ids[:1, :1], **{CACHE_KEYWORD: cache})
            with pytest.raises(TypeError, match="different number of keys"):
                _ = cache.layers[0].update(*torch.zeros(2, 2, 2, 1, 8))[0].shape
        with (
            sparsesearch.apply(model, group_plan(model, ["stream"])),
            pytest.raises(SparseSearchError, match="another one"),
        ):
            model(ids[:, :1], **{CACHE_KEYWORD: copy.deepcopy(cache)})


def test_rows_can_be_repeated_and_selected(tiny):
    model = tiny("llama")
    ids, mask = left_padded((60, 20), 64)
    with sparsesearch.apply(model, group_plan(model, EVICTING)), torch.no_grad():
        cache = model(ids, attention_mask=mask)[CACHE_KEYWORD]
        new, wider = ids[:, :1], torch.cat([mask, mask[:, -1:]], 1)
        expected = model(new, attention_mask=wider, **{CACHE_KEYWORD: copy.deepcopy(cache)}).logits
        twice = copy.deepcopy(cache)
        twice.batch_repeat_interleave(2)
        repeated = model(
            new.repeat_interleave(2, 0), attention_mask=wider.repeat_interleave(2, 0), **{CACHE_KEYWORD: twice}
        )
        cache.batch_select_indices(torch.tensor([1]))
        selected = model(new[1:], attention_mask=wider[1:], **{CACHE_KEYWORD: cache})
    tolerance = {"rtol": 0, "atol": 1e-5 * float(expected.abs().max())}
    torch.testing.assert_close(repeated.logits, expected.repeat_interleave(2, 0), **tolerance)
    torch.testing.assert_close(selected.logits, expected[1:], **tolerance)


def test_dense_layers_keep_the_stock_cache(tiny):
    model = tiny("llama")
    ids, _ = left_padded([40], 64)
    with torch.no_grad():
        for plan in (dense_plan(model), cycled_plan(model, ["slash", "pooled"])):
            with sparsesearch.apply(model, plan):
                cache = model(ids)[CACHE_KEYWORD]
                assert not any(isinstance(layer, PlanCacheLayer) for layer in cache.layers)


def test_announced_length_must_be_positive(tiny):
    with pytest.raises(SpecError, match="prompt_tokens"):
        sparsesearch.sparse_cache(tiny("llama"), prompt_tokens=0)
