"""Decoding: one query per head against ragged keys, read once, at the memory's pace.

Every (sequence, KV head) pair has its own number of keys. Their key blocks are laid end to end, two idle ones before each pair for what it
costs to begin one, and cut into equal shares, one per worker, wherever that falls (split-KV as in Flash-Decoding, Dao et al. 2023; even
shares over ragged heads as in stream-K, Osama et al. 2023, arXiv:2301.03598). Workers find their share from the lengths, on the device:
lengths may change from one replay of a CUDA graph to the next. The query heads of a pair share one pass over its keys. Worker w leaves its
part of pair p in slot w + p, which is unique because a step to the next part moves to the next worker or to the next pair; a second kernel
merges them by their log-sum-exp.

On Hopper both kernels are launched while the one before still runs (programmatic dependent launch) and wait for its results on the device.
The merge waits beside the workers, and a worker's first block is brought into L2 before the wait (at 134 MB 3 % faster, H200). Programs of the
merge must leave room for three workers on every multiprocessor: each quarter of one has 16,384 registers, of which the workers' warps take
14,592, so it has room for a warp of up to 56 registers per thread (8 and 16 sequences of 134 MB: 3 and 5 % faster than a merge that is
launched when the workers have read their shares, which is faster than one that takes a third worker's room). With more heads than there are such
rooms a program takes several of a pair one after the other; with more pairs than a warp can add up in so few registers, or pairs of too few heads,
the merge is launched late: programs that find no room make calls one after the other take 13 to 40 % longer.

Tried and slower: a pair's last worker merging in place of the second kernel (in 8 sequences 3 %, in one 20-40 %), a pair's workers taking its
blocks in turns, more than one block brought into L2 before or after the wait (1-4 %; line by line or in bulk makes no difference), shares in units
of 16 keys (2-3 %), 2 workers with three blocks in flight (1-3 %), 4 with one (18-20 %), 3 with one (one sequence 8 %; 8 sequences 1 % faster), queries
loaded with the first keys (3-14 %: no shared memory is left for the merge), and shares whose last quarter is taken by whoever is done (20-40 %, as
much as any form of more than 152 registers loses, which leave the merge no room: it had 154 to 158; its counter must be 0 before every call). More
programs than fit, the last ones with what was held back, begin where others end: the first kernel alone is 1-2 % faster so, both are 4-15 % slower,
because the merge and the workers of the next call are not launched before every program has begun (a single program more, without work, costs
1-6 %). More for the workers that begin first, which stand on the fast multiprocessors named below in 94 of 100 cases, changes nothing. A ring in
shared memory filled by the tensor copy engine across the borders of pairs was 3 to 5 % faster in trials of up to 64 pairs, slower in `bench decode`,
and withdrawn.

What limits it (H200, `bench.decode`, `bench.decode_counters`, clock stamps): a gigabyte is read at 1.05-1.06 of the copy bandwidth, the memory 94 %
busy. 134 MB are read at 0.84-0.87 (32 sequences 0.78), the memory 74-76 % busy while the first kernel runs alone. In one sequence a call's workers may begin 2.4 us after the
last one of the call before ended (its merge lies between; without it the first kernel alone would reach 0.91 in one sequence, 0.88 in 8), and of their
equal shares 24 multiprocessors (which ones differs from card to card) are through after 30 us on average, the other 108 after 34, the last worker
after 37.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sparsesearch.kernels.triton_skinny import LINE_BYTES, ask_for

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NO_KEY = tl.constexpr(-1.0e25)
MASKED = tl.constexpr(-1.0e30)

BLOCK_KEYS = 64  # 128 leave room for one block per multiprocessor instead of three: half the loads in flight
UNIT_KEYS = 64  # a share that ends inside a block pays for a whole one in latency
IDLE_UNITS = 2  # a worker that goes on to another pair waits for memory about as long as it takes to read so many
IN_REGISTERS = tl.constexpr(512)  # pairs whose first rows a worker holds
WORKERS_PER_SM = 3  # most loads in flight
MANY_HEADS = 256
THIN_PROGRAMS = 512  # of the merge find room beside the workers: one on each quarter of a Hopper's 132 multiprocessors
WORKER_REGISTERS = 152  # leave that room
THIN_PAIRS = 256  # pairs that a warp of the merge adds up in 56 registers per thread


@triton.jit
def _units(lens, workers, BN: tl.constexpr, UNIT: tl.constexpr, IDLE: tl.constexpr):
    """Where each pair's units end when all are laid end to end; busy workers, units of each, and how many have one more."""
    units = tl.where(lens > 0, (lens + UNIT - 1) // UNIT + IDLE, 0)
    total = tl.sum(units, 0)
    # no worker between two busy ones is idle: the merge reads them all
    busy = tl.maximum(tl.minimum(workers, (total * UNIT + BN - 1) // BN), 1)
    share = total // busy
    return tl.cumsum(units, 0), busy, share, total - share * busy


@triton.jit
def _owner(unit, share, longer):
    """The worker that has a unit; the first `longer` workers have share + 1."""
    inside = longer * (share + 1)
    return tl.where(unit < inside, unit // (share + 1), longer + (unit - inside) // tl.maximum(share, 1))


@triton.jit
def _ask_ahead(
    k, v, kv_start, kv_lens, num_pairs, num_rows, k_stride, v_stride, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PAIRS: tl.constexpr, UNIT: tl.constexpr, IDLE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Bring what seem to be this worker's first blocks into L2. Lengths may be about to change: only rows that exist are asked for."""
    pairs = tl.arange(0, PAIRS)
    lens = tl.load(kv_lens + pairs, mask=pairs < num_pairs, other=0, volatile=True)
    lens = tl.minimum(tl.maximum(lens, 0), num_rows)
    ends, _, share, longer = _units(lens, tl.num_programs(0), BN, UNIT, IDLE)
    worker = tl.program_id(0)
    at = worker * share + tl.minimum(worker, longer)
    pair = tl.minimum(tl.sum((ends <= at).to(tl.int32), 0), num_pairs - 1)
    own = pairs == pair
    kv_len = tl.sum(tl.where(own, lens, 0), 0)
    pair_first = tl.sum(tl.where(own, ends, 0), 0) - (kv_len + UNIT - 1) // UNIT
    pos = tl.maximum(at - pair_first, 0) * UNIT + tl.arange(0, BN * AHEAD)
    row = tl.load(kv_start + pair) + tl.maximum(tl.minimum(pos, kv_len - 1), 0)
    row = tl.minimum(tl.maximum(row, 0), num_rows - 1)
    per_line: tl.constexpr = LINE_BYTES // (k.dtype.element_ty.primitive_bitwidth // 8)
    col = tl.minimum(tl.arange(0, D // per_line if per_line < D else 1) * per_line, DV - 1)
    ask_for(k + row[:, None] * k_stride + col[None, :])
    ask_for(v + row[:, None] * v_stride + col[None, :])


@triton.jit
def ragged_decode_parts(
    q, k, v, kv_start, kv_lens, table, parts, lse_parts, num_pairs, num_rows, k_stride, v_stride, table_stride, scale,
    GROUP: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PAIRS: tl.constexpr,
    UNIT: tl.constexpr, IDLE: tl.constexpr, PAGE: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
    AHEAD: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """One worker's share of all keys. Grid: workers."""
    if EARLY:
        if AHEAD > 0 and PAGE == 0:
            _ask_ahead(
                k, v, kv_start, kv_lens, num_pairs, num_rows, k_stride, v_stride, BN, D, DV, PAIRS, UNIT, IDLE, AHEAD
            )
        gdc_wait()
        if not LATE:
            gdc_launch_dependents()
    worker = tl.program_id(0)
    pairs = tl.arange(0, PAIRS)
    # not from L1, where older ones may lie that were read ahead
    lens = tl.load(kv_lens + pairs, mask=pairs < num_pairs, other=0, cache_modifier=".cg")
    ends, busy, share, longer = _units(lens, tl.num_programs(0), BN, UNIT, IDLE)
    if PAIRS <= IN_REGISTERS:  # loaded with the lengths: one wait for memory instead of two
        starts = tl.load(kv_start + pairs, mask=pairs < num_pairs, other=0)
    at = worker * share + tl.minimum(worker, longer)
    stop = at + tl.where(worker < busy, share + (worker < longer).to(tl.int32), 0)
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, D)
    keys = tl.arange(0, BN)
    scale2 = scale * LOG2E
    while at < stop:
        pair = tl.sum((ends <= at).to(tl.int32), 0)
        own = pairs == pair
        pair_end = tl.sum(tl.where(own, ends, 0), 0)
        kv_len = tl.sum(tl.where(own, lens, 0), 0)
        pair_first = pair_end - (kv_len + UNIT - 1) // UNIT  # of its keys: the idle units come before
        until = tl.minimum(pair_end, stop)
        end = tl.minimum((until - pair_first) * UNIT, kv_len)
        if PAIRS <= IN_REGISTERS:
            start = tl.sum(tl.where(own, starts, 0), 0)
        else:
            start = tl.load(kv_start + pair)
        real = (rows < GROUP)[:, None] & (cols < DV)[None, :]
        q_tile = tl.load(q + (pair * GROUP + rows).to(tl.int64)[:, None] * DV + cols[None, :], mask=real, other=0.0)
        m = tl.full([ROWS], NO_KEY, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, D], tl.float32)
        for first in range(tl.maximum(at - pair_first, 0) * UNIT, end, BN):
            pos = first + keys
            loaded = pos < end
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
        slot = worker.to(tl.int64) + pair
        total = tl.maximum(total, 1e-30)  # a share of idle units only, which nobody reads
        tl.store(lse_parts + slot * GROUP + rows, m * LN2 + tl.log(total), mask=rows < GROUP)
        part = parts + (slot * GROUP + rows)[:, None] * D + cols[None, :]
        tl.store(part, acc / total[:, None], mask=(rows < GROUP)[:, None])
        at = until
    if EARLY and LATE:
        gdc_launch_dependents()


@triton.jit
def merge_decode_parts(
    out, lse, kv_lens, parts, lse_parts, num_pairs, workers,
    GROUP: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PAIRS: tl.constexpr,
    UNIT: tl.constexpr, IDLE: tl.constexpr, HEADS: tl.constexpr, CHUNK: tl.constexpr, COLS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """O = Σ exp(lse_i - lse) O_i over the workers that had a part of one pair. Grid: (query heads / HEADS, D / COLS)."""
    if EARLY:
        gdc_launch_dependents()
    pair = tl.program_id(0) * HEADS // GROUP
    pairs = tl.arange(0, PAIRS)
    lens = tl.load(kv_lens + pairs, mask=pairs < num_pairs, other=0)
    ends, _, share, longer = _units(lens, workers, BN, UNIT, IDLE)
    end = tl.sum(tl.where(pairs == pair, ends, 0), 0)
    first = end - (tl.sum(tl.where(pairs == pair, lens, 0), 0) + UNIT - 1) // UNIT
    lo = _owner(first, share, longer)
    hi = tl.where(end > first, _owner(end - 1, share, longer) + 1, lo)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    steps = tl.arange(0, CHUNK)
    if (
        EARLY
    ):  # the lengths are older than the parts: whoever wrote them was done before any worker let this kernel start
        gdc_wait()
    for own in tl.static_range(HEADS):
        head = tl.program_id(0) * HEADS + own
        top = NO_KEY
        total = 0.0
        acc = tl.zeros([COLS], tl.float32)
        for start in range(lo, hi, CHUNK):
            part = (start + steps + pair).to(tl.int64) * GROUP + head - pair * GROUP
            real = start + steps < hi
            part_lse = tl.load(lse_parts + part, mask=real, other=MASKED)
            tile = tl.load(parts + part[:, None] * D + cols[None, :], mask=real[:, None], other=0.0)
            new_top = tl.maximum(top, tl.max(part_lse, 0))
            weight = tl.exp(part_lse - new_top)
            decay = tl.exp(top - new_top)
            acc = acc * decay + tl.sum(weight[:, None] * tile, 0)
            total = total * decay + tl.sum(weight, 0)
            top = new_top
        seen = total > 0
        acc = acc / tl.where(seen, total, 1.0)
        tl.store(lse + head, tl.where(seen, top + tl.log(tl.where(seen, total, 1.0)), -float("inf")))
        tl.store(out + head.to(tl.int64) * DV + cols, acc.to(out.dtype.element_ty), mask=cols < DV)


def heads_per_merge(num_heads: int, group: int) -> int:
    """Fewest heads of one pair that a program of the merge takes one after the other so that all programs find room; more if a pair has too few."""
    return next(
        (heads for heads in range(1, group + 1) if group % heads == 0 and num_heads <= heads * THIN_PROGRAMS), group + 1
    )


def is_late(num_pairs: int, group: int) -> bool:
    """Whether the merge is launched only when the workers have read their shares."""
    return num_pairs > THIN_PAIRS or heads_per_merge(num_pairs * group, group) > group


def merge_shape(num_pairs: int, group: int, workers: int, padded: int) -> tuple[int, int, int, int]:
    """Warps of one program of the merge, heads it takes one after the other, columns it merges, and parts it reads at once."""
    num_heads = num_pairs * group
    if num_heads >= MANY_HEADS and not is_late(num_pairs, group):
        # half the columns each: as many registers hold twice the parts
        if 2 * num_heads <= THIN_PROGRAMS and padded > 16:
            return 1, 1, padded // 2, 8
        return 1, heads_per_merge(num_heads, group), padded, 4
    # few heads: their columns are shared out too; as many parts at once as a pair longer than the others may have
    parts = min(64, max(4, triton.next_power_of_2(2 * workers // num_pairs)))
    return 4, 1, padded if num_heads >= MANY_HEADS else min(padded, 32), parts


def register_limit(num_pairs: int) -> dict[str, int]:
    """The workers' share of registers, where they would take more; with 256 pairs four are kept elsewhere while a worker reads keys."""
    return {"maxnreg": WORKER_REGISTERS} if 128 < num_pairs <= THIN_PAIRS else {}


def launch(
    q: Tensor, k: Tensor, v: Tensor, kv_start: Tensor, kv_lens: Tensor, table: Tensor | None, out: Tensor, lse: Tensor,
    *, scale: float, page_tokens: int, workers: int, early: bool,
) -> None:  # fmt: skip
    """Run both kernels. Shapes as in `decode.ragged_decode`; `early` that they may start before the kernel in front of them is over."""
    num_pairs = kv_lens.numel()
    num_heads = q.shape[0] * q.shape[1]
    group = num_heads // num_pairs
    fixed = constants(
        group=group, head_dim=q.shape[-1], num_pairs=num_pairs, page_tokens=0 if table is None else page_tokens,
        fp32=q.dtype == torch.float32, early=early,
    )  # fmt: skip
    padded = int(fixed["D"])
    parts = q.new_empty(workers + num_pairs, group, padded, dtype=torch.float32)
    lse_parts = q.new_empty(workers + num_pairs, group, dtype=torch.float32)
    pages = kv_lens if table is None else table
    options = OPTIONS | ({"launch_pdl": True} if early else {})
    ragged_decode_parts[(workers,)](
        q, k, v, kv_start, kv_lens, pages, parts, lse_parts, num_pairs, k.shape[0], k.stride(0), v.stride(0), pages.stride(0), scale,
        **fixed, **options, **register_limit(num_pairs),
    )  # fmt: skip
    shared = {name: fixed[name] for name in MERGE_CONSTANTS}
    warps, heads, cols, chunk = merge_shape(num_pairs, group, workers, padded)
    merge_decode_parts[(num_heads // heads, padded // cols)](
        out, lse, kv_lens, parts, lse_parts, num_pairs, workers, **shared, HEADS=heads, CHUNK=chunk, COLS=cols,
        **(options | {"num_warps": warps, "num_stages": 1}),
    )  # fmt: skip


def constants(
    *, group: int, head_dim: int, num_pairs: int, page_tokens: int, fp32: bool, early: bool
) -> dict[str, int | str]:
    """Compile-time arguments of `ragged_decode_parts`; page_tokens 0 means no table, `early` that it may start before its turn."""
    return {
        "GROUP": group,
        "ROWS": max(16, triton.next_power_of_2(group)),
        "BN": BLOCK_KEYS,
        "D": max(16, triton.next_power_of_2(head_dim)),
        "DV": head_dim,
        "PAIRS": triton.next_power_of_2(num_pairs),
        "UNIT": UNIT_KEYS,
        "IDLE": IDLE_UNITS,
        "PAGE": page_tokens,
        "PRECISION": "ieee" if fp32 else "tf32",
        "EARLY": early,
        "AHEAD": 0 if is_late(num_pairs, group) else 1,  # blocks brought into L2 before the wait
        "LATE": is_late(num_pairs, group),
    }


MERGE_CONSTANTS = ("GROUP", "BN", "D", "DV", "PAIRS", "UNIT", "IDLE", "EARLY")
OPTIONS = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
