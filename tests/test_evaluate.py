"""Judging: the numbers against their definitions written out."""

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from embedded_model import embedded, plan_of, silence, silencing
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from sparsesearch import calibration
from sparsesearch.block_mask import BlockGrid
from sparsesearch.calibration import Sample
from sparsesearch.cut import Cut, LayerCut
from sparsesearch.errors import SpecError, UnsupportedModelError
from sparsesearch.evaluate import Estimate
from sparsesearch.evaluate.density import TileCount, achieved_density, counting
from sparsesearch.evaluate.head import Head
from sparsesearch.evaluate.reference import DenseReference, answers_right
from sparsesearch.evaluate.run import evaluate
from sparsesearch.rules.base import LengthLaw
from sparsesearch.rules.pooled_topk import PooledTopk
from sparsesearch.rules.sink_window import SinkWindow

LAST_LAYER = [(7, head) for head in range(8)]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _tiny(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    match kind:
        case "llama":
            config = LlamaConfig(
                vocab_size=97,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
            )
            return LlamaForCausalLM(config).eval()
        case "gpt2":
            return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=128)).eval()
        case _:
            config = OPTConfig(
                vocab_size=97,
                hidden_size=32,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                word_embed_proj_dim=32,
            )
            return OPTForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_head_gives_the_models_own_logits(kind: str) -> None:
    model, ids = _tiny(kind), torch.arange(126).view(2, 63) % 97
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    head = Head(model)
    hidden = head.hidden(ids)
    found = torch.stack([head.logits(rows) for rows in hidden])
    error = 8 * torch.finfo(torch.float32).eps * expected.abs().max()  # one product in another blocking of the matrix
    assert (found - expected).abs().max() <= error
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected), "no hook may stay behind"


def test_logits_of_stored_rows_do_not_run_the_body_again() -> None:
    """Nor does a body that has a forward of its own, as accelerate gives it, lose that."""
    model, ids = _tiny("llama"), torch.arange(63).view(1, 63) % 97
    original = model.model.forward
    model.model.forward = lambda *args, **options: original(*args, **options)
    own, runs = model.model.forward, []
    handle = model.model.layers[0].register_forward_hook(lambda *_: runs.append(1))
    head = Head(model)
    hidden = head.hidden(ids)[0]
    found = [head.logits(rows) for rows in hidden.split(21)]
    assert len(runs) == 2, "the body itself, and one token for the first logits"
    assert model.model.forward is own
    handle.remove()
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0]
    torch.testing.assert_close(torch.cat(found), expected)
    assert len(runs) == 2


def test_a_model_without_output_embeddings_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="must have output embeddings"):
        Head(_tiny("llama").model)


def _by_the_book(model: PreTrainedModel, sample: Sample, plan: Any) -> dict[str, float]:
    """The definitions, in fp64, position by position."""
    with torch.no_grad():
        dense = model(input_ids=sample.input_ids[None]).logits[0, :-1].double().log_softmax(-1)
        with silence(model, plan):
            sparse = model(input_ids=sample.input_ids[None]).logits[0, :-1].double().log_softmax(-1)
    target, answer = sample.input_ids[1:], sample.answer_mask[1:]
    kl = (dense.exp() * (dense - sparse)).sum(-1)
    right, runs, whole = sparse.argmax(-1) == target, 0, 0
    for i in range(len(answer)):
        if answer[i] and (i == 0 or not answer[i - 1]):
            end = next((j for j in range(i, len(answer)) if not answer[j]), len(answer))
            runs, whole = runs + 1, whole + int(right[i:end].all())
    return {
        "loss": -sparse[torch.arange(len(target)), target].mean().item(),
        "kl_text": kl.mean().item(),
        "kl_answer": kl[answer].mean().item(),
        "top1_agreement": (sparse.argmax(-1) == dense.argmax(-1)).double().mean().item(),
        "needle": whole / runs if runs else math.nan,
    }


COMPARED = ((7, 0), (7, 7), (3, 2))


def _compared_samples() -> list[Sample]:
    _, tokenizer = embedded()
    return [
        *calibration.load("needle", tokenizer, length_tokens=300, num_samples=3, seed=2).samples,
        *calibration.load("text", tokenizer, length_tokens=63, num_samples=1, seed=2).samples,
    ]


@cache
def _all_by_the_book() -> list[dict[str, float]]:
    model, _ = embedded()
    return [_by_the_book(model, sample, silencing(*COMPARED)) for sample in _compared_samples()]


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
@pytest.mark.parametrize("batch_tokens", [1, 1300])
def test_comparison_equals_its_definition(cache_bytes: int, batch_tokens: int) -> None:
    """Batched, chunked, cached or not: the same numbers as one position after the other in fp64."""
    model, _ = embedded()
    samples, plan = _compared_samples(), silencing(*COMPARED)
    reference = DenseReference(model, samples, cache_bytes=cache_bytes, batch_tokens=batch_tokens, apply=silence)
    found = reference.compare(plan)
    for index, expected in enumerate(_all_by_the_book()):
        for name, value in expected.items():
            # fp32 through eight layers and a sum over 4096 words; logits reach 30
            assert getattr(found, name)[index].item() == pytest.approx(value, rel=1e-3, abs=2e-5, nan_ok=True), name
    scores = reference.score(plan)
    assert scores["kl_text"] == pytest.approx(found.kl_text.mean().item())
    assert scores["kl_answer"] == pytest.approx(found.kl_answer[:3].mean().item())
    assert set(scores) == {"kl_text", "kl_answer", "needle"}


