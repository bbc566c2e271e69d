"""Decoding on Hopper: the keys and values of a worker's whole share stream through one ring in shared memory.

The shares, and the merge of their parts, are those of `triton_decode`. One warp (the producer) copies blocks with the tensor copy engine, straight
on from one pair to the next; four warps (the consumer) multiply them, the few queries of a pair padded to the 64 rows of a warpgroup's matrix
instruction, which takes less time than a block needs to arrive.

A worker starts when one of the call before leaves its multiprocessor, and reads its first blocks into the ring at once (programmatic dependent
launch): what the kernels in front may still write is unknown, so those copies only bring the blocks into L2, and are made again from there
after the wait. They fill the time of the merge, when memory would idle. A cache that is read in a few microseconds has no use for that.

Measured on an H200 in one run with `triton_decode`: 134 MB take 3 to 5 % less time with 8 pairs and 5 % with 64, 268 MB 4 %; with 128 pairs the
ring is 3 to 7 % slower, so they are left to the other. What limits 134 MB, by the device's clock in an instrumented copy: the merge of the call
before ends 2 us after its workers, the first block is there 2 to 6 us later, and workers with equal shares end after 27 to 37 us, half of them by
34: memory does not serve all multiprocessors alike, and a share is fixed.

Tried and slower: one worker per multiprocessor with three blocks in flight (two may land on one multiprocessor, and none on another) or six; loads
that count, from where the lengths before the wait put them, checked afterwards; letting the merge start when the last blocks are asked for.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sparsesearch.kernels import triton_decode
from sparsesearch.kernels.hopper_producer import tma_load

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.9 and 3.6

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
NO_KEY = gl.constexpr(-1.0e25)
MASKED = gl.constexpr(-1.0e30)
ROWS = gl.constexpr(64)

HEAD_DIM = 128
STAGES = 3  # blocks of keys and values in flight per worker
WORKERS_PER_SM = 2  # as many as fit, so that no multiprocessor gets one more than another
MOST_PAIRS, MOST_HEADS = 64, 256  # with 128 and 512, `triton_decode` was faster
EARLY_BYTES = 64 << 20  # caches of so much room have their first blocks read early
OPTIONS = {"num_warps": 4, "maxnreg": 112, "enable_fp_fusion": True}
"""112 registers for eight warps; the consumer then takes 200 and leaves the producer's four 24."""


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _share(lens, starts, PAIRS: gl.constexpr, BN: gl.constexpr, IDLE: gl.constexpr, LAYOUT: gl.constexpr):
    """This worker's first pair and the unit of it to begin with, its last pair and the unit to stop at; length and start of the first."""
    pairs = gl.arange(0, PAIRS, LAYOUT)
    units = gl.where(lens > 0, (lens + BN - 1) // BN + IDLE, 0)
    ends = gl.associative_scan(units, 0, _add)
    total = gl.sum(units, 0)
    busy = gl.maximum(gl.minimum(gl.num_programs(0), total), 1)
    share = total // busy
    longer = total - share * busy
    worker = gl.program_id(0)
    at = worker * share + gl.minimum(worker, longer)
    stop = at + gl.where(worker < busy, share + (worker < longer).to(gl.int32), 0)
    first = gl.sum((ends <= at).to(gl.int32), 0)
    last = gl.sum((ends < stop).to(gl.int32), 0)
    begins = ends - units
    begin = at - gl.sum(gl.where(pairs == first, begins, 0), 0)
    until = stop - gl.sum(gl.where(pairs == last, begins, 0), 0)
    first_len = gl.sum(gl.where(pairs == first, lens, 0), 0)
    first_start = gl.sum(gl.where(pairs == first, starts, 0), 0)
    return first, begin, gl.where(at < stop, last, -1), until, first_len, first_start.to(gl.int32)


@gluon.jit
def _blocks(kv_len, pair, first, begin, last, until, BN: gl.constexpr, IDLE: gl.constexpr):
    """First block of a pair in this share, and the one after its last."""
    units = gl.where(kv_len > 0, (kv_len + BN - 1) // BN + IDLE, 0)
    lo = gl.maximum(gl.where(pair == first, begin, 0) - IDLE, 0)
    hi = gl.where(pair == last, until, units) - IDLE
    return lo, hi


@gluon.jit
def _producer(
    k_desc, v_desc, kv_start, kv_lens, k_smem, v_smem, full, empty, first, begin, last, until, first_len, first_start,
    BN: gl.constexpr, STAGES: gl.constexpr, IDLE: gl.constexpr,
):  # fmt: skip
    count = 0
    for pair in range(first, last + 1):
        kv_len = gl.load(kv_lens + pair, mask=pair != first, other=first_len, cache_modifier=".cg")
        start = gl.load(kv_start + pair, mask=pair != first, other=first_start, cache_modifier=".cg").to(gl.int32)
        lo, hi = _blocks(kv_len, pair, first, begin, last, until, BN, IDLE)
        for block in range(lo, hi):
            row = start + block * BN
            stage = count % STAGES
            mbarrier.wait(empty.index(stage), ((count // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
            tma_load(k_desc, [row, 0], full.index(stage), k_smem.index(stage))
            tma_load(v_desc, [row, 0], full.index(stage), v_smem.index(stage))
            count += 1


@gluon.jit
def _consumer(
    q, parts, lse_parts, kv_lens, k_smem, v_smem, full, empty, first, begin, last, until, first_len, scale,
    GROUP: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, IDLE: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    Q_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=S_LAYOUT, k_width=2)
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    ROW_S: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    ROW_O: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    FLAT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    scale2 = scale * LOG2E
    rows_q = gl.arange(0, ROWS, gl.SliceLayout(1, Q_LAYOUT))
    cols_q = gl.arange(0, D, gl.SliceLayout(0, Q_LAYOUT))
    keys = gl.arange(0, BN, gl.SliceLayout(0, S_LAYOUT))
    flat_keys = gl.arange(0, BN, gl.SliceLayout(1, FLAT))
    rows_s = gl.arange(0, ROWS, ROW_S)
    rows_o = gl.arange(0, ROWS, ROW_O)
    cols_o = gl.arange(0, D, gl.SliceLayout(0, O_LAYOUT))
    zero = gl.zeros([ROWS, BN], gl.float32, S_LAYOUT)
    count = 0
    for pair in range(first, last + 1):
        kv_len = gl.load(kv_lens + pair, mask=pair != first, other=first_len, cache_modifier=".cg")
        lo, hi = _blocks(kv_len, pair, first, begin, last, until, BN, IDLE)
        if lo < hi:
            at = q + (pair * GROUP + rows_q).to(gl.int64)[:, None] * D + cols_q[None, :]
            q_tile = gl.load(at, mask=(rows_q < GROUP)[:, None], other=0.0)
            m = gl.full([ROWS], NO_KEY, gl.float32, ROW_S)
            total = gl.zeros([ROWS], gl.float32, ROW_S)
            acc = gl.zeros([ROWS, D], gl.float32, O_LAYOUT)
            for block in range(lo, hi):
                stage = count % STAGES
                mbarrier.wait(full.index(stage), (count // STAGES) & 1)
                s = warpgroup_mma(q_tile, k_smem.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
                left = kv_len - block * BN
                if left < BN:  # what lies beyond the last key may be anything, and 0 · NaN is NaN
                    v_tile = v_smem.index(stage).load(FLAT)
                    v_smem.index(stage).store(gl.where((flat_keys < left)[:, None], v_tile, gl.zeros_like(v_tile)))
                    fence_async_shared()
                    barrier()
                s = warpgroup_mma_wait(0, deps=(s,))
                s = gl.where((keys < left)[None, :], s * scale2, MASKED)
                m_new = gl.maximum(m, gl.max(s, 1))
                p = gl.exp2(s - m_new[:, None])
                decay = gl.exp2(m - m_new)
                total = total * decay + gl.sum(p, 1)
                acc = acc * gl.convert_layout(decay, ROW_O)[:, None]
                acc = warpgroup_mma(gl.convert_layout(p.to(DTYPE), P_LAYOUT), v_smem.index(stage), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=(acc,))
                mbarrier.arrive(empty.index(stage), count=1)
                m = m_new
                count += 1
            slot = gl.program_id(0).to(gl.int64) + pair
            gl.store(lse_parts + slot * GROUP + rows_s, m * LN2 + gl.log(total), mask=rows_s < GROUP)
            part = parts + (slot * GROUP + rows_o)[:, None] * D + cols_o[None, :]
            gl.store(part, acc * gl.convert_layout(1.0 / total, ROW_O)[:, None], mask=(rows_o < GROUP)[:, None])


@gluon.jit
def ring_decode_parts(
    k_desc, v_desc, q, kv_start, kv_lens, parts, lse_parts, num_pairs, scale,
    GROUP: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, PAIRS: gl.constexpr, IDLE: gl.constexpr, STAGES: gl.constexpr,
    EARLY: gl.constexpr,
):  # fmt: skip
    """One worker's share of all keys. Grid: workers."""
    DTYPE: gl.constexpr = k_desc.dtype
    LAYOUT: gl.constexpr = gl.BlockedLayout([PAIRS // 32], [32], [4], [0])
    k_smem = gl.allocate_shared_memory(DTYPE, [STAGES, BN, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(DTYPE, [STAGES, BN, D], v_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    early = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    mbarrier.init(early.index(0), count=1)
    fence_async_shared()
    pairs = gl.arange(0, PAIRS, LAYOUT)
    there = pairs < num_pairs
    if EARLY:  # lengths may be about to change: rows that do not exist are not read
        seen_lens = gl.load(kv_lens + pairs, mask=there, other=0, volatile=True)
        seen_starts = gl.load(kv_start + pairs, mask=there, other=0, volatile=True)
        _, seen_begin, _, _, _, seen_start = _share(seen_lens, seen_starts, PAIRS, BN, IDLE, LAYOUT)
        row = seen_start + gl.maximum(seen_begin - IDLE, 0) * BN
        mbarrier.expect(early.index(0), STAGES * (k_desc.block_type.nbytes + v_desc.block_type.nbytes))
        for i in gl.static_range(STAGES):
            tma_load(k_desc, [row + i * BN, 0], early.index(0), k_smem.index(i))
            tma_load(v_desc, [row + i * BN, 0], early.index(0), v_smem.index(i))
    gdc_wait()
    gdc_launch_dependents()
    # not from L1, where older ones may lie
    lens = gl.load(kv_lens + pairs, mask=there, other=0, cache_modifier=".cg")
    starts = gl.load(kv_start + pairs, mask=there, other=0, cache_modifier=".cg")
    first, begin, last, until, first_len, first_start = _share(lens, starts, PAIRS, BN, IDLE, LAYOUT)
    if EARLY:
        mbarrier.wait(early.index(0), 0)  # the ring is free
    gl.warp_specialize(
        [
            (_consumer, (
                q, parts, lse_parts, kv_lens, k_smem, v_smem, full, empty, first, begin, last, until, first_len, scale,
                GROUP, BN, D, STAGES, IDLE, DTYPE)),
            (_producer, (
                k_desc, v_desc, kv_start, kv_lens, k_smem, v_smem, full, empty, first, begin, last, until, first_len, first_start,
                BN, STAGES, IDLE)),
        ],
        [1],
        [24],
    )  # fmt: skip


def serves(q: Tensor, k: Tensor, v: Tensor, num_pairs: int) -> bool:
    """Whether this kernel runs a call without pages, and is the faster one. Arguments as in `decode.ragged_decode`."""
    return (
        q.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(q.device) == (9, 0)
        and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] == HEAD_DIM
        and num_pairs <= MOST_PAIRS and q.shape[0] * q.shape[1] <= min(MOST_HEADS, ROWS.value * num_pairs)
        and all(x.shape[0] > 0 and x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 for x in (k, v))
    )  # fmt: skip


def describe(x: Tensor) -> TensorDescriptor:
    """A descriptor of [rows, HEAD_DIM] that copies a block of keys or values."""
    block = [triton_decode.BLOCK_KEYS, HEAD_DIM]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)  # any 16-bit type has this layout
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)


def constants(*, group: int, num_pairs: int, early: bool) -> dict[str, int | bool]:
    """Compile-time arguments of `ring_decode_parts`."""
    return {
        "GROUP": group,
        "BN": triton_decode.BLOCK_KEYS,
        "D": HEAD_DIM,
        "PAIRS": max(32, triton.next_power_of_2(num_pairs)),
        "IDLE": triton_decode.IDLE_UNITS,
        "STAGES": STAGES,
        "EARLY": early,
    }


def launch(
    q: Tensor, k: Tensor, v: Tensor, kv_start: Tensor, kv_lens: Tensor, out: Tensor, lse: Tensor, *, scale: float, workers: int
) -> None:  # fmt: skip
    """Run the workers and the merge. Shapes as in `decode.ragged_decode`."""
    num_pairs = kv_lens.numel()
    group = q.shape[0] * q.shape[1] // num_pairs
    parts, lse_parts = triton_decode.new_parts(q, workers, num_pairs, HEAD_DIM)
    fixed = constants(
        group=group, num_pairs=num_pairs, early=2 * k.shape[0] * HEAD_DIM * k.element_size() >= EARLY_BYTES
    )
    ring_decode_parts[(workers,)](
        describe(k), describe(v), q, kv_start, kv_lens, parts, lse_parts, num_pairs, scale, **fixed, **OPTIONS, launch_pdl=True
    )  # fmt: skip
    triton_decode.launch_merge(kv_lens, parts, lse_parts, out, lse, workers=workers)
