"""What dynamic rules and profiling need to know about tiles, computed where the queries and keys are.

pooled_means: mean of the rows of each block (pooled_topk, Jiang et al. 2024, MInference, arXiv:2407.02490, section 3.3).
block_mass: attention of every tile, exactly, from the log-sum-exp of a dense pass: Σ exp(q·k - lse) (calibration of fixed_blocks; Lai et
al. 2025, FlexPrefill, arXiv:2502.20766, compares its estimate with this).

Queries carry the softmax scale, as for `Rule.select`. The key of head h is keys[h // (H / G)]: nothing is repeated.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sparsesearch.block_mask import BlockGrid


@triton.jit
def _pooled_means(
    x, heads, out, x_stride_h, x_stride_s, length, start, num_blocks,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks, units). `start` is the position of row 0; blocks count from position 0."""
    block = tl.program_id(0)
    unit = tl.program_id(1).to(tl.int64)
    head = unit
    if SOME:
        head = tl.load(heads + unit).to(tl.int64)
    cols = tl.arange(0, D)
    first = tl.maximum((start // BLOCK + block) * BLOCK - start, 0)
    end = tl.minimum((start // BLOCK + block + 1) * BLOCK - start, length)
    total = tl.zeros([D], tl.float32)
    for row in range(first, end, ROWS):
        rows = row + tl.arange(0, ROWS)
        real = (rows < end)[:, None] & (cols < DV)[None, :]
        tile = tl.load(
            x + head * x_stride_h + rows.to(tl.int64)[:, None] * x_stride_s + cols[None, :], mask=real, other=0.0
        )
        total += tl.sum(tile.to(tl.float32), 0)
    tl.store(out + (unit * num_blocks + block) * DV + cols, total / (end - first), mask=cols < DV)


@triton.jit
def _tile_mass(
    q, k, lse, mass, q_stride_h, q_stride_s, k_stride_g, k_stride_t, lse_stride_h, q_len, kv_len, q_start, num_q_blocks,
    num_k_blocks, GROUP: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ exp(q·k - lse) over one tile of BLOCK x BLOCK. Grid: (key blocks, query blocks, heads)."""
    key_block = tl.program_id(0)
    query_block = tl.program_id(1)
    head = tl.program_id(2).to(tl.int64)
    absolute = q_start // BLOCK + query_block
    first = tl.maximum(absolute * BLOCK - q_start, 0)
    end = tl.minimum((absolute + 1) * BLOCK - q_start, q_len)
    cols = tl.arange(0, D)
    total = tl.zeros([BM], tl.float32)
    if (key_block <= absolute) | (not CAUSAL):
        for row in range(first, end, BM):
            rows = row + tl.arange(0, BM)
            at = q + head * q_stride_h + rows.to(tl.int64)[:, None] * q_stride_s + cols[None, :]
            q_tile = tl.load(at, mask=(rows < end)[:, None] & (cols < DV)[None, :], other=0.0)
            row_lse = tl.load(lse + head * lse_stride_h + rows, mask=rows < end, other=0.0)
            for start in range(key_block * BLOCK, tl.minimum((key_block + 1) * BLOCK, kv_len), BN):
                keys = start + tl.arange(0, BN)
                inside = (keys < kv_len) & (keys < (key_block + 1) * BLOCK)
                k_at = k + (head // GROUP) * k_stride_g + keys.to(tl.int64)[None, :] * k_stride_t + cols[:, None]
                k_tile = tl.load(k_at, mask=inside[None, :] & (cols < DV)[:, None], other=0.0)
                s = tl.dot(q_tile, k_tile, input_precision=PRECISION)
                seen = inside[None, :] & (rows < end)[:, None]
                if CAUSAL:
                    seen = seen & (keys[None, :] <= (q_start + rows)[:, None])
                total += tl.sum(tl.where(seen, tl.exp(s - row_lse[:, None]), 0.0), 1)
    tl.store(mass + (head * num_q_blocks + query_block) * num_k_blocks + key_block, tl.sum(total, 0))


def pooled_means(
    x: Float[Tensor, "H S D"], grid: BlockGrid, *, start: int, heads: Int[Tensor, " U"] | None = None
) -> Float[Tensor, "U M D"]:
    """Mean of the rows of `x` in each block, fp32; row 0 is position `start`, ragged blocks average what they have.

    Args:
        x: queries or keys of one sequence, contiguous columns.
        grid: gives the block size.
        start: `grid.q_start` for queries, 0 for keys.
        heads: int32, which heads of `x`; None: all.
    """
    length, head_dim = x.shape[1:]
    units = len(x) if heads is None else heads.numel()
    num_blocks = (start + length - 1) // grid.block_tokens - start // grid.block_tokens + 1
    out = x.new_empty(units, num_blocks, head_dim, dtype=torch.float32)
    _pooled_means[(num_blocks, units)](
        x, heads, out, x.stride(0), x.stride(1), length, start, num_blocks, BLOCK=grid.block_tokens, ROWS=16,
        D=triton.next_power_of_2(head_dim), DV=head_dim, SOME=heads is not None, num_warps=4,
    )  # fmt: skip
    return out


def block_mass(
    q: Float[Tensor, "H S D"], k: Float[Tensor, "G T D"], lse: Float[Tensor, "H S"], grid: BlockGrid
) -> Float[Tensor, "H M N"]:
    """Attention mass of every tile: rows sum to the queries in them if `lse` is that of dense attention.

    Args:
        q: queries that carry the softmax scale, contiguous columns.
        k: keys, contiguous columns.
        lse: fp32 natural log-sum-exp of each query's scores.
        grid: the call's blocks.
    """
    num_heads, q_len, head_dim = q.shape
    mass = q.new_empty(num_heads, grid.num_q_blocks, grid.num_k_blocks, dtype=torch.float32)
    side = min(64, max(16, triton.next_power_of_2(grid.block_tokens)))
    _tile_mass[(grid.num_k_blocks, grid.num_q_blocks, num_heads)](
        q, k, lse, mass, q.stride(0), q.stride(1), k.stride(0), k.stride(1), lse.stride(0), q_len, grid.kv_len, grid.q_start,
        grid.num_q_blocks, grid.num_k_blocks, GROUP=num_heads // k.shape[0], BLOCK=grid.block_tokens, BM=side, BN=side,
        D=max(16, triton.next_power_of_2(head_dim)), DV=head_dim, CAUSAL=grid.causal,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=4,
    )  # fmt: skip
    return mass
