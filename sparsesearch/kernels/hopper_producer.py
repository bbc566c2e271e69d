"""The warp of the Hopper prefill kernel that copies: queries of a tile, then its keys and values through rings of shared memory.

Each place has two barriers: `full`, which the copy engine completes, and `empty`, on which both consumers arrive. Consumers that take turns
arrive once for two: `k_empty` of a block says that its keys and the values of the block before have been read.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# Triton 3.9 renamed it; 3.6 has only the old name.
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

FIELDS = gl.constexpr(12)  # int32 per tile record, tile_lists.TILE_FIELDS
ENTRY_SHIFT = gl.constexpr(3)  # tile_lists.ENTRY_SHIFT: partial flag and two bits for halves that do not attend


@gluon.jit
def _left(empty, count, STAGES: gl.constexpr):
    """Wait until consumers have left the place of block `count`."""
    mbarrier.wait(empty.index(count % STAGES), ((count // STAGES) & 1) ^ 1)


@gluon.jit
def _fetch(desc, batch, head, row, smem, full, count, STAGES: gl.constexpr):
    """Copy block `count` of keys or values to its place in the ring."""
    stage = count % STAGES
    mbarrier.expect(full.index(stage), desc.block_type.nbytes)
    tma_load(desc, [batch, head, row, 0], full.index(stage), smem.index(stage))


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    tiles, entries, bin_ptr, GROUP: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr,
    Q_BUFFERS: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """Copy what a worker's tiles read, in the order in which consumers ask for it."""
    count = 0
    done = 0
    v_batch = 0
    v_head = 0
    v_row = 0
    for t in range(gl.load(bin_ptr + gl.program_id(0)), gl.load(bin_ptr + gl.program_id(0) + 1)):
        record = tiles + t * FIELDS
        batch = gl.load(record)
        head = gl.load(record + 1)
        q_row = gl.load(record + 2)
        k_row = gl.load(record + 5)
        lo = gl.load(record + 8)
        hi = gl.load(record + 9)
        for g in gl.static_range(2):
            half = (done % Q_BUFFERS) * 2 + g
            mbarrier.wait(q_empty.index(half), ((done // Q_BUFFERS) & 1) ^ 1)
            mbarrier.expect(q_full.index(half), q_desc.block_type.nbytes)
            tma_load(q_desc, [batch, head, q_row + g * ROWS, 0], q_full.index(half), q_smem.index(half))
        kv_head = head // GROUP
        for i in range(lo, hi):
            row = k_row + (gl.load(entries + i) >> ENTRY_SHIFT) * BN
            _left(k_empty, count, STAGES)
            _fetch(k_desc, batch, kv_head, row, k_smem, k_full, count, STAGES)
            if not TURNS:
                _left(v_empty, count, STAGES)
                _fetch(v_desc, batch, kv_head, row, v_smem, v_full, count, STAGES)
            elif (
                count > 0
            ):  # in the order of the turns: values of a block after the keys of the next, into a place that is left with theirs
                _fetch(v_desc, v_batch, v_head, v_row, v_smem, v_full, count - 1, STAGES)
            v_batch = batch
            v_head = kv_head
            v_row = row
            count += 1
        done += 1
    if TURNS:  # noqa: SIM102 (one is known when this is compiled, the other is not)
        if count > 0:
            _left(k_empty, count, STAGES)
            _fetch(v_desc, v_batch, v_head, v_row, v_smem, v_full, count - 1, STAGES)
