"""Every kind of rule that ships, in every way a model can be fed, against the recomputation. A new kind must be added to `SMALL`."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from runtime_plans import BLOCK_TOKENS, left_padded, oracle_logits
from torch import Tensor
from transformers import PreTrainedModel

import sparsesearch
from sparsesearch.plan import Plan
from sparsesearch.rules import Rule, parse_rule, rule_kinds
from sparsesearch.runtime.cache_keyword import CACHE_KEYWORD
from sparsesearch.runtime.decode_step import DecodeStep
from sparsesearch.runtime.fingerprint import describe
from sparsesearch.runtime.oracle import oracle_logits as product_oracle

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = [
    {"kind": "dense"},
    {"kind": "zero"},
    {"kind": "mean_value"},
    {"kind": "sink_window", "sink": 16, "window": 32},
    {"kind": "sink_window", "sink": 0, "window": {"a": 16, "b": 0.25}},
    {"kind": "tri_shape", "sink": 16, "window": 16, "last": 20},
    {"kind": "power_lags", "segment": 16, "window": 1, "sink": 1},
    {"kind": "strided_shards", "local": 16, "stride": 3, "offset": 1},
    {"kind": "fixed_blocks", "keep": 0.4},
    {"kind": "vertical_slash", "vertical": 32, "slash": 32, "probe": 16},
    {"kind": "pooled_topk", "keep": {"b": 0.3}, "sink": 16},
    {"kind": "bounds_topk", "keep": 48, "sink": 16},
    {"kind": "bounds_topk", "keep": {"b": 0.3}, "sink": 0, "prefill": True},
    {"kind": "antidiagonal", "mass": 0.5, "stride": 4},
    {"kind": "flex_prefill", "gamma": 0.5, "tau": 0.3, "min_budget": 16, "probe": 16},
    {"kind": "tree_topk", "keep": {"b": 0.2}, "root": 64, "sink": 16, "window": 16, "queries": 2},
    {"kind": "chunk_topk", "keep": {"b": 0.3}, "chunk": 16, "cell": 8, "variable": True, "sink": 16},
    {"kind": "segment_topk", "keep": 0.3, "decay": 0.5, "segment": 32, "segments": 1},
    {"kind": "skip_softmax", "prefill_scale": 100, "decode_scale": 60},
    {"kind": "token_rows", "tail": 0.4, "min_tokens": 16, "window": 16, "probe": 16},
    {"kind": "dense_source", "keep": {"b": 0.3}, "sink": 16},
    {"kind": "dense_source", "keep": {"b": 0.3}, "sink": 0, "decode": True},
    {"kind": "reuse", "layer": 0},
    {"kind": "reuse", "layer": 0, "heads": (3, 0, 1, 2), "decode": True},
]
SOURCES = {  # of all heads of the first layer, where the rule reuses
    False: [{"kind": "pooled_topk", "keep": {"b": 0.3}, "sink": 16}],
    True: [
        {"kind": "bounds_topk", "keep": 48, "sink": 0},
        {"kind": "dense_source", "keep": {"b": 0.3}, "sink": 0, "decode": True},
        {"kind": "skip_softmax", "decode_scale": 60},
    ],
}
each = pytest.mark.parametrize("data", SMALL, ids=lambda data: ",".join(str(x) for x in data.values()))
ROWS, NEW_TOKENS = (83, 40, 3), 20


def made(data: dict) -> Rule:
    one = parse_rule(data, where="tests")
    return one if one.ready else one.calibrated(torch.rand(7, 7, generator=torch.Generator().manual_seed(3)))


def kernel_cases() -> Iterator[Any]:
    """All on a GPU; interpreted, what is slow says little: static rules differ in their tiles only, and few go another way in a dynamic cache."""
    for kind in ("packed", "static", "dynamic"):
        for data in SMALL:
            rule = made(data)
            if DEVICE == "cuda" or (rule.dynamic and kind != "dynamic") or rule.decodes or rule.reuses:
                yield pytest.param(data, kind, id=f"{kind}-{','.join(str(x) for x in data.values())}")


def planned(tiny, data: dict, layers: int = 2) -> tuple[PreTrainedModel, Plan]:
    """Both heads of the first KV head follow the rule, one of the second, beside a window; a reuse has a layer of sources before it.

    A reuse by decoded tokens has sources of every kind.
    """
    model = tiny("llama", num_hidden_layers=layers + (data["kind"] == "reuse")).to(DEVICE)
    one, other = made(data), made(SMALL[3])
    info = describe(model, "tests")
    own = [(one, one, one, other)] * len(info.modules)
    if one.reuses:
        sources = [made(data) for data in SOURCES[one.decodes]]
        own[0] = tuple(sources[head % len(sources)] for head in range(4))
    rules = {rule.label: rule for layer in own for rule in layer}
    assignments = {path: tuple(rule.label for rule in layer) for path, layer in zip(info.modules, own, strict=True)}
    return model, Plan(
        base_model=info,
        block_tokens=BLOCK_TOKENS,
        unit="query_head",
        lengths_tokens=(256,),
        rules=rules,
        assignments=assignments,
    )


def close(ours: Tensor, exact: Tensor) -> None:
    """Within float32's error of three layers."""
    assert (ours.cpu() - exact.cpu()).abs().max() <= 2**11 * torch.finfo(torch.float32).eps * exact.abs().max()


