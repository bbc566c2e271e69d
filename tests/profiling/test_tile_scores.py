"""Scoring through tile sums equals running every candidate through the oracle."""

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch

from sparsesearch.block_mask import BlockGrid
from sparsesearch.kernels.reference import tile_attention
from sparsesearch.profiling import tile_scores
from sparsesearch.profiling.layer_scores import LayerInput, late_from
from sparsesearch.profiling.tile_scores import choose_tiles, score_layer, tile_mass
from sparsesearch.rules import LengthLaw, Rule, rule_kinds
from sparsesearch.rules.pooled_topk import PooledTopk
from sparsesearch.rules.vertical_slash import VerticalSlash

RULES: list[Rule] = [
    rule for kind in rule_kinds().values() if not (kind.reuses or kind.needs_layout) for rule in kind.examples()
]


def layer(length: int, heads: int = 4, kv_heads: int = 2, head_dim: int = 8, window: int | None = None) -> LayerInput:
    generator = torch.Generator().manual_seed(length)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    k, v = (draw(kv_heads, length, head_dim).repeat_interleave(heads // kv_heads, 0) for _ in range(2))
    w = draw(heads, head_dim, head_dim)
    return LayerInput(
        q=draw(heads, length, head_dim),
        k=k,
        v=v,
        probes=draw(3, heads, length, head_dim),
        answer=draw(heads, length, head_dim),
        answer_ce=draw(heads, length, head_dim),
        projection_gram=w.transpose(1, 2) @ w,
        sliding_window=window,
        num_kv_heads=kv_heads,
    )


def decoded_delta(
    rule: Rule, data: LayerInput, delta: torch.Tensor, dense: torch.Tensor, queries: Iterable[int]
) -> torch.Tensor:
    """Errors with those of some queries as decoding makes them: each alone, choosing by `select` among the keys before it."""
    if not rule.decodes:
        return delta
    decoded, length = delta.clone(), delta.shape[1]
    for query in queries:
        step = BlockGrid(1, query + 1, 32, law_len=length)
        q, k, v = data.q[:, query : query + 1], data.k[:, : query + 1], data.v[:, : query + 1]
        tiles = rule.select(step, q, k).expand(len(q), 1, step.num_k_blocks)
        decoded[:, query] = tile_attention(q, k, v, tiles, step, scale=1.0)[:, 0] - dense[:, query]
    return decoded


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("rows", [1, 3])
def test_every_sum_equals_the_oracle(length: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strip by strip as on a CPU, and three strips at a time as on a GPU."""
    monkeypatch.setattr(
        tile_scores,
        "_row_groups",
        lambda grid, like: (slice(a, min(a + rows, grid.num_q_blocks)) for a in range(0, grid.num_q_blocks, rows)),
    )
    data, grid = layer(length), BlockGrid(length, length, 32)
    tiles = choose_tiles(RULES, data, grid)
    scores = score_layer(RULES, tiles, data, grid)
    dense = tile_attention(data.q, data.k, data.v, grid.reachable(), grid, scale=1.0)
    late = late_from(length)
    assert late == length - max(1, round(length / 8))
    for index, rule in enumerate(RULES):
        delta = tile_attention(data.q, data.k, data.v, tiles[:, index], grid, scale=1.0, rest=rule.rest) - dense
        products = (delta * data.answer).sum(-1)
        decoded = decoded_delta(rule, data, delta, dense, range(late, length))
        generated = (decoded * data.answer).sum(-1)[:, late:]
        expected = {
            "fisher": torch.einsum("hsd,rhsd->rh", delta, data.probes),
            "answer": products.square().sum(-1),
            "answer_group": products.unflatten(0, (2, 2)).sum(1).square().sum(-1),
            "output_error": torch.einsum("hsd,hde,hse->h", delta, data.projection_gram, delta),
            "late_fisher": torch.einsum("hsd,rhsd->rh", decoded[:, late:], data.probes[:, :, late:]),
            "prompt_fisher": torch.einsum("hsd,rhsd->rh", delta[:, :late], data.probes[:, :, :late]),
            "decode_answer": generated.square().sum(-1),
            "decode_answer_group": generated.unflatten(0, (2, 2)).sum(1).square().sum(-1),
            "prompt_answer": products[:, :late].square().sum(-1),
            "prompt_answer_group": products[:, :late].unflatten(0, (2, 2)).sum(1).square().sum(-1),
            "late_error": torch.einsum("hsd,hde,hse->h", decoded[:, late:], data.projection_gram, decoded[:, late:]),
        }
        for name, value in expected.items():
            scale = dense.abs().sum() + value.abs().max()
            torch.testing.assert_close(
                getattr(scores, name)[..., index], value, rtol=1e-4, atol=float(1e-6 * scale), msg=rule.label
            )


def test_generated_queries_are_those_that_hold_answers() -> None:
    data, grid = layer(130), BlockGrid(130, 130, 32)
    generated = torch.zeros(130, dtype=torch.bool)
    generated[[5, 64, 129]] = True
    tiles = choose_tiles(RULES, data, grid)
    scores = score_layer(RULES, tiles, replace(data, generated=generated), grid)
    dense = tile_attention(data.q, data.k, data.v, grid.reachable(), grid, scale=1.0)
    for index, rule in enumerate(RULES):
        delta = tile_attention(data.q, data.k, data.v, tiles[:, index], grid, scale=1.0, rest=rule.rest) - dense
        decoded = decoded_delta(rule, data, delta, dense, [5, 64, 129])
        expected = (decoded * data.answer).sum(-1)[:, generated].square().sum(-1)
        torch.testing.assert_close(
            scores.decode_answer[:, index], expected, rtol=1e-4, atol=float(1e-6 * dense.abs().sum()), msg=rule.label
        )


@pytest.mark.parametrize("length", [1, 63, 200])
def test_rules_that_share_votes_choose_as_each_would_alone(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And votes are counted once per ballot."""
    data, grid = layer(length), BlockGrid(length, length, 32)
    budgets: list[Rule] = [
        *(VerticalSlash(vertical=LengthLaw(a=a), slash=LengthLaw(a=64), probe=p) for a in (32, 96) for p in (16, 64)),
        *(PooledTopk(keep=LengthLaw(b=b), sink=sink) for b in (0.1, 0.4) for sink in (0, 64)),
    ]
    rules = [*RULES, *budgets]
    alone = torch.stack(
        [
            (rule.select(grid, data.q, data.k) if rule.dynamic else rule.select(grid)).expand(
                4, *grid.reachable().shape
            )
            for rule in rules
        ],
        1,
    )
    counted: list[str] = []
    for kind in (VerticalSlash, PooledTopk):
        monkeypatch.setattr(
            kind, "votes", lambda self, *call, of=kind.votes: counted.append(self.label) or of(self, *call)
        )
    assert torch.equal(choose_tiles(rules, data, grid), alone)
    assert len(counted) == len({(rule.kind_name(), rule.ballot) for rule in rules if rule.ballot is not None}) < 9


def test_mass_and_influence_equal_autograd() -> None:
    length, block = 70, 32
    data, grid = layer(length), BlockGrid(length, length, block)
    logits = (data.q @ data.k.transpose(1, 2)).double()
    hidden = torch.ones(length, length).triu(1).bool()
    attention = logits.masked_fill(hidden, -torch.inf).softmax(-1).requires_grad_()
    ((attention @ data.v.double()) * data.answer_ce.double()).sum().backward()
    slope = attention.grad
    assert slope is not None
    with torch.no_grad():
        centred = slope - (slope * attention).sum(-1, keepdim=True)
        influence = -attention / (1 - attention).clamp(min=1e-6) * centred * (attention < 1 - 1e-6)
    scores = score_layer(RULES, choose_tiles(RULES, data, grid), data, grid)
    for row in range(grid.num_q_blocks):
        for column in range(row + 1):
            part = (slice(None), slice(row * block, (row + 1) * block), slice(column * block, (column + 1) * block))
            torch.testing.assert_close(
                scores.mass[:, row, column].double(), attention[part].sum((1, 2)), rtol=1e-4, atol=1e-5
            )
            torch.testing.assert_close(
                scores.influence[:, row, column].double(), influence[part].sum((1, 2)), rtol=1e-3, atol=1e-3
            )
    torch.testing.assert_close(tile_mass((data.q, data.k), grid, None), scores.mass)


def test_errors_against_the_present_rule() -> None:
    data, grid = layer(130), BlockGrid(130, 130, 32)
    tiles = choose_tiles(RULES, data, grid)
    now = torch.tensor([3, 5, 0, len(RULES) - 1])
    around_dense, around_now = score_layer(RULES, tiles, data, grid), score_layer(RULES, tiles, data, grid, now)
    expected = around_dense.fisher - around_dense.fisher.gather(2, now.expand(3, 4)[..., None])
    torch.testing.assert_close(around_now.fisher, expected, rtol=1e-4, atol=1e-3)
    assert around_now.answer.gather(1, now[:, None]).abs().max() == 0


def test_the_models_own_window_is_the_dense_reference() -> None:
    windowed, full = layer(128, window=40), layer(128)
    rules = [rule_kinds()["dense"].examples()[0]]
    grid = BlockGrid(128, 128, 32)
    tiles = choose_tiles(rules, full, grid)
    assert score_layer(rules, tiles, windowed, grid).mass[:, 3, 0].abs().max() == 0
    assert score_layer(rules, tiles, full, grid).mass[:, 3, 0].min() > 0
