"""What stands for the tiles that a rule does not compute, added to the output of those it does.

Every term is O = a·O_S + b·O_T + Δ, with O_S and the log-sum-exp of the computed tiles from any backend:

    pooled      one softmax over the tiles' keys and mean keys with a bias of log n: two softmax states, merged
    taylor      the same, and the tail's first-order term
    rectified   a and b from the pooled map, O_T the mean values
    cached      a = ρ and Δ from an earlier step

One mean per block: on a GPU `triton_means` goes on from the tile kernel's state; elsewhere a product of all queries with all means, masked. Neither
waits for the host. Finer levels gather their means per row of tiles, in PyTorch on any device, which waits where the choice is dynamic.
"""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int16
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.errors import SpecError
from sparsesearch.estimators import block_means, blocked, rows_per_block
from sparsesearch.kernels.torch_gather import gathered_state
from sparsesearch.rules.base import Rule
from sparsesearch.rules.cached_rest import CachedRest
from sparsesearch.rules.pyramid import Pyramid
from sparsesearch.rules.rectified_rest import RectifiedRest
from sparsesearch.rules.taylor_rest import TaylorRest

State: TypeAlias = tuple[Tensor, Tensor]
"""Normalised output [*unit, S, D] and natural log-sum-exp [*unit, S] of one part of the keys."""

_STRIP_ELEMENTS = 1 << 26


@dataclass
class Residual:
    """What one head keeps between steps: the computed tiles' share of the softmax, and what they miss."""

    step: int
    share: Float[Tensor, "*unit S 1"]
    missing: Float[Tensor, "*unit S D"]


def with_rest(
    rule: Rule,
    computed: State,
    q: Float[Tensor, "*unit S D"],
    k: Float[Tensor, "*unit T D"],
    v: Float[Tensor, "*unit T D"],
    levels: Int16[Tensor, "*#unit M N"],
    grid: BlockGrid,
    *,
    scale: float,
    kernel: bool = False,
) -> Float[Tensor, "*unit S D"]:
    """The output of a rule whose rest needs nothing but this call: `pooled`, `taylor` or `rectified`.

    Args:
        rule: the rule, for its rest.
        computed: output and log-sum-exp of the tiles at level 1.
        q: queries in the rule's order.
        k: keys, likewise, repeated to the query heads.
        v: values, likewise.
        levels: what the rule chose.
        grid: the call.
        scale: factor on q·k.
        kernel: use a Triton kernel where one serves; the units are then [B, H].
    """
    if isinstance(rule, RectifiedRest):
        share, tail = rule.weights(levels == 1, grid, q * scale, k)
        means = tail.to(v.dtype) @ block_means(v, grid, 0).to(v.dtype)
        return computed[0] * _per_row(share, grid).to(v.dtype) + _per_row(means, grid)
    if kernel and isinstance(rule, TaylorRest) and triton_means_serve(grid):
        return _continued(rule, computed, q, k, v, levels, grid, scale)
    tails = [
        pooled_state(q, k, v, levels == level, level, grid, scale=scale) for level in _pooled_levels(levels, rule, grid)
    ]
    out, lse = merge([computed, *tails])
    if isinstance(rule, TaylorRest) and rule.terms:
        tail_share = (tails[0][1] - lse).exp()[..., None]
        out = out + tail_share * _first_order(q, k, v, grid, scale)
    return out.to(q.dtype)


def triton_means_serve(grid: BlockGrid) -> bool:
    """Whether the kernel has tiles of this size."""
    from sparsesearch.kernels import triton_means

    return triton_means.serves(grid.block_tokens)


def _continued(
    rule: TaylorRest, computed: State, q: Tensor, k: Tensor, v: Tensor, levels: Tensor, grid: BlockGrid, scale: float
) -> Tensor:
    from sparsesearch.kernels import triton_means

    out, lse = computed[0].contiguous(), computed[1].float().contiguous()
    keys, values = (block_means(x, grid, 0).to(q.dtype) for x in (k, v))
    bias = rows_per_block(grid.kv_len, grid, 0, k.device)[:, 0].float().log()
    tiles = (levels > 1).expand(*q.shape[:2], -1, -1)
    spread = _spread(k, v, grid).to(q.dtype) if rule.terms else None
    with torch.cuda.device(q.get_device()):  # Triton launches on the current device
        triton_means.launch(
            q, keys, values, tiles, bias, spread, out, lse, block_tokens=grid.block_tokens,
            front=grid.q_start - grid.first_q_block * grid.block_tokens, scale=scale, spread_scale=scale / grid.kv_len,
        )  # fmt: skip
    return out


def _pooled_levels(levels: Tensor, rule: Rule, grid: BlockGrid) -> list[int]:
    match rule:  # known without waiting for the device
        case TaylorRest():
            return [grid.block_tokens]
        case Pyramid():
            return rule.coarse_levels
    return [level for level in levels.unique().tolist() if level > 1]


