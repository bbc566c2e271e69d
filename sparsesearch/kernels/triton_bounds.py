"""The Triton kernels of `page_ops`: bounds of key blocks, and the pages of a decoded token by them (Quest).

The first reads the bounds once for all query heads of a KV head and lets the newest key into those of its block. The second holds a head's
scores in registers, finds the smallest one that is kept bit by bit (`triton_select.best`), and writes the pages in ascending order.

A trial on an H200 (bf16, 64k tokens, 8 KV heads of 128, 4 query heads each, one sequence, fused step): a layer takes 60 us when every query head
reads 2,048 keys that it chooses, 103 us dense, 34 us with a window of 2,048; with the choice made by PyTorch operators 306 us.
"""

import triton
import triton.language as tl
from torch import Tensor

from sparsesearch.kernels.triton_select import best, checked_columns, in_order

BLOCKS = 16  # blocks per program of the first kernel: at 64k tokens and 8 KV heads 512 programs


@triton.jit
def bound_scores(
    q, keys, low, high, start, seen, kv_heads, bounded, scores, num_kv_heads, num_bounded, num_heads, num_blocks,
    BLOCK: tl.constexpr, SIZE: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks / N, sequences · KV heads that choose)."""
    some = num_heads // SIZE
    batch = tl.program_id(1) // some
    own = tl.program_id(1) % some
    kv_head = tl.load(kv_heads + own)
    pair = batch * num_kv_heads + kv_head
    position = tl.load(seen + pair) - 1
    newest = position // BLOCK
    block = tl.program_id(0) * N + tl.arange(0, N)
    if tl.program_id(0) * N > newest:
        return
    cols = tl.arange(0, D)
    inside = (block <= newest)[:, None] & (cols < DV)[None, :]
    row = (batch.to(tl.int64) * num_bounded + tl.load(bounded + own)) * num_blocks + block
    at = row[:, None] * DV + cols[None, :]
    newest_key = keys + (tl.load(start + pair) + position) * DV + cols
    key = tl.load(newest_key, mask=cols < DV, other=0.0).to(tl.float32)[None, :]
    is_new = (block == newest)[:, None]
    begins = position % BLOCK == 0
    least = tl.load(low + at, mask=inside, other=0.0).to(tl.float32)
    most = tl.load(high + at, mask=inside, other=0.0).to(tl.float32)
    least = tl.where(is_new, tl.where(begins, key, tl.minimum(least, key)), least)
    most = tl.where(is_new, tl.where(begins, key, tl.maximum(most, key)), most)
    tl.store(low + at, least.to(low.dtype.element_ty), mask=inside & is_new)
    tl.store(high + at, most.to(high.dtype.element_ty), mask=inside & is_new)
    for member in tl.static_range(SIZE):
        head = batch.to(tl.int64) * num_kv_heads * SIZE + kv_head * SIZE + member
        query = tl.load(q + head * DV + cols, mask=cols < DV, other=0.0).to(tl.float32)[None, :]
        bound = tl.sum(tl.where(cols[None, :] < DV, tl.maximum(query * least, query * most), 0.0), 1)
        out = (batch.to(tl.int64) * num_heads + own * SIZE + member) * num_blocks + block
        tl.store(scores + out, bound, mask=block <= newest)


@triton.jit
def choose_pages(
    scores, seen, kv_heads, places, budget, table, lens, num_kv_heads, num_heads, num_chosen, num_blocks, sink_blocks,
    BLOCK: tl.constexpr, SIZE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Grid: (heads that choose, sequences)."""
    batch = tl.program_id(1)
    place = tl.load(places + tl.program_id(0))
    position = tl.load(seen + batch * num_kv_heads + tl.load(kv_heads + place // SIZE)) - 1
    newest = position // BLOCK
    block = tl.arange(0, N)
    there = block <= newest
    own = (batch.to(tl.int64) * num_heads + place) * num_blocks
    ordered = in_order(tl.load(scores + own + block, mask=there, other=0.0))
    always = there & ((block == newest) | (block < sink_blocks))
    ordered = tl.where(always, 0xFFFFFFFF, ordered)
    ordered = tl.where(there, ordered, -1)
    chosen = (best(ordered, tl.load(budget + batch)) | always) & there
    rank = tl.cumsum(chosen.to(tl.int32), 0) - 1
    pair = batch.to(tl.int64) * num_chosen + tl.program_id(0)
    count = tl.sum(chosen.to(tl.int32), 0)
    tl.store(table + pair * num_blocks + rank, block, mask=chosen)
    tl.store(table + pair * num_blocks + block, 0, mask=(block >= count) & (block < num_blocks))
    tl.store(lens + pair, (count - 1) * BLOCK + position % BLOCK + 1)


def launch(
    q: Tensor, keys: Tensor, low: Tensor, high: Tensor, start: Tensor, seen: Tensor, kv_heads: Tensor, bounded: Tensor,
    places: Tensor, budget: Tensor, table: Tensor, lens: Tensor, scores: Tensor, *, sink_blocks: int, block_tokens: int,
) -> None:  # fmt: skip
    """Both kernels; `page_ops.pages_by_bounds` describes the arguments, `scores` is room for fp32 [B, g · size, N]."""
    batch, num_blocks = q.shape[0], low.shape[2]
    num_kv_heads = start.numel() // batch
    size, num_heads = q.shape[1] // num_kv_heads, scores.shape[1]
    checked_columns(num_blocks)
    bound_scores[(triton.cdiv(num_blocks, BLOCKS), batch * kv_heads.numel())](
        q, keys, low, high, start, seen, kv_heads, bounded, scores, num_kv_heads, low.shape[1], num_heads, num_blocks,
        BLOCK=block_tokens, SIZE=size, N=BLOCKS, D=triton.next_power_of_2(q.shape[2]), DV=q.shape[2], num_warps=4,
    )  # fmt: skip
    columns = max(16, triton.next_power_of_2(num_blocks))
    choose_pages[(places.numel(), batch)](
        scores, seen, kv_heads, places, budget, table, lens, num_kv_heads, num_heads, places.numel(), num_blocks, sink_blocks,
        BLOCK=block_tokens, SIZE=size, N=columns, num_warps=4 if columns <= 2048 else 8,
    )  # fmt: skip
