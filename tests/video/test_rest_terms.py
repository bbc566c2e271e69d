"""Rest terms against their formulas, written out query by query in fp64, on odd shapes and every backend that serves them."""

import math

import pytest
import torch

from sparsesearch.block_mask import BlockGrid, expand
from sparsesearch.errors import SpecError
from sparsesearch.estimators import block_means, rows_per_block
from sparsesearch.kernels.dispatch import Backend
from sparsesearch.kernels.ordered import StepMemory, attend
from sparsesearch.kernels.reference import level_attention, masked_attention
from sparsesearch.kernels.rest_terms import merge, pooled_state
from sparsesearch.layout import Layout, video_layout
from sparsesearch.order import parse_order
from sparsesearch.rules import LengthLaw, Rule, parse_rule
from sparsesearch.rules.block_mass import BlockMass
from sparsesearch.rules.cached_rest import CachedRest
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.diagonal_band import DiagonalBand
from sparsesearch.rules.neighbourhood import Neighbourhood
from sparsesearch.rules.pooled_mass import PooledMass
from sparsesearch.rules.pyramid import Pyramid, sampled_importance
from sparsesearch.rules.rectified_rest import RectifiedRest
from sparsesearch.rules.taylor_rest import TaylorRest

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = 0.25
BAND = DiagonalBand(reach=LengthLaw(b=0.1), order=parse_order("axes(hwf)"))
RULES: tuple[Rule, ...] = (
    TaylorRest(of=BAND, terms=0),
    TaylorRest(of=BAND),
    RectifiedRest(of=PooledMass(keep=0.2, mass=0.5)),
    RectifiedRest(of=BAND, gate=False),
    Pyramid(shares=(0.2, 0.2, 0.2, 0.2)),
    Pyramid(shares=(0.3, 0.2, 0.2, 0.2), by="mass", order=parse_order("gilbert")),
    TaylorRest(of=PooledMass(keep=0.2)),
    Dense(),
)
LAYOUTS = [
    video_layout(1, 1, 1),
    video_layout(3, 3, 7),
    video_layout(3, 5, 7),
    video_layout(4, 8, 8, text_first=13),
    video_layout(5, 6, 7, text_last=21),
]


def grid_of(layout: Layout, block: int = 16) -> BlockGrid:
    return BlockGrid(layout.num_tokens, layout.num_tokens, block, causal=False, layout=layout)


def tensors(layout: Layout, heads: int, kv_heads: int, batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(layout.num_tokens)
    return [
        torch.randn(batch, count, layout.num_tokens, 16, generator=generator).to(DEVICE) * 2
        for count in (heads, kv_heads, kv_heads)
    ]


def oracle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: BlockGrid, rule: Rule) -> torch.Tensor:
    """One head in its rule's order, block by block and query by query, on the CPU; the rule chooses where the runtime chose."""
    levels = rule.levels(grid, q * SCALE, k).reshape(grid.num_q_blocks, grid.num_k_blocks).cpu()
    q, k, v = (x.double().cpu() for x in (q, k, v))
    match rule:
        case TaylorRest():
            return taylor(q, k, v, levels, grid, rule.terms)
        case RectifiedRest():
            return rectified(q, k, v, levels == 1, grid, rule)
        case _:
            return level_attention(q, k, v, levels, grid, scale=SCALE)[0]