def pooled_state(
    q: Float[Tensor, "*unit S D"],
    k: Float[Tensor, "*unit T D"],
    v: Float[Tensor, "*unit T D"],
    tiles: Bool[Tensor, "*#unit M N"],
    level: int,
    grid: BlockGrid,
    *,
    scale: float,
) -> State:
    """Softmax over the means of `level` neighbouring keys in the given tiles, each with a bias of log of how many it stands for.

    Raises:
        SpecError: `level` does not divide the block, or a tile on the diagonal of a causal grid is among them.
    """
    if grid.block_tokens % level:
        raise SpecError(f"a level must divide the blocks of {grid.block_tokens} tokens, but is {level}.")
    fine = BlockGrid(grid.kv_len, grid.kv_len, level, causal=False)
    keys, values = (block_means(x, fine, 0).to(q.dtype) for x in (k, v))
    bias = rows_per_block(grid.kv_len, fine, 0, k.device)[:, 0].to(torch.promote_types(q.dtype, torch.float32)).log()
    if level < grid.block_tokens:
        return gathered_state(q, keys, values, tiles, grid, bias, grid.block_tokens // level, scale=scale)
    return _masked_state(q, keys, values, tiles, grid, bias, scale)


def merge(states: list[State]) -> State:
    """One softmax state of several over disjoint keys: O = Σ exp(lse_i - lse)·O_i. A query that no part sees gives 0."""
    wide = torch.promote_types(states[0][0].dtype, torch.float32)
    parts = torch.stack([lse.to(wide) for _, lse in states])
    lse = parts.logsumexp(0)
    shares = (parts - torch.where(lse == -torch.inf, torch.zeros_like(lse), lse)).exp()[..., None]
    out = sum(share * out.to(wide) for share, (out, _) in zip(shares, states, strict=True))
    assert isinstance(out, Tensor)
    return out, lse


def measure(computed: State, dense: State, step: int) -> Residual:
    """What the computed tiles miss of dense attention."""
    share = (computed[1].float() - dense[1].float()).exp()[..., None]
    return Residual(step, share, (dense[0].float() - share * computed[0].float()).to(dense[0].dtype))


def with_residual(
    rule: CachedRest, out: Float[Tensor, "*unit S D"], kept: Residual, step: int
) -> Float[Tensor, "*unit S D"]:
    """O = ρ_a·O_S + Δ, a = step - kept.step steps later."""
    share = (kept.share + (step - kept.step) * rule.drift).clamp(max=1.0)
    return (share * out.float() + kept.missing.float()).to(out.dtype)


def _masked_state(
    q: Tensor, keys: Tensor, values: Tensor, tiles: Tensor, grid: BlockGrid, bias: Tensor, scale: float
) -> State:
    """One mean per block: all of them, masked, a few query blocks at a time."""
    queries = blocked(q, grid, grid.q_start) * scale
    per_strip = max(1, _STRIP_ELEMENTS // max(1, q.shape[:-2].numel() * grid.block_tokens * grid.num_k_blocks))
    outs, sums = [], []
    for low in range(0, grid.num_q_blocks, per_strip):
        rows = slice(low, low + per_strip)
        shift = torch.where(tiles[..., rows, :], bias, torch.full_like(bias, -torch.inf))[..., None, :].to(
            queries.device
        )
        scores = queries[..., rows, :, :] @ keys[..., None, :, :].transpose(-1, -2)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) + shift
        lse = scores.logsumexp(-1)
        weights = (scores - torch.where(lse == -torch.inf, torch.zeros_like(lse), lse)[..., None]).exp()
        outs.append(weights.to(values.dtype) @ values[..., None, :, :])
        sums.append(lse)
    out, lse = torch.cat(outs, -3).flatten(-3, -2), torch.cat(sums, -2).flatten(-2)
    front = grid.q_start - grid.first_q_block * grid.block_tokens
    return out[..., front : front + grid.q_len, :], lse[..., front : front + grid.q_len]


def _first_order(q: Tensor, k: Tensor, v: Tensor, grid: BlockGrid, scale: float) -> Tensor:
    """scale·qᵀH/T."""
    wide = torch.promote_types(k.dtype, torch.float32)
    return (q.to(wide) @ _spread(k, v, grid)) * (scale / grid.kv_len)


def _spread(
    k: Float[Tensor, "*unit T D"], v: Float[Tensor, "*unit T D"], grid: BlockGrid
) -> Float[Tensor, "*unit D D"]:
    """H = Σ_j Σ_{i in j} (k_i - k̄_j) v_iᵀ over all blocks; at least fp32 sums."""
    wide = torch.promote_types(k.dtype, torch.float32)
    means = block_means(k, grid, 0).repeat_interleave(grid.block_tokens, -2)[..., : grid.kv_len, :]
    away = (k.to(wide) - means).to(
        k.dtype
    )  # small numbers: 16 bits of them are enough, and the product runs on tensor cores
    spread: Tensor = (away.transpose(-1, -2) @ v).to(wide)
    return spread


def _per_row(x: Float[Tensor, "*unit M E"], grid: BlockGrid) -> Float[Tensor, "*unit S E"]:
    """Each query's row of its block."""
    front = grid.q_start - grid.first_q_block * grid.block_tokens
    return x.repeat_interleave(grid.block_tokens, -2)[..., front : front + grid.q_len, :]
