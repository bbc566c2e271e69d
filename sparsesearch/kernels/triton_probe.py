"""vertical_slash on the device: what the last queries attend to, and the columns and diagonals that follow, in three launches for all heads.

One pass over the keys leaves, per probe and key block, the largest score and the sum of exponentials under it; a row's softmax, hence its mass on
every block, follows from these, so no log-sum-exp has to be known before (the split softmax of Flash-Decoding, Dao et al. 2023, put to another
use). `rules.vertical_slash` has the formula.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.kernels.triton_select import best, checked_columns, in_order

NO_KEY = tl.constexpr(-1.0e25)
MASKED = tl.constexpr(-1.0e30)
_TILE = 8192  # probes times key blocks that a program holds in registers


@triton.jit
def probe_parts(
    q, k, heads, kv_heads, tops, sums, q_stride_h, q_stride_s, k_stride_g, k_stride_t, q_len, kv_len, probe, scale, num_k_blocks, rows,
    BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Largest score and sum of exponentials of each probe over one key block. Grid: (key blocks, units, rows / BM)."""
    block = tl.program_id(0)
    unit = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2) * BM + tl.arange(0, BM)
    cols = tl.arange(0, D)
    head = tl.load(heads + unit).to(tl.int64)
    kv_head = tl.load(kv_heads + unit).to(tl.int64)
    at = q + head * q_stride_h + (q_len - probe + row).to(tl.int64)[:, None] * q_stride_s + cols[None, :]
    q_tile = tl.load(at, mask=(row < probe)[:, None] & (cols < DV)[None, :], other=0.0)
    position = kv_len - probe + row
    end = tl.minimum((block + 1) * BLOCK, kv_len)
    top = tl.full([BM], NO_KEY, tl.float32)
    total = tl.zeros([BM], tl.float32)
    for start in range(block * BLOCK, end, BN):
        keys = start + tl.arange(0, BN)
        k_at = k + kv_head * k_stride_g + keys.to(tl.int64)[None, :] * k_stride_t + cols[:, None]
        k_tile = tl.load(k_at, mask=(keys < end)[None, :] & (cols < DV)[:, None], other=0.0)
        s = tl.dot(q_tile, k_tile, input_precision=PRECISION) * scale
        s = tl.where((keys < end)[None, :] & (keys[None, :] <= position[:, None]), s, MASKED)
        new = tl.maximum(top, tl.max(s, 1))
        total = total * tl.exp(top - new) + tl.sum(tl.exp(s - new[:, None]), 1)
        top = new
    out = (unit * rows + row) * num_k_blocks + block
    tl.store(tops + out, top)
    tl.store(sums + out, total)