def taylor(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, levels: torch.Tensor, grid: BlockGrid, terms: int
) -> torch.Tensor:
    block, count = grid.block_tokens, grid.num_k_blocks
    pieces = [slice(j * block, min((j + 1) * block, grid.kv_len)) for j in range(count)]
    spread = sum(
        ((k[p] - k[p].mean(0)).T @ v[p] for p in pieces), torch.zeros(16, 16, dtype=torch.double, device=q.device)
    )
    out = torch.zeros_like(q)
    for i in range(grid.kv_len):
        numerator, total, tail = torch.zeros(16, dtype=torch.double, device=q.device), 0.0, 0.0
        for j, piece in enumerate(pieces):
            if levels[i // block, j] == 1:
                weights = (q[i] @ k[piece].T * SCALE).exp()
                numerator, total = numerator + weights @ v[piece], total + float(weights.sum())
            else:
                weight = (piece.stop - piece.start) * float((q[i] @ k[piece].mean(0) * SCALE).exp())
                numerator, total, tail = numerator + weight * v[piece].mean(0), total + weight, tail + weight
        out[i] = (numerator + terms * tail * SCALE * (q[i] @ spread) / grid.kv_len) / total
    return out


def rectified(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiles: torch.Tensor, grid: BlockGrid, rule: RectifiedRest
) -> torch.Tensor:
    assert grid.layout is not None
    block, count = grid.block_tokens, grid.num_k_blocks
    pieces = [slice(j * block, min((j + 1) * block, grid.kv_len)) for j in range(count)]
    kinds = [segment.kind for segment in grid.layout.segments]
    owner = grid.layout.segment_of_token()[rule.token_order.permutation(grid.layout)]
    text = torch.tensor([kinds[int(s)] == "text" for s in owner])
    sparse = masked_attention(q, k, v, expand(tiles, grid).to(q.device), scale=SCALE)[0]
    out = torch.zeros_like(q)
    for p, rows in enumerate(pieces):
        mean_q, away_q = q[rows].mean(0) * SCALE, (q[rows] - q[rows].mean(0)).abs().mean(0) * SCALE
        weights, worth = [], []
        for piece in pieces:
            mean_k = k[piece].mean(0)
            away_k = (k[piece] - mean_k).abs().mean(0)
            if text[piece].any():
                weights.append(float((k[piece] @ mean_q).exp().sum()))
            else:
                weights.append((piece.stop - piece.start) * float((mean_q @ mean_k).exp()))
            error = float(away_q @ mean_k.abs() + mean_q.abs() @ away_k)
            worth.append(not rule.gate or abs(float(mean_q @ mean_k)) > error)
        tail = [j for j in range(count) if not tiles[p, j] and worth[j]]
        share = 1 - sum(weights[j] for j in tail) / sum(weights)
        out[rows] = share * sparse[rows]
        for j in tail:
            out[rows] += weights[j] / sum(weights) * v[pieces[j]].mean(0)
    return out


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: str([s.shape for s in layout.segments]))
@pytest.mark.parametrize(("kv_heads", "backend"), [(8, "torch"), (2, "torch"), (8, "reference"), (2, "triton")])
def test_equals_the_formula(layout: Layout, kv_heads: int, backend: Backend) -> None:
    if backend == "triton" and DEVICE == "cpu" and layout.num_tokens > 110:
        pytest.skip("slow in the interpreter")
    q, k, v = tensors(layout, len(RULES), kv_heads)
    grid = grid_of(layout)
    result = attend(q, k, v, grid, RULES, scale=SCALE, backend=backend)
    atol = 2e-5 if DEVICE == "cpu" or backend != "triton" else 5e-3
    for batch in range(2):
        for head, rule in enumerate(RULES):
            there, back = (x(layout, DEVICE) for x in (rule.token_order.permutation, rule.token_order.inverse))
            one = [x[batch, h][there] for x, h in ((q, head), (k, head * kv_heads // 8), (v, head * kv_heads // 8))]
            expected = oracle(one[0], one[1], one[2], grid, rule)[back.cpu()]
            assert torch.allclose(result[batch, head].double().cpu(), expected, atol=atol), rule.label


@pytest.mark.parametrize("layout", [video_layout(3, 3, 7), video_layout(2, 5, 7, text_last=5)])
def test_exact_mass_by_the_kernel_chooses_as_the_rule_does(layout: Layout) -> None:
    """On a device one dense launch gives the log-sum-exp and a kernel the tiles' mass; grouped keys, a rest term over it, another order."""
    rules: tuple[Rule, ...] = (
        BlockMass(keep=0.3),
        Dense(),
        TaylorRest(of=BlockMass(keep=0.3), terms=0),
        BlockMass(keep=0.5, order=parse_order("tile(2,2,4)")),
    )
    q, k, v = tensors(layout, 4, 2)
    grid = grid_of(layout)
    found = attend(q, k, v, grid, rules, scale=SCALE, backend="triton")
    expected = attend(q.cpu(), k.cpu(), v.cpu(), grid, rules, scale=SCALE, backend="torch")
    assert torch.allclose(found.cpu(), expected, atol=2e-5 if DEVICE == "cpu" else 5e-3)


@pytest.mark.parametrize("shape", [(63, 63), (64, 130), (17, 200)])
@pytest.mark.parametrize("level", [2, 4, 8, 16])
def test_parts_merge_into_one_softmax(shape: tuple[int, int], level: int) -> None:
    """Later chunks of a sequence too: queries that start inside a block."""
    grid = BlockGrid(shape[0], shape[1], 16, causal=False)
    generator = torch.Generator().manual_seed(level)
    q = torch.randn(2, grid.q_len, 16, generator=generator, dtype=torch.double)
    k, v = torch.randn(2, 2, grid.kv_len, 16, generator=generator, dtype=torch.double)
    levels = torch.tensor([0, 1, level])[
        torch.randint(3, (2, grid.num_q_blocks, grid.num_k_blocks), generator=generator)
    ]
    exact = masked_attention(q, k, v, expand(levels == 1, grid), scale=SCALE)
    found = merge([exact, pooled_state(q, k, v, levels == level, level, grid, scale=SCALE)])
    out, lse = level_attention(q, k, v, levels, grid, scale=SCALE)
    assert torch.allclose(found[0], out.nan_to_num(0.0), atol=1e-12)
    assert torch.allclose(found[1], lse, atol=1e-12)


@pytest.mark.parametrize("level", [2, 4, 8, 16])
def test_pooling_equal_keys_is_dense_attention(level: int) -> None:
    """The identity that pooled tails rest on: keys that are equal within a group, any values, any split into exact and pooled tiles."""
    grid = BlockGrid(200, 200, 16, causal=False)
    generator = torch.Generator().manual_seed(level)
    q, v = torch.randn(2, 3, 200, 16, generator=generator, dtype=torch.double)
    k = torch.randn(3, -(-200 // level), 16, generator=generator, dtype=torch.double).repeat_interleave(level, 1)[
        :, :200
    ]
    tiles = torch.rand(3, 13, 13, generator=generator) < 0.3
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=SCALE)
    exact = masked_attention(q, k, v, expand(tiles, grid), scale=SCALE)
    found = merge([exact, pooled_state(q, k, v, ~tiles, level, grid, scale=SCALE)])[0]
    assert (found - dense).abs().max() < 1e-13
    assert (level_attention(q, k, v, torch.where(tiles, 1, level), grid, scale=SCALE)[0] - dense).abs().max() < 1e-13


@pytest.mark.parametrize("terms", [0, 1])
def test_taylor_of_equal_keys_is_dense_attention(terms: int) -> None:
    """H is 0 then; in fp32, through the runtime."""
    layout = video_layout(4, 8, 8)
    q, k, v = tensors(layout, 1, 1)
    k = k[:, :, ::16].repeat_interleave(16, 2)
    rule = TaylorRest(of=Neighbourhood(window=(1, 1, 1)), terms=terms)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=SCALE)
    assert torch.allclose(attend(q, k, v, grid_of(layout), (rule,), scale=SCALE), dense, atol=5e-6)


def test_first_order_improves_the_expansion() -> None:
    """Small deviations from equal block means: zeroth order errs in second order of the scores, first order with the true H too, but less."""
    layout = video_layout(4, 8, 8)
    grid, generator = grid_of(layout), torch.Generator().manual_seed(0)
    q, v = torch.randn(2, 1, 2, 256, 16, generator=generator)
    drift = torch.randn(16, generator=generator)
    v = v + (torch.arange(256) % 16 - 7.5)[:, None] * 0.2 * drift  # values that move with the keys inside every block
    k = (torch.arange(256) % 16 - 7.5)[:, None] * 0.05 * drift + torch.randn(1, 2, 256, 16, generator=generator) * 0.01
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=SCALE)
    errors = [
        float(
            (attend(q, k, v, grid, (TaylorRest(of=BAND_IN_PLACE, terms=terms),) * 2, scale=SCALE) - dense)
            .square()
            .mean()
        )
        for terms in (0, 1)
    ]
    assert errors[1] < 0.1 * errors[0]


BAND_IN_PLACE = DiagonalBand(reach=LengthLaw(b=0.05))


def test_pyramid_levels_follow_the_quotas() -> None:
    layout = video_layout(4, 16, 16, text_last=24)
    grid = grid_of(layout, 64)
    q, k, _ = (x[0].cpu() for x in tensors(layout, 2, 2))
    levels = Pyramid(shares=(0.125, 0.125, 0.25, 0.25)).levels(grid, q * SCALE, k)
    importance = sampled_importance(q * SCALE, k, grid)
    free = levels[:, :16, :16]
    for head in range(2):
        for row in range(16):
            ranked = importance[head, row, :16].argsort(descending=True)
            wanted = torch.tensor([1, 1, 2, 2, 4, 4, 4, 4, 8, 8, 8, 8, 0, 0, 0, 0], dtype=torch.int16)
            got = free[head, row, ranked]
            own = ranked == row  # the diagonal is always exact
            assert torch.equal(got[~own], wanted[~own])
            assert got[own] == 1
    assert (levels[:, 16:] == 1).all()
    assert (levels[:, :, 16:] == 1).all()


def test_pyramid_bands_of_mass() -> None:
    """Cumulative bands as published: .4 exact, to .5 by two, to .6 by four, to .8 by eight."""
    grid = BlockGrid(320, 320, 32, causal=False, layout=video_layout(5, 8, 8))
    q, k = torch.randn(2, 1, 320, 16, generator=torch.Generator().manual_seed(0))
    levels = Pyramid(shares=(0.4, 0.1, 0.1, 0.2), by="mass").levels(grid, q, k)[0]
    mass = sampled_importance(q, k, grid)[0].double()
    for row in range(10):
        before = 0.0
        for column in mass[row].argsort(descending=True).tolist():
            middle = (before + float(mass[row, column]) / 2) / float(mass[row].sum())
            before += float(mass[row, column])
            expected = next((n for n, end in ((1, 0.4), (2, 0.5), (4, 0.6), (8, 0.8)) if middle < end), 0)
            assert levels[row, column] == (1 if row == column else expected)


def test_sampled_importance_is_the_largest_weight() -> None:
    grid = BlockGrid(77, 77, 16, causal=False)
    q, k = torch.randn(2, 3, 77, 8, generator=torch.Generator().manual_seed(0))
    weights = (q[:, ::4] @ k[:, ::4].transpose(1, 2)).softmax(-1)
    found = sampled_importance(q, k, grid)
    for p in range(5):
        for j in range(5):
            expected = weights[:, 4 * p : 4 * p + 4, 4 * j : 4 * j + 4].amax((1, 2))
            assert torch.allclose(found[:, p, j], expected)


def test_cached_residual_over_steps() -> None:
    """Refresh: dense. One step on with the same tensors: dense again, if nothing drifts. Later: ρ·O_S + Δ with the measured ρ and Δ."""
    layout = video_layout(4, 8, 8, text_last=5)
    grid = grid_of(layout)
    rules = (CachedRest(of=BAND, every=3), Dense(), CachedRest(of=BAND_IN_PLACE, every=3, drift=0.05))
    q, k, v = tensors(layout, 3, 3)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=SCALE)
    memory = StepMemory(step=4)
    assert torch.allclose(attend(q, k, v, grid, rules, scale=SCALE, memory=memory), dense, atol=1e-5)
    memory.step = 5
    again = attend(q, k, v, grid, rules, scale=SCALE, memory=memory)
    assert torch.allclose(again[:, :2], dense[:, :2], atol=1e-5)
    other = [x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(7)).to(DEVICE) for x in (q, k, v)]
    memory.step = 6
    later = attend(other[0], other[1], other[2], grid, rules, scale=SCALE, memory=memory)
    mask = expand(rules[2].select(grid), grid).to(DEVICE)
    for batch in range(2):
        kept, kept_lse = masked_attention(q[batch, 2], k[batch, 2], v[batch, 2], mask, scale=SCALE)
        share = (kept_lse - (q[batch, 2] @ k[batch, 2].T * SCALE).double().logsumexp(-1)).exp()[:, None]
        missing = dense[batch, 2].double() - share * kept.double()
        own = masked_attention(other[0][batch, 2], other[1][batch, 2], other[2][batch, 2], mask, scale=SCALE)[
            0
        ].double()
        expected = (share + 2 * 0.05).clamp(max=1) * own + missing
        assert torch.allclose(later[batch, 2].double(), expected, atol=1e-5)
    memory.step = 7  # three steps on: dense
    other_dense = torch.nn.functional.scaled_dot_product_attention(*other, scale=SCALE)
    assert torch.allclose(
        attend(other[0], other[1], other[2], grid, rules, scale=SCALE, memory=memory), other_dense, atol=1e-5
    )
    memory.step = 0  # a new run
    assert torch.allclose(attend(q, k, v, grid, rules, scale=SCALE, memory=memory), dense, atol=1e-5)