def fed(model: PreTrainedModel, parts: list[Tensor], cache: object) -> Tensor:
    return torch.cat([model(part[None].to(DEVICE), **{CACHE_KEYWORD: cache}).logits[0] for part in parts])


def test_no_kind_is_left_out() -> None:
    shipped = {name for name, kind in rule_kinds().items() if not kind.needs_layout}
    assert shipped == {data["kind"] for data in SMALL}


@pytest.mark.parametrize(
    ("data", "kind"),
    [(data, kind) for data in SMALL for kind in ("dynamic", "static")] + [(data, "masked") for data in SMALL[1:5]],
    ids=str,
)
def test_a_padded_batch_is_prefilled_and_decoded(tiny, data, kind):
    model, plan = planned(tiny, data)
    ids, mask = left_padded(ROWS, 64)
    more = torch.randint(1, 64, (len(ROWS), NEW_TOKENS), generator=torch.Generator().manual_seed(1))
    whole, seen = torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1).to(DEVICE)
    places = (seen.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), sparsesearch.apply(model, plan, cache=kind != "masked"):
        cache = sparsesearch.sparse_cache(model, max_tokens=whole.shape[1] if kind == "static" else None)
        product = product_oracle(model, whole[0].to(DEVICE), ROWS[0]) if kind == "dynamic" else None
        logits, start = [], 0
        for part in (ids.to(DEVICE), *more.to(DEVICE).split(1, 1)):
            end = start + part.shape[1]
            inputs = {"attention_mask": seen[:, :end], "position_ids": places[:, start:end]}
            logits.append(model(part, **inputs, **{CACHE_KEYWORD: cache}).logits)
            start = end
    found = torch.cat(logits, 1)
    for row, length in enumerate(ROWS):
        exact = oracle_logits(model, plan, whole[row, -length - NEW_TOKENS :].to(DEVICE), length)
        close(found[row, -length - NEW_TOKENS :], exact)
        if row == 0 and product is not None:  # what `sparsesearch verify` compares with
            close(product, exact)


@each
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_chunks_then_tokens_then_a_second_turn(tiny, data, kind):
    model, plan = planned(tiny, data)
    ids = left_padded([150], 64)[0][0]
    calls = [37, 37, 16, *[1] * 9, 30, *[1] * 21]
    with torch.no_grad(), sparsesearch.apply(model, plan):
        cache = sparsesearch.sparse_cache(model, prompt_tokens=90, max_tokens=150 if kind == "static" else None)
        found = fed(model, list(ids.split(calls)), cache)
    close(found, oracle_logits(model, plan, ids.to(DEVICE), 90, calls))