def test_the_runtime_and_the_hooks_of_this_test_agree() -> None:
    """Two independent ways to put the same plan on the model; the default one is the runtime's."""
    model, tokenizer = embedded()
    samples = calibration.load("needle", tokenizer, length_tokens=260, num_samples=2, seed=6).samples
    plan = silencing((7, 0), (7, 1), (3, 2))
    by_runtime = DenseReference(model, samples).compare(plan)
    by_hooks = DenseReference(model, samples, apply=silence).compare(plan)
    for name in ("loss", "kl_text", "kl_answer", "needle"):
        torch.testing.assert_close(getattr(by_runtime, name), getattr(by_hooks, name), rtol=1e-4, atol=1e-6)


def test_an_evaluation_in_the_runtime_counts_dynamic_tiles() -> None:
    model, tokenizer = embedded()
    rule = PooledTopk(keep=LengthLaw(a=128), sink=0)  # 7 of the 10 tiles of 256 tokens
    plan = plan_of(dict.fromkeys(LAST_LAYER, rule))
    found = evaluate(
        model,
        tokenizer,
        {"topk": plan},
        lengths=[256],
        num_sequences=3,
        num_text_sequences=1,
        num_needles=1,
        timing_rounds=1,
    )
    assert found.at(256, "topk").density == pytest.approx((56 + 8 * 7 / 10) / 64)
    assert found.at(256, "topk").kl_text.mean > 0
    assert found.at(256, "topk").prefill_s is not None


def test_dense_against_itself_is_exactly_zero() -> None:
    model, tokenizer = embedded()
    data = calibration.load("needle", tokenizer, length_tokens=300, num_samples=3, seed=0)
    for cache_bytes in (0, 1 << 30):
        reference = DenseReference(model, data.samples, cache_bytes=cache_bytes, apply=silence)
        for plan in (None, silencing()):
            scores = reference.score(plan)
            assert scores["kl_text"] == scores["kl_answer"] == 0.0


def test_plain_text_scores_have_no_answers() -> None:
    model, tokenizer = embedded()
    data = calibration.load("text", tokenizer, length_tokens=130, num_samples=2, seed=0)
    assert set(DenseReference(model, data.samples).score(None)) == {"kl_text"}


def test_answers_right_counts_runs() -> None:
    answer = torch.tensor([[1, 1, 0, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    right = torch.tensor([[1, 1, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 1, 1, 1]], dtype=torch.bool)
    found = answers_right(right, answer)
    assert found[0].item() == pytest.approx(2 / 3)
    assert found[1].isnan()
    assert found[2].item() == 0


def test_a_reference_needs_sequences_and_evaluation_mode() -> None:
    model, tokenizer = _tiny("llama"), embedded()[1]
    with pytest.raises(SpecError, match="at least one sequence"):
        DenseReference(model, [])
    sample = calibration.load("text", tokenizer, length_tokens=20, num_samples=1, seed=0).samples[0]
    with pytest.raises(SpecError, match=r"call model\.eval"):
        DenseReference(model.train(), [sample])


def test_estimate_is_mean_and_standard_error() -> None:
    values = np.random.default_rng(0).normal(3, 2, 50)
    found = Estimate.of([*values.tolist(), math.nan])
    assert found is not None
    assert found.mean == pytest.approx(values.mean())
    assert found.standard_error == pytest.approx(values.std(ddof=1) / math.sqrt(50))
    assert found.num_sequences == 50
    assert Estimate.of([math.nan]) is None


def test_a_share_of_one_is_not_certain() -> None:
    found = Estimate.of_share([1.0] * 96)
    assert found is not None
    assert found.mean == 1.0
    assert 0.005 < found.standard_error < 0.03


def test_density_of_static_rules_is_the_mean_over_heads() -> None:
    window = SinkWindow(sink=0, window=LengthLaw(a=64))  # the diagonal: 8 of 36 tiles at 512
    assert achieved_density(plan_of({}), 512, TileCount()) == 1.0
    found = achieved_density(plan_of(dict.fromkeys(LAST_LAYER, window)), 512, TileCount())
    assert found == pytest.approx((56 + 8 * 8 / 36) / 64)
    assert achieved_density(silencing((0, 0)), 65, TileCount()) == pytest.approx(63 / 64)
    cut = Cut(layers={3: LayerCut(num_heads=8, num_kv_heads=4, num_channels=704, removed_heads=(4, 5))})
    assert achieved_density(plan_of({}, pruning=cut), 512, TileCount()) == pytest.approx(62 / 64)


def test_dynamic_rules_that_keep_everything_need_no_run() -> None:
    plan = plan_of({(0, 0): PooledTopk(keep=LengthLaw(a=512), sink=0)})
    assert achieved_density(plan, 512, TileCount()) == 1.0
    with pytest.raises(SpecError, match="1 heads with dynamic rules"):
        achieved_density(plan, 1024, TileCount())


def test_density_of_dynamic_rules_is_counted_in_the_run() -> None:
    rule = PooledTopk(keep=LengthLaw(a=128), sink=0)  # the diagonal and one more tile: 15 of 36 tiles at 512
    plan, count, original = plan_of({(0, 0): rule}), TileCount(), PooledTopk.select
    q, k = torch.randn(2, 3, 1, 512, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    with counting(plan, count):
        rule.select(BlockGrid(512, 512, 64), q, k)
        rule.select(BlockGrid(1, 512, 64), q[..., :1, :], k)  # decoding does not count
    assert PooledTopk.select is original
    assert count == TileCount(chosen=pytest.approx(3 * 15), reachable=3 * 36)
    assert achieved_density(plan, 512, count) == pytest.approx((63 + 15 / 36) / 64)
    with pytest.raises(SpecError, match="must be counted in a run"):
        achieved_density(plan, 512, TileCount())