def test_cached_residual_needs_the_step() -> None:
    layout = video_layout(2, 4, 4)
    q, k, v = tensors(layout, 1, 1)
    with pytest.raises(SpecError, match="must know the denoising step"):
        attend(q, k, v, grid_of(layout), (CachedRest(of=BAND),), scale=SCALE)


def test_rows_of_different_length() -> None:
    long, short = video_layout(4, 6, 6, text_last=20), video_layout(4, 6, 6, text_last=15)
    rules = (*RULES, CachedRest(of=BAND))
    q, k, v = tensors(long, len(rules), len(rules))
    result = attend(q, k, v, [grid_of(short), grid_of(long)], rules, scale=SCALE, memory=StepMemory(step=0))
    alone = attend(
        q[:1, :, : short.num_tokens], k[:1, :, : short.num_tokens], v[:1, :, : short.num_tokens], grid_of(short), rules,
        scale=SCALE, memory=StepMemory(step=0),
    )  # fmt: skip
    assert torch.allclose(result[:1, :, : short.num_tokens], alone, atol=1e-6)
    assert not result[0, :, short.num_tokens :].any()


def test_kept_choices_keep_their_levels() -> None:
    layout = video_layout(4, 8, 8)
    rules = (Pyramid(shares=(0.2, 0.2, 0.2, 0.2)), Dense())
    q, k, v = tensors(layout, 2, 2)
    grid, memory = grid_of(layout), StepMemory(chosen={})
    attend(q, k, v, grid, rules, scale=SCALE, memory=memory)
    other = torch.randn(q.shape, generator=torch.Generator().manual_seed(9)).to(DEVICE)
    kept = attend(other, k, v, grid, rules, scale=SCALE, memory=memory)
    levels = rules[0].levels(grid, q[:, 0] * SCALE, k[:, 0])
    expected = level_attention(other[:, 0], k[:, 0], v[:, 0], levels, grid, scale=SCALE)[0]
    assert torch.allclose(kept[:, 0].double(), expected, atol=2e-5)


