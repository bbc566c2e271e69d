"""Means of all values that a query may see, for every head that has nothing else: two passes over blocks of values, in three launches a layer."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sparsesearch.kernels.triton_prefill import padded_head_dim

BLOCK = 64
"""Values that one program sums."""


@triton.jit
def sum_blocks(
    v, kv_heads, sums, v_stride_b, v_stride_h, v_stride_s, tokens, blocks,
    BLOCK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """The sum of one block of values. Grid: (blocks, listed KV heads, batch)."""
    values, _, _ = block_of(v, kv_heads, v_stride_b, v_stride_h, v_stride_s, tokens, BLOCK, D, DV)
    cols = tl.arange(0, D)
    line = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * blocks + tl.program_id(0)
    tl.store(sums + line * DV + cols, tl.sum(values.to(sums.dtype.element_ty), 0), mask=cols < DV)


@triton.jit
def put_means(
    v, kv_heads, sums, members, out, v_stride_b, v_stride_h, v_stride_s, o_stride_b, o_stride_h, o_stride_s,
    tokens, blocks, first, GROUP: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """The means that one block's queries see, into all heads that want them. `sums` runs over blocks, this one included. Grid as above."""
    values, place, wide = block_of(v, kv_heads, v_stride_b, v_stride_h, v_stride_s, tokens, BLOCK, D, DV)
    cols = tl.arange(0, D)
    block = tl.program_id(0)
    line = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * blocks + block
    running = tl.cumsum(values.to(sums.dtype.element_ty), 0)
    if block > 0:
        running += tl.load(sums + (line - 1) * DV + cols, mask=cols < DV, other=0.0)[None, :]
    mean = (running / (place + 1)[:, None].to(running.dtype)).to(out.dtype.element_ty)
    row = (place - first).to(tl.int64)
    at = out + tl.program_id(2).to(tl.int64) * o_stride_b + row[:, None] * o_stride_s + cols[None, :]
    for member in tl.static_range(GROUP):
        head = tl.load(members + tl.program_id(1) * GROUP + member).to(tl.int64)
        if head >= 0:
            tl.store(at + head * o_stride_h, mean, mask=wide & (row >= 0)[:, None])


@triton.jit
def block_of(v, kv_heads, v_stride_b, v_stride_h, v_stride_s, tokens, BLOCK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr):  # fmt: skip
    """This program's values [BLOCK, D], 0 past the end; their places; where they are real."""
    head = tl.load(kv_heads + tl.program_id(1)).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cols = tl.arange(0, D)
    wide = (place < tokens)[:, None] & (cols < DV)[None, :]
    at = v + tl.program_id(2).to(tl.int64) * v_stride_b + head * v_stride_h
    return tl.load(at + place.to(tl.int64)[:, None] * v_stride_s + cols[None, :], mask=wide, other=0.0), place, wide


def constants(head_dim: int) -> dict[str, int]:
    """Compile-time arguments of both kernels."""
    return {"BLOCK": BLOCK, "D": padded_head_dim(head_dim), "DV": head_dim}


def put_running_means(
    v: Float[Tensor, "B G T D"],
    kv_heads: Int[Tensor, " K"],
    members: Int[Tensor, "K R"],
    out: Float[Tensor, "B H S D"],
) -> None:
    """Write the mean of the values up to each of the last S places into some query heads of `out`.

    Args:
        v: values, rows contiguous.
        kv_heads: those whose values are averaged, int32, on the device.
        members: for each of them the query heads that get its means; -1: none.
        out: rows contiguous; other heads are left alone.
    """
    batch, _, tokens, size = v.shape
    blocks = -(-tokens // BLOCK)
    grid = (blocks, len(kv_heads), batch)
    sums = v.new_empty(
        batch, len(kv_heads), blocks, size, dtype=torch.float64 if v.dtype == torch.float32 else torch.float32
    )
    tile = constants(size)
    sum_blocks[grid](v, kv_heads, sums, *v.stride()[:3], tokens, blocks, **tile)
    put_means[grid](
        v, kv_heads, sums.cumsum(2), members, out, *v.stride()[:3], *out.stride()[:3], tokens, blocks, tokens - out.shape[2],
        GROUP=members.shape[1], **tile,
    )  # fmt: skip
