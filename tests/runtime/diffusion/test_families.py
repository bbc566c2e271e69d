"""Every supported family: grids learned by the hook, dense untouched to the bit, sparse equal to the oracle, and no trace afterwards."""

from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, TEXT, Tiny, hunyuan
from torch import Tensor

from sparsesearch.block_mask import expand
from sparsesearch.errors import UnsupportedModelError
from sparsesearch.kernels.reference import masked_attention
from sparsesearch.plan import Plan, uniform_plan
from sparsesearch.rules import Rule, parse_rule
from sparsesearch.rules.dense import Dense
from sparsesearch.runtime.diffusion.attention import LayerCall, grids_of
from sparsesearch.runtime.diffusion.live import apply_to_transformer, describe_transformer, transformer_sites

BLOCK = 16
RULES = (
    parse_rule({"kind": "diagonal_band", "reach": {"b": 0.15}, "order": "axes(hwf)"}, where="test"),
    parse_rule({"kind": "neighbourhood", "window": "0x2x2", "order": "tile(2,2,2)"}, where="test"),
)


def plan_of(tiny: Tiny, *rules: Rule) -> Plan:
    """Head h of every layer follows the h-th rule."""
    info = describe_transformer(tiny.model, "tiny")
    return Plan(
        base_model=info,
        block_tokens=BLOCK,
        unit="query_head",
        lengths_tokens=(tiny.layout.num_tokens,),
        rules={rule.label: rule for rule in rules},
        assignments={module: tuple(rule.label for rule in rules) for module in info.modules},
    )


def oracle(seen: LayerCall) -> Tensor:
    """Element masks carried back to the model's order, one head of one sequence at a time; shares no code with the runtime's attention."""
    out = torch.zeros_like(seen.q)
    for batch, grid in enumerate(grids_of(seen.call, seen.q.shape[0], BLOCK)):
        assert grid.layout is not None
        length = grid.kv_len
        for head, rule in enumerate(seen.rules):
            back = rule.token_order.inverse(grid.layout)
            mask = expand(rule.select(grid), grid)[back][:, back]
            q, k, v = (x[batch, head, :length] for x in (seen.q, seen.k, seen.v))
            out[batch, head, :length] = masked_attention(q, k, v, mask, scale=seen.scale)[0]
    return out


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.fixture(params=sorted(FAMILIES))
def tiny(request: pytest.FixtureRequest) -> Tiny:
    torch.manual_seed(0)
    return FAMILIES[request.param]()


def test_the_hook_learns_the_grid_from_the_call(tiny: Tiny) -> None:
    seen: list[LayerCall] = []
    with apply_to_transformer(tiny.model, plan_of(tiny, Dense(), Dense())) as applied:
        applied.probe(seen.append)
        tiny.run()
    assert [call.path for call in seen] == [site.path for site in transformer_sites(tiny.model)]
    assert {call.call.layout for call in seen} == {tiny.layout}
    assert {call.q.shape for call in seen} == {(2, 2, tiny.layout.num_tokens, 16)}


def test_all_dense_is_bit_identical(tiny: Tiny) -> None:
    dense = tiny.run()
    with apply_to_transformer(tiny.model, plan_of(tiny, Dense(), Dense())) as applied:
        assert applied.heads_patched == 0
        assert torch.equal(tiny.run(), dense)


def test_sparse_equals_the_oracle_and_leaves_no_trace(tiny: Tiny) -> None:
    dense, processors = tiny.run(), dict(tiny.model.attn_processors)
    attributes = set(tiny.model.__dict__)
    with apply_to_transformer(tiny.model, plan_of(tiny, *RULES)) as applied:
        found = tiny.run()
        applied.probe(oracle)
        wanted = tiny.run()
        assert applied.heads_patched == 4
    assert difference(found, wanted) < 16 * torch.finfo(torch.float32).eps
    assert difference(found, dense) > 1e-3
    assert torch.equal(tiny.run(), dense)
    assert all(tiny.model.attn_processors[path] is before for path, before in processors.items())
    assert set(tiny.model.__dict__) == attributes


def test_skipped_and_mean_value_heads(tiny: Tiny) -> None:
    zero, mean = (parse_rule({"kind": kind}, where="test") for kind in ("zero", "mean_value"))

    def wanted(seen: LayerCall) -> Tensor:
        means = seen.v.mean(2, keepdim=True).expand_as(seen.v)
        return torch.stack([torch.zeros_like(seen.v[:, 0]), means[:, 1]], 1)

    with apply_to_transformer(tiny.model, plan_of(tiny, zero, mean)) as applied:
        found = tiny.run()
        applied.probe(wanted)
        assert difference(found, tiny.run()) < 16 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("real_text", [(TEXT, 3), (1, TEXT), (2, 2)])
def test_padded_text_is_not_seen(real_text: tuple[int, int]) -> None:
    torch.manual_seed(0)
    tiny = hunyuan(real_text)
    with apply_to_transformer(tiny.model, plan_of(tiny, *RULES)) as applied:
        found = tiny.run()
        other = tiny.inputs["encoder_hidden_states"].clone()
        other[torch.arange(TEXT) >= torch.tensor(real_text)[:, None]] = 5.0
        assert difference(tiny.run(encoder_hidden_states=other), found) < 1e-6
        applied.probe(oracle)
        assert difference(found, tiny.run()) < 16 * torch.finfo(torch.float32).eps


def test_text_that_is_not_padded_at_its_end_is_refused() -> None:
    tiny = hunyuan()
    mask: Any = torch.ones(2, TEXT, dtype=torch.bool)
    mask[:, 0] = False
    with (
        apply_to_transformer(tiny.model, plan_of(tiny, *RULES)),
        pytest.raises(UnsupportedModelError, match="Pad prompts on the right"),
    ):
        tiny.run(encoder_attention_mask=mask)


def test_rules_that_look_at_queries_and_keys(tiny: Tiny) -> None:
    dynamic = parse_rule({"kind": "pooled_topk", "keep": 0.5}, where="test")
    plan = plan_of(tiny, dynamic, RULES[0])
    with apply_to_transformer(tiny.model, plan):
        once, twice = tiny.run(), tiny.run()
    assert torch.equal(once, twice)
    with apply_to_transformer(
        tiny.model, uniform_plan(plan.base_model, dynamic, block_tokens=BLOCK, lengths_tokens=(1,))
    ):
        assert not torch.equal(tiny.run(), once)
