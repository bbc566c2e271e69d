"""A replayed prompt equals the same prompt run as it is, and leaves the same cache."""

import pytest
import torch
from runtime_plans import group_plan, left_padded, oracle_logits
from transformers import StaticCache

import sparsesearch
from sparsesearch.errors import SpecError
from sparsesearch.runtime.decode_step import DecodeStep
from sparsesearch.runtime.prompt_graph import PromptGraph

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ["slash", "stream", "pooled", "mean", "dense", "elastic"]


@pytest.mark.parametrize(
    "names", [NAMES, ["bounds everywhere", "stream", "bounds", "mean"]], ids=["prefill", "choosing"]
)
def test_prompts_one_after_another(tiny, names):
    """Each fills the cache anew, and decoding goes on from there."""
    model = tiny("llama", num_hidden_layers=3).to(DEVICE)
    plan = group_plan(model, names)
    with sparsesearch.apply(model, plan, backend="triton" if DEVICE == "cuda" else "torch"):
        cache = sparsesearch.sparse_cache(model, max_tokens=100)
        prompt = PromptGraph(model, cache, 83)
        rows = [left_padded([86], 64, seed)[0][0] for seed in range(3)]
        ours = []
        for row in rows:
            first = prompt(row[None, :83].to(DEVICE)).clone()
            step = DecodeStep(model, cache, first_position=83)
            ours.append(torch.cat([first] + [step(token[None].to(DEVICE)).clone() for token in row[83:]]))
    model = model.cpu()
    for row, logits in zip(rows, ours, strict=True):
        exact = oracle_logits(model, plan, row, 83)[82:]
        assert (logits.cpu() - exact).abs().max() <= 2**10 * torch.finfo(torch.float32).eps * exact.abs().max()


def test_a_model_without_a_plan(tiny):
    model = tiny("llama").to(DEVICE)
    prompt = PromptGraph(model, StaticCache(model.config, max_cache_len=40), 30, batch=2)
    for seed in range(2):
        ids = left_padded([30, 30], 64, seed)[0].to(DEVICE)
        with torch.no_grad():
            expected = model(ids).logits[:, -1]
        torch.testing.assert_close(prompt(ids), expected, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused(tiny):
    model = tiny("llama").to(DEVICE)
    with pytest.raises(SpecError, match="must fit a static cache"):
        PromptGraph(model, StaticCache(model.config, max_cache_len=40), 41)
    prompt = PromptGraph(model, StaticCache(model.config, max_cache_len=40), 30)
    with pytest.raises(SpecError, match=r"must be \(1, 30\)"):
        prompt(torch.zeros(1, 20, dtype=torch.long))
    if DEVICE == "cpu":
        with pytest.raises(SpecError, match="needs a GPU"):
            PromptGraph(model, StaticCache(model.config, max_cache_len=40), 30, graph=True)