@each
def test_tokens_taken_back_leave_nothing(tiny, data):
    model, plan = planned(tiny, data)
    ids = left_padded([100], 64)[0][0]
    with torch.no_grad(), sparsesearch.apply(model, plan):
        cache = sparsesearch.sparse_cache(model)
        fed(model, [ids[:70], *ids[70:85].split(1), ids[:20] + 1], cache)
        cache.crop(-20)
        found = fed(model, list(ids[85:].split(1)), cache)
    close(found, oracle_logits(model, plan, ids.to(DEVICE), 70)[85:])


@each
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_rows_change_places(tiny, data, kind):
    """As beam search does: both rows go on from the second one's cache."""
    model, plan = planned(tiny, data)
    ids = torch.stack([left_padded([60], 64, seed=seed)[0][0] for seed in (0, 1)]).to(DEVICE)
    new = torch.arange(1, 17, device=DEVICE).view(2, 8)
    with torch.no_grad(), sparsesearch.apply(model, plan):
        cache = sparsesearch.sparse_cache(model, max_tokens=80 if kind == "static" else None)
        model(ids, **{CACHE_KEYWORD: cache})
        model(ids[:, :1], **{CACHE_KEYWORD: cache})
        cache.reorder_cache(torch.tensor([1, 1], device=DEVICE))
        found = torch.cat([model(part, **{CACHE_KEYWORD: cache}).logits for part in new.split(1, 1)], 1)
    for row in range(2):
        whole = torch.cat([ids[1], ids[1, :1], new[row]])
        close(found[row], oracle_logits(model, plan, whole, 60)[61:])


@pytest.mark.parametrize(("data", "kind"), list(kernel_cases()))
def test_kernels_do_the_same(tiny, data, kind):
    """Interpreted without a GPU. Two sequences of one row packed; a prompt in two chunks, and tokens over a block's end."""
    model, plan = planned(tiny, data, layers=1)
    ids = left_padded([50], 64)[0][0].to(DEVICE)
    positions = torch.cat([torch.arange(29), torch.arange(21)])[None].to(DEVICE)
    with torch.no_grad(), sparsesearch.apply(model, plan, backend="triton"):
        if kind == "packed":
            packed = model(ids[None], position_ids=positions, use_cache=False).logits[0]
            for part, own in ((ids[:29], packed[:29]), (ids[29:], packed[29:])):
                close(own, oracle_logits(model, plan, part))
            return
        cache = sparsesearch.sparse_cache(model, prompt_tokens=47, max_tokens=50 if kind == "static" else None)
        found = fed(model, [ids[:35], ids[35:47], *ids[47:].split(1)], cache)
    close(found, oracle_logits(model, plan, ids, 47, [35, 12, 1, 1, 1]))


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_all_heads_may_choose(tiny, backend):
    """Then nothing else is read."""
    model, plan = planned(tiny, SMALL[11], layers=1)
    label = made(SMALL[11]).label
    plan = plan.model_copy(update={"assignments": dict.fromkeys(plan.assignments, (label,) * 4)})
    ids = left_padded([75], 64)[0][0].to(DEVICE)
    with torch.no_grad(), sparsesearch.apply(model, plan, backend=backend):
        cache = sparsesearch.sparse_cache(model, max_tokens=75)
        found = fed(model, [ids[:70], *ids[70:].split(1)], cache)
    close(found, oracle_logits(model, plan, ids, 70))


@each
def test_a_decoding_step_does_the_same(tiny, data):
    """On a GPU captured and replayed."""
    model, plan = planned(tiny, data)
    ids = left_padded([75], 64)[0][0].to(DEVICE)
    with torch.no_grad(), sparsesearch.apply(model, plan):
        cache = sparsesearch.sparse_cache(model, max_tokens=75)
        model(ids[None, :62], **{CACHE_KEYWORD: cache})
        step = DecodeStep(model, cache, first_position=62)
        found = torch.cat([step(token).clone() for token in ids[62:].split(1)])
    close(found, oracle_logits(model, plan, ids, 62)[62:])
