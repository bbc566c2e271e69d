"""Prefill on Hopper: a persistent, warp-specialised Gluon kernel that runs a tile schedule.

One warp (the producer) walks a worker's tiles and copies queries, keys and values into shared memory with the tensor copy engine; two
warpgroups (the consumers) own 64 query rows each. A consumer issues the scores of key block i + 1 before it multiplies the weights of
block i with the values, so the tensor cores work while it takes exponentials (Shah et al. 2024, FlashAttention-3, arXiv:2407.08608,
algorithm 2). Differs: the key blocks come from compact lists, full and partial in one loop (two loops make ptxas serialise the
matrix instructions), and each worker has its own list of tiles, balanced beforehand.

All four tensors are read through rank-4 descriptors [B, H, S, D] of any strides, so heads of 96 read zeros beyond their width and rows
beyond the tensor read zeros. Rows of V that a list reaches must be finite: a masked weight is 0, and 0 · NaN is NaN.

What limits it (H200, tests/golden/attention_h200.json; counters by `sparsesearch.bench.counters`, tests/golden/counters_h200.json). head_dim 128 at
32k: power. It computes 670-770 TFLOP/s on its blocks, cuBLAS 687 in a product of 8192 cubed on the same card; the matrix units are busy 91 % of the
time, at 1.6 of 1.98 GHz. head_dim 64 at 32k (480-550, with HELD and TURNS, see `hopper_prefill`): neither matrix units nor exponentials (58 % each)
nor issue slots (40 %) are full. With two arrivals a step (57 and 39 %), of its 1,810 cycles (instructions sampled, sparse) exponentials took
890-1,130, where 560 would do alone: the other warpgroup's products read and write their sums through the same registers, and its exponentials
overlap. 90-130 were waits at barriers (its turn, its scores, its own threads before each arrival), 70 two tests whether a copy has come, 80 four
jumps over code that seldom runs (each warpgroup has its own copy). One arrival a step, all waits before the turn and the test for fresh rows
before the exponentials then made it 1-5 % faster. Tried and not faster: values released with the next keys; keys and the values before them under
one full barrier; weights rounded under the scores' product; scores first, and the product with values between exponentials; named barriers for
arrivals; a sixteenth or more of the exponentials as polynomials (5-8 % slower); three consumers of 64 rows spill.
At 8k a sparse tile has five blocks: its output, the first block's exponentials (ptxas puts them after the last product, see `hopper_softmax`) and the
masks of its last block cost about one more, and launch, drain and workers that finish early 6 % of the time at head_dim 128 and 5 % at 64.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sparsesearch.kernels.hopper_edges import adjust, read_tile, write_rows
from sparsesearch.kernels.hopper_producer import FIELDS, produce
from sparsesearch.kernels.hopper_softmax import LOG2E, late_softmax, no_keys, rescale, softmax
from sparsesearch.kernels.hopper_turns import give_turn, take_turn


@gluon.jit
def _multiply(
    q, weights, acc, zero, k_smem, v_smem, k_full, v_full, kc, more, G: gl.constexpr, BN: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """Issue the scores of key block kc (of whatever is there, if no block comes) and the product of the weights before with their values."""
    vc = kc - 1
    mbarrier.wait(k_full.index(kc % STAGES), (kc // STAGES) & 1, pred=more)
    k = k_smem.index(kc % STAGES).reshape((BN, D))
    if TURNS:  # nobody waits for copies while it has the turn
        mbarrier.wait(v_full.index(vc % STAGES), (vc // STAGES) & 1)
        take_turn(G)
    s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    if not TURNS:
        mbarrier.wait(v_full.index(vc % STAGES), (vc // STAGES) & 1)
    v = v_smem.index(vc % STAGES).reshape((BN, D))
    acc = warpgroup_mma(weights, v, acc, is_async=True)
    if TURNS:
        give_turn(G)
    return s, acc


@gluon.jit
def _consumer(
    G: gl.constexpr, q_smem, k_smem, v_smem, o_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    tiles, entries, bin_ptr, o_desc, o_ptr, lse_ptr, parts, lse_parts, bias, masks, words, strides, scale,
    HEADS: gl.constexpr, GROUP: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr,
    Q_BUFFERS: gl.constexpr, DTYPE: gl.constexpr, CAUSAL: gl.constexpr, BIAS: gl.constexpr, MASKS: gl.constexpr,
    HELD: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    Q_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=S_LAYOUT, k_width=2)
    ROW_S: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    ROW_O: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    OVERLAP: gl.constexpr = Q_BUFFERS == 2
    LATE: gl.constexpr = D <= 128  # beyond, the registers do not hold scores and weights side by side
    # weights are rounded once the product before has released its own, or at once where registers are short
    W_TYPE: gl.constexpr = gl.float32 if D * BN <= 64 * 128 else DTYPE
    scale2 = scale * LOG2E
    rows = G * ROWS + gl.arange(0, ROWS, ROW_S)
    zero = gl.zeros([ROWS, BN], gl.float32, S_LAYOUT)
    no_max, no_sum = no_keys(zero, ROWS, BN)
    kc = 0
    first = gl.load(bin_ptr + gl.program_id(0))
    end = gl.load(bin_ptr + gl.program_id(0) + 1)
    last = gl.load(bin_ptr + gl.num_programs(0)) - 1
    kv_len, q_pos0, lo, hi, tile_bias = read_tile(
        tiles, bias, gl.minimum(first, last), strides[4], strides[5], GROUP, BIAS
    )
    m = no_max
    total = no_sum
    weights = gl.convert_layout(zero.to(DTYPE), P_LAYOUT)
    if OVERLAP:
        # the first block of the first tile; a worker without tiles computes on what is there and waits for nothing
        entry = gl.load(entries + lo)
        mbarrier.wait(q_full.index(G), 0, pred=first < end)
        mbarrier.wait(k_full.index(0), 0, pred=first < end)
        k = k_smem.index(0).reshape((BN, D))
        q_first = q_smem.index(G).reshape((ROWS, D))
        if HELD:
            q_held = q_first.load(Q_LAYOUT)
            q_first = q_held
        if TURNS:
            if G == 1:
                give_turn(G)
            take_turn(G)
        s = warpgroup_mma(q_first, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        if TURNS:
            give_turn(G)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(k_empty.index(0), count=1, pred=first < end)
        kc += 1
        s = adjust(s, entry, lo, q_pos0 + rows, kv_len, tile_bias, scale2, masks, words, strides[6],
                    G, BN, ROWS, CAUSAL, BIAS, MASKS, S_LAYOUT)  # fmt: skip
        p, _, m, total = softmax(s, no_max, no_sum, scale2, ROWS, BN)
        weights = gl.convert_layout(p.to(DTYPE), P_LAYOUT)
    for t in range(first, end):
        # read again (it is in L1), not carried over: Triton 3.6's loop-aware CSE replaces a carried loop bound by its first value
        kv_len, q_pos0, lo, hi, tile_bias = read_tile(tiles, bias, t, strides[4], strides[5], GROUP, BIAS)
        done = t - first
        half = (done % Q_BUFFERS) * 2 + G
        q = q_smem.index(half).reshape((ROWS, D))
        if HELD:
            q = q_held
        if not OVERLAP:
            entry = gl.load(entries + lo)
            mbarrier.wait(q_full.index(half), done & 1)
            mbarrier.wait(k_full.index(kc % STAGES), (kc // STAGES) & 1)
            k = k_smem.index(kc % STAGES).reshape((BN, D))
            s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=(s,))
            mbarrier.arrive(k_empty.index(kc % STAGES), count=1)
            kc += 1
            s = adjust(s, entry, lo, q_pos0 + rows, kv_len, tile_bias, scale2, masks, words, strides[6],
                    G, BN, ROWS, CAUSAL, BIAS, MASKS, S_LAYOUT)  # fmt: skip
            p, _, m, total = softmax(s, no_max, no_sum, scale2, ROWS, BN)
            weights = gl.convert_layout(p.to(DTYPE), P_LAYOUT)
        acc = gl.zeros([ROWS, D], gl.float32, O_LAYOUT)
        q_pos = q_pos0 + rows
        for i in range(lo + 1, hi):
            entry = gl.load(entries + i)
            s_next, acc_next = _multiply(q, weights, acc, zero, k_smem, v_smem, k_full, v_full, kc, True, G, BN, D, STAGES, TURNS)  # fmt: skip
            s = warpgroup_mma_wait(1, deps=(s_next,))
            if not TURNS:
                mbarrier.arrive(k_empty.index(kc % STAGES), count=1)
            s = adjust(s, entry, i, q_pos, kv_len, tile_bias, scale2, masks, words, strides[6],
                        G, BN, ROWS, CAUSAL, BIAS, MASKS, S_LAYOUT)  # fmt: skip
            if LATE:
                w, rise, m, total = late_softmax(s, m, total, scale2, W_TYPE, ROWS, BN)
            else:
                w, rise, m, total = softmax(s, m, total, scale2, ROWS, BN)
            acc = warpgroup_mma_wait(0, deps=(acc_next,))
            if TURNS:  # keys, and the values before them
                mbarrier.arrive(k_empty.index(kc % STAGES), count=1)
            else:
                mbarrier.arrive(v_empty.index((kc - 1) % STAGES), count=1)
            kc += 1
            acc = rescale(acc, rise, ROWS, D, LATE)
            weights = gl.convert_layout(w.to(DTYPE), P_LAYOUT)
        if OVERLAP:
            more = t + 1 < end
            # asked for here, not before the loop over keys: values that live through it cost up to a tenth (measured, H200)
            len_next, pos_next, lo_next, _, bias_next = read_tile(
                tiles, bias, gl.minimum(t + 1, end - 1), strides[4], strides[5], GROUP, BIAS
            )
            mbarrier.arrive(q_empty.index(half), count=1)
            entry = gl.load(entries + lo_next)
            half_next = ((done + 1) % Q_BUFFERS) * 2 + G
            mbarrier.wait(q_full.index(half_next), ((done + 1) // Q_BUFFERS) & 1, pred=more)
            q_next = q_smem.index(half_next).reshape((ROWS, D))
            if HELD:
                q_held = q_next.load(Q_LAYOUT)
                q_next = q_held
            s_next, acc_next = _multiply(q_next, weights, acc, zero, k_smem, v_smem, k_full, v_full, kc, more, G, BN, D, STAGES, TURNS)  # fmt: skip
            s = warpgroup_mma_wait(1, deps=(s_next,))
            if not TURNS:
                mbarrier.arrive(k_empty.index(kc % STAGES), count=1, pred=more)
            s = adjust(s, entry, lo_next, pos_next + rows, len_next, bias_next, scale2, masks, words, strides[6],
                        G, BN, ROWS, CAUSAL, BIAS, MASKS, S_LAYOUT)  # fmt: skip
            p, _, m_next, total_next = softmax(s, no_max, no_sum, scale2, ROWS, BN)
            acc = warpgroup_mma_wait(0, deps=(acc_next,))
            if TURNS:
                mbarrier.arrive(k_empty.index(kc % STAGES), count=1, pred=more)
            else:
                mbarrier.arrive(v_empty.index((kc - 1) % STAGES), count=1)
            kc += 1
            weights = gl.convert_layout(p.to(DTYPE), P_LAYOUT)
            write_rows(acc, m, total, o_desc, o_smem.index(G), o_ptr, lse_ptr, parts, lse_parts, tiles + t * FIELDS, strides,
                   HEADS, G, ROWS, D, DV, DTYPE, ROW_S, ROW_O)  # fmt: skip
            m = m_next
            total = total_next
        else:
            vc = kc - 1
            mbarrier.wait(v_full.index(vc % STAGES), (vc // STAGES) & 1)
            v = v_smem.index(vc % STAGES).reshape((BN, D))
            acc_next = warpgroup_mma(weights, v, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc_next,))
            mbarrier.arrive(v_empty.index(vc % STAGES), count=1)
            write_rows(acc, m, total, o_desc, o_smem.index(G), o_ptr, lse_ptr, parts, lse_parts, tiles + t * FIELDS, strides,
                   HEADS, G, ROWS, D, DV, DTYPE, ROW_S, ROW_O)  # fmt: skip
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(half), count=1)
    if TURNS and G == 0:
        take_turn(G)  # the one that the other gave last
    tma.store_wait(0)


@gluon.jit
def hopper_attention(
    q_desc, k_desc, v_desc, o_desc, o_ptr, lse_ptr, parts, lse_parts, bias, masks, words, tiles, entries, bin_ptr,
    o_stride_b, o_stride_h, o_stride_s, lse_stride_h, bias_stride_b, bias_stride_g, word_stride, scale,
    HEADS: gl.constexpr, GROUP: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, STAGES: gl.constexpr,
    Q_BUFFERS: gl.constexpr, CAUSAL: gl.constexpr, BIAS: gl.constexpr, MASKS: gl.constexpr, HELD: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """One persistent worker: see the module. Grid: one program per bin of the schedule."""
    ROWS: gl.constexpr = 64
    DTYPE: gl.constexpr = q_desc.dtype
    q_smem = gl.allocate_shared_memory(DTYPE, [2 * Q_BUFFERS, 1, 1, ROWS, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BN, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BN, D], v_desc.layout)
    o_smem = q_smem
    if Q_BUFFERS == 2:
        o_smem = gl.allocate_shared_memory(DTYPE, [2, 1, 1, ROWS, D], o_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2 * Q_BUFFERS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2 * Q_BUFFERS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2 * Q_BUFFERS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    strides = (o_stride_b, o_stride_h, o_stride_s, lse_stride_h, bias_stride_b, bias_stride_g, word_stride)
    gl.warp_specialize(
        [
            (_consumer, (
                gl.constexpr(0), q_smem, k_smem, v_smem, o_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                tiles, entries, bin_ptr, o_desc, o_ptr, lse_ptr, parts, lse_parts, bias, masks, words, strides, scale,
                HEADS, GROUP, BN, D, DV, STAGES, ROWS, Q_BUFFERS, DTYPE, CAUSAL, BIAS, MASKS, HELD, TURNS)),
            (_consumer, (
                gl.constexpr(1), q_smem, k_smem, v_smem, o_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                tiles, entries, bin_ptr, o_desc, o_ptr, lse_ptr, parts, lse_parts, bias, masks, words, strides, scale,
                HEADS, GROUP, BN, D, DV, STAGES, ROWS, Q_BUFFERS, DTYPE, CAUSAL, BIAS, MASKS, HELD, TURNS)),
            (produce, (
                q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                tiles, entries, bin_ptr, GROUP, BN, STAGES, ROWS, Q_BUFFERS, TURNS)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
