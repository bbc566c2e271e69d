"""Decoding: one query per head against ragged keys, read once, at the memory's pace.

Every (sequence, KV head) pair has its own number of keys. Their key blocks are laid end to end and cut into equal shares, one per worker,
wherever that falls (split-KV as in Flash-Decoding, Dao et al. 2023; even shares over ragged heads as in stream-K, Osama et al. 2023,
arXiv:2301.03598). Workers find their share from the lengths, on the device: lengths may change from one replay of a CUDA graph to the next.
The query heads of a pair share one pass over its keys. Worker w leaves its part of pair p in slot w + p, which is unique because a step
to the next part moves to the next worker or to the next pair; a second kernel merges them by their log-sum-exp.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NO_KEY = tl.constexpr(-1.0e25)
MASKED = tl.constexpr(-1.0e30)

BLOCK_KEYS = 64  # 128 leave room for one block per multiprocessor instead of three: half the loads in flight
WORKERS_PER_SM = 3


@triton.jit
def _shares(kv_lens, num_pairs, PAIRS: tl.constexpr, BN: tl.constexpr):
    """Key blocks of each pair and where they end when all are laid end to end."""
    pairs = tl.arange(0, PAIRS)
    blocks = (tl.load(kv_lens + pairs, mask=pairs < num_pairs, other=0) + BN - 1) // BN
    return pairs, blocks, tl.cumsum(blocks, 0)


@triton.jit
def ragged_decode_parts(
    q, k, v, kv_start, kv_lens, table, parts, lse_parts, num_pairs, k_stride, v_stride, table_stride, scale,
    GROUP: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PAIRS: tl.constexpr,
    PAGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One worker's share of all key blocks. Grid: workers."""
    worker = tl.program_id(0).to(tl.int64)
    pairs, blocks, ends = _shares(kv_lens, num_pairs, PAIRS, BN)
    total_blocks = tl.sum(blocks, 0).to(tl.int64)
    busy = tl.minimum(
        tl.num_programs(0), total_blocks
    )  # no worker between two busy ones is idle: the merge reads them all
    at = (worker * total_blocks // tl.maximum(busy, 1)).to(tl.int32)
    stop = tl.where(worker < busy, ((worker + 1) * total_blocks // tl.maximum(busy, 1)).to(tl.int32), at)
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, D)
    keys = tl.arange(0, BN)
    scale2 = scale * LOG2E
    while at < stop:
        pair = tl.sum((ends <= at).to(tl.int32), 0)
        pair_end = tl.sum(tl.where(pairs == pair, ends, 0), 0)
        pair_first = pair_end - tl.sum(tl.where(pairs == pair, blocks, 0), 0)
        until = tl.minimum(pair_end, stop)
        kv_len = tl.load(kv_lens + pair)
        start = tl.load(kv_start + pair)
        real = (rows < GROUP)[:, None] & (cols < DV)[None, :]
        q_tile = tl.load(q + (pair * GROUP + rows).to(tl.int64)[:, None] * DV + cols[None, :], mask=real, other=0.0)
        m = tl.full([ROWS], NO_KEY, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, D], tl.float32)
        for block in range(at - pair_first, until - pair_first):
            pos = block * BN + keys
            loaded = pos < kv_len
            row = start + pos
            if PAGE > 0:
                page = tl.load(table + pair.to(tl.int64) * table_stride + pos // PAGE, mask=loaded, other=0).to(
                    tl.int64
                )
                row = start + page * PAGE + pos % PAGE
            k_tile = tl.load(
                k + row[None, :] * k_stride + cols[:, None], mask=loaded[None, :] & (cols < DV)[:, None], other=0.0
            )
            s = tl.dot(q_tile, k_tile, input_precision=PRECISION) * scale2
            s = tl.where(loaded[None, :], s, MASKED)
            m_new = tl.maximum(m, tl.max(s, 1))
            p = tl.exp2(s - m_new[:, None])
            decay = tl.exp2(m - m_new)
            total = total * decay + tl.sum(p, 1)
            v_tile = tl.load(
                v + row[:, None] * v_stride + cols[None, :], mask=loaded[:, None] & (cols < DV)[None, :], other=0.0
            )
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * decay[:, None], input_precision=PRECISION)
            m = m_new
        slot = worker + pair
        tl.store(lse_parts + slot * ROWS + rows, m * LN2 + tl.log(total))
        tl.store(parts + (slot * ROWS + rows)[:, None] * D + cols[None, :], acc / total[:, None])
        at = until