@pytest.mark.parametrize(
    ("rule", "tiles"),
    [
        (Neighbourhood(window=(1, 0, 0)), 8),
        (TaylorRest(of=Neighbourhood(window=(1, 0, 0)), terms=0), 8 + 56 / 64),
        (TaylorRest(of=Neighbourhood(window=(1, 0, 0))), 8 + 56 / 64 + 8 / 2),
        (CachedRest(of=Neighbourhood(window=(1, 0, 0)), every=4), 8 + 64 / 4),
    ],
)
def test_work_counts_means_and_refreshes(rule: Rule, tiles: float) -> None:
    """8 frames of one block each: 8 tiles on the diagonal, 56 off it."""
    grid = grid_of(video_layout(8, 8, 8), 64)
    assert float(rule.work(rule.levels(grid), grid)) == pytest.approx(tiles)


def test_a_short_range_refreshes_more_often() -> None:
    rule = CachedRest(of=Neighbourhood(window=(1, 0, 0)), every=4)
    assert [rule.dense_share(steps) for steps in (None, 1, 3, 4, 5, 8)] == [0.25, 1, 1 / 3, 0.25, 0.4, 0.25]


@pytest.mark.parametrize(
    "data",
    [
        {"kind": "taylor_rest", "of": {"kind": "zero"}},
        {"kind": "taylor_rest", "of": {"kind": "sink_window", "window": 64}},
        {"kind": "cached_rest", "of": {"kind": "pooled_mass", "keep": 0.1}},
        {"kind": "rectified_rest", "of": {"kind": "taylor_rest", "of": {"kind": "first_frames"}}},
        {"kind": "pyramid", "shares": "0.5/0.5/0.5/0"},
    ],
)
def test_bad_combinations_are_named(data: dict[str, object]) -> None:
    with pytest.raises(SpecError, match=str(data["kind"])):
        parse_rule(data, where="test")