@triton.jit
def probe_flags(
    tops, sums, flags, kv_len, probe, rows, num_k_blocks, want_columns, want_diagonals,
    BLOCK: tl.constexpr, BM: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Sum the mass of all probes per column and per diagonal, and flag the best of either. Grid: units."""
    unit = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, N)
    inside = cols < num_k_blocks
    columns = tl.zeros([N], tl.float32)
    diagonals = tl.zeros([N], tl.float32)
    for start in range(0, probe, BM):
        row = start + tl.arange(0, BM)
        line = (unit * rows + row)[:, None] * num_k_blocks
        real = (row < probe)[:, None] & inside[None, :]
        top = tl.load(tops + line + cols[None, :], mask=real, other=NO_KEY)
        total = tl.load(sums + line + cols[None, :], mask=real, other=0.0)
        highest = tl.max(top, 1)
        weight = total * tl.exp(top - highest[:, None])
        norm = tl.where(row < probe, 1.0 / tl.maximum(tl.sum(weight, 1), 1e-30), 0.0)
        columns += tl.sum(weight * norm[:, None], 0)
        key = (kv_len - probe + row)[:, None] // BLOCK - cols[None, :]  # on the diagonal `cols` of this probe
        on = (row < probe)[:, None] & (key >= 0)
        top = tl.load(tops + line + key, mask=on, other=NO_KEY)
        total = tl.load(sums + line + key, mask=on, other=0.0)
        diagonals += tl.sum(total * tl.exp(top - highest[:, None]) * norm[:, None], 0)
    first = cols == 0
    out = flags + unit * 2 * num_k_blocks + cols
    chosen = best(tl.where(inside, tl.where(first, 0xFFFFFFFF, in_order(columns)), -1), want_columns)
    tl.store(out, chosen.to(tl.int8), mask=inside)
    chosen = best(tl.where(inside, tl.where(first, 0xFFFFFFFF, in_order(diagonals)), -1), want_diagonals)
    tl.store(out + num_k_blocks, chosen.to(tl.int8), mask=inside)


@triton.jit
def paint_lines(flags, kept, num_q_blocks, num_k_blocks, first_q_block, N: tl.constexpr):
    """Tiles on flagged columns and diagonals. Grid: (query blocks, units)."""
    row = tl.program_id(0)
    unit = tl.program_id(1).to(tl.int64)
    absolute = first_q_block + row
    cols = tl.arange(0, N)
    reachable = cols <= absolute
    own = flags + unit * 2 * num_k_blocks
    column = tl.load(own + cols, mask=reachable, other=0)
    diagonal = tl.load(own + num_k_blocks + absolute - cols, mask=reachable, other=0)
    tl.store(kept + (unit * num_q_blocks + row) * num_k_blocks + cols, column | diagonal, mask=cols < num_k_blocks)


def keep_lines(
    q: Float[Tensor, "H S D"],
    k: Float[Tensor, "G T D"],
    heads: Int[Tensor, " U"],
    kv_heads: Int[Tensor, " U"],
    grid: BlockGrid,
    *,
    probe: int,
    columns: int,
    diagonals: int,
    scale: float,
    out: Bool[Tensor, "U M N"],
) -> None:
    """The tiles on the best columns and diagonals of some query heads, by the attention of their last queries; written to `out`.

    Args:
        q: queries of the sequence, without the scale; contiguous columns.
        k: keys, likewise.
        heads: int32, the query heads that choose.
        kv_heads: int32, whose keys they see.
        grid: the call's blocks; causal.
        probe: last queries that vote, at most q_len.
        columns: key blocks kept, the first one among them.
        diagonals: distances in blocks kept, 0 among them.
        scale: softmax scale.
        out: contiguous, on the same device.

    Raises:
        UnsupportedKernelError: a row has more blocks than a program can hold.
    """
    units, num_blocks, head_dim = heads.numel(), checked_columns(grid.num_k_blocks), q.shape[-1]
    side = min(64, max(16, triton.next_power_of_2(probe)))
    rows = -(-probe // side) * side
    parts = q.new_empty(2, units, rows, num_blocks, dtype=torch.float32)
    flags = out.new_empty(units, 2, num_blocks)
    keys = min(64, max(16, triton.next_power_of_2(grid.block_tokens)))
    probe_parts[(num_blocks, units, rows // side)](
        q, k, heads, kv_heads, parts[0], parts[1], q.stride(0), q.stride(1), k.stride(0), k.stride(1), grid.q_len, grid.kv_len, probe,
        scale, num_blocks, rows, BLOCK=grid.block_tokens, BM=side, BN=keys, D=max(16, triton.next_power_of_2(head_dim)), DV=head_dim,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=4,
    )  # fmt: skip
    size = max(16, triton.next_power_of_2(num_blocks))
    bits = flags.view(torch.int8)
    probe_flags[(units,)](
        parts[0], parts[1], bits, grid.kv_len, probe, rows, num_blocks, columns, diagonals,
        BLOCK=grid.block_tokens, BM=max(1, min(side, _TILE // size)), N=size, num_warps=8,
    )  # fmt: skip
    paint_lines[(grid.num_q_blocks, units)](
        bits, out.view(torch.int8), grid.num_q_blocks, num_blocks, grid.first_q_block, N=size, num_warps=4
    )