@triton.jit
def merge_decode_parts(
    out, lse, kv_lens, parts, lse_parts, num_pairs, workers,
    GROUP: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PAIRS: tl.constexpr,
    CHUNK: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """O = Σ exp(lse_i - lse) O_i over the workers that had a part of one pair. Grid: (query heads, D / COLS)."""
    head = tl.program_id(0)
    pair = head // GROUP
    pairs, blocks, ends = _shares(kv_lens, num_pairs, PAIRS, BN)
    total_blocks = tl.maximum(tl.sum(blocks, 0).to(tl.int64), 1)
    busy = tl.minimum(workers, total_blocks)
    end = tl.sum(tl.where(pairs == pair, ends, 0), 0).to(tl.int64)
    first = end - tl.sum(tl.where(pairs == pair, blocks, 0), 0)
    # worker w starts at ⌊w·n/W⌋, so block b belongs to worker ⌈(b + 1)·W/n⌉ - 1
    lo = ((first + 1) * busy + total_blocks - 1) // total_blocks - 1
    hi = tl.where(end > first, (end * busy + total_blocks - 1) // total_blocks, lo)
    row = head - pair * GROUP
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    steps = tl.arange(0, CHUNK)
    top = -float("inf")
    for start in range(lo, hi, CHUNK):
        part = (start + steps + pair) * ROWS + row
        top = tl.maximum(top, tl.max(tl.load(lse_parts + part, mask=start + steps < hi, other=-float("inf")), 0))
    total = 0.0
    acc = tl.zeros([COLS], tl.float32)
    for start in range(lo, hi, CHUNK):
        part = (start + steps + pair) * ROWS + row
        real = start + steps < hi
        weight = tl.exp(tl.load(lse_parts + part, mask=real, other=-float("inf")) - top)
        tile = tl.load(parts + part[:, None] * D + cols[None, :], mask=real[:, None], other=0.0)
        acc += tl.sum(weight[:, None] * tile, 0)
        total += tl.sum(weight, 0)
    seen = total > 0
    acc = acc / tl.where(seen, total, 1.0)
    tl.store(lse + head, tl.where(seen, top + tl.log(tl.where(seen, total, 1.0)), -float("inf")))
    tl.store(out + head.to(tl.int64) * DV + cols, acc.to(out.dtype.element_ty), mask=cols < DV)


def launch(
    q: Tensor, k: Tensor, v: Tensor, kv_start: Tensor, kv_lens: Tensor, table: Tensor | None, out: Tensor, lse: Tensor,
    *, scale: float, page_tokens: int, workers: int,
) -> None:  # fmt: skip
    """Run both kernels. Shapes as in `decode.ragged_decode`."""
    num_pairs = kv_lens.numel()
    fixed = constants(
        group=q.shape[0] * q.shape[1] // num_pairs, head_dim=q.shape[-1], num_pairs=num_pairs,
        page_tokens=0 if table is None else page_tokens, fp32=q.dtype == torch.float32,
    )  # fmt: skip
    rows, padded = int(fixed["ROWS"]), int(fixed["D"])
    parts = q.new_empty(workers + num_pairs, rows, padded, dtype=torch.float32)
    lse_parts = q.new_empty(workers + num_pairs, rows, dtype=torch.float32)
    pages = kv_lens if table is None else table
    ragged_decode_parts[(workers,)](
        q, k, v, kv_start, kv_lens, pages, parts, lse_parts, num_pairs, k.stride(0), v.stride(0), pages.stride(0), scale,
        **fixed, **OPTIONS,
    )  # fmt: skip
    shared = {name: value for name, value in fixed.items() if name not in ("PAGE", "PRECISION")}
    cols = min(padded, 32)
    merge_decode_parts[(q.shape[0] * q.shape[1], padded // cols)](
        out, lse, kv_lens, parts, lse_parts, num_pairs, workers, **shared, CHUNK=64, COLS=cols, num_warps=4, enable_fp_fusion=True
    )  # fmt: skip


def constants(*, group: int, head_dim: int, num_pairs: int, page_tokens: int, fp32: bool) -> dict[str, int | str]:
    """Compile-time arguments of `ragged_decode_parts`; page_tokens 0 means no table."""
    return {
        "GROUP": group,
        "ROWS": max(16, triton.next_power_of_2(group)),
        "BN": BLOCK_KEYS,
        "D": max(16, triton.next_power_of_2(head_dim)),
        "DV": head_dim,
        "PAIRS": triton.next_power_of_2(num_pairs),
        "PAGE": page_tokens,
        "PRECISION": "ieee" if fp32 else "tf32",
    }


OPTIONS = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