def test_ragged_counts_are_true_counts() -> None:
    """70 tokens: the last block has 6, so its mean weighs log 6."""
    grid = BlockGrid(70, 70, 64, causal=False)
    q = torch.zeros(1, 70, 16)
    lse = pooled_state(q, q, q, torch.ones(1, 2, 2, dtype=torch.bool), 64, grid, scale=1.0)[1]
    assert torch.allclose(lse, torch.full_like(lse, math.log(70)))


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (63, 63), (17, 130), (130, 130)])
@pytest.mark.parametrize(("block", "size"), [(16, 16), (64, 24)])
@pytest.mark.parametrize("first", [False, True])
def test_the_kernel_goes_on_from_any_state(q_len: int, kv_len: int, block: int, size: int, first: bool) -> None:
    """Against the merge of two states, per-head choices, rows that nobody computed, and rows that see no key at all."""
    from sparsesearch.kernels import triton_means

    grid, generator = BlockGrid(q_len, kv_len, block, causal=False), torch.Generator().manual_seed(kv_len)
    q = torch.randn(2, 3, q_len, size, generator=generator)
    k, v = torch.randn(2, 2, 3, kv_len, size, generator=generator)
    levels = torch.tensor([0, 1, block])[
        torch.randint(3, (2, 3, grid.num_q_blocks, grid.num_k_blocks), generator=generator)
    ]
    levels[0, 0, 0] = 0
    levels[1, 1, 0] = block
    exact = masked_attention(q, k, v, expand(levels == 1, grid), scale=SCALE)
    tail = pooled_state(q, k, v, levels == block, block, grid, scale=SCALE)
    expected, expected_lse = merge([exact, tail])
    spread = torch.randn(2, 3, size, size, generator=generator)
    if first:
        share = torch.where(tail[1] == -torch.inf, torch.zeros(()), (tail[1] - expected_lse).exp())
        expected = expected + share[..., None] * 0.5 * (q @ spread)
    means, values = (block_means(x, grid, 0) for x in (k, v))
    counts = rows_per_block(kv_len, grid, 0, k.device)[:, 0].float().log()
    out, lse = exact[0].clone().to(DEVICE), exact[1].float().to(DEVICE)
    triton_means.launch(
        q.to(DEVICE), means.to(DEVICE), values.to(DEVICE), (levels == block).to(DEVICE), counts.to(DEVICE),
        spread.to(DEVICE) if first else None, out, lse, block_tokens=block, front=grid.q_start % block, scale=SCALE, spread_scale=0.5,
    )  # fmt: skip
    tolerance = 1e-5 if DEVICE == "cpu" else 1e-2  # TF32 or better on a GPU
    assert torch.allclose(out.cpu(), expected.float(), atol=tolerance)
    assert torch.allclose(lse.cpu(), expected_lse.float(), atol=tolerance)
