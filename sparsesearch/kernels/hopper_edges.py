"""Where a tile of the Hopper prefill kernel meets the outside: its record, the masks of its partial blocks, its output."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from sparsesearch.kernels.hopper_producer import ENTRY_SHIFT, FIELDS
from sparsesearch.kernels.hopper_softmax import LOG2E, MASKED, keep_first

# Triton 3.9 renamed it; 3.6 has only the old name.
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def adjust(
    s, entry, at, q_pos, kv_len, bias, scale, masks, words, word_stride, G: gl.constexpr, BN: gl.constexpr, ROWS: gl.constexpr,
    CAUSAL: gl.constexpr, BIAS: gl.constexpr, MASKS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Add the per-key bias; cut a partial block by the sequence's end, causality, the half tile that does not attend to it, its bitmap."""
    if BIAS:  # the running maximum is of s · scale, so the bias is brought to s's unit
        offs = (entry >> ENTRY_SHIFT) * BN + gl.arange(0, BN, gl.SliceLayout(0, LAYOUT))
        s = s + (gl.load(bias + offs) * (LOG2E / scale))[None, :]
    if (entry & 1) != 0:
        limit = gl.where(((entry >> (1 + G)) & 1) != 0, 0, kv_len)
        if CAUSAL:
            limit = gl.minimum(q_pos + 1, limit)
        s = keep_first(s, limit - (entry >> ENTRY_SHIFT) * BN, ROWS, BN, CAUSAL)
        if MASKS:
            # one word of every row at a time: a [ROWS, BN] gather would hold 64 addresses per thread
            start = gl.load(masks + 2 * at + G)
            row = words + gl.maximum(start, 0) + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT)) * word_stride
            bit = gl.arange(0, BN, gl.SliceLayout(0, LAYOUT))
            for w in gl.static_range(BN // 32):
                word = gl.where(start >= 0, gl.load(row + w), -1)[:, None]
                s = gl.where((bit // 32 == w)[None, :] & (((word >> (bit % 32)[None, :]) & 1) == 0), MASKED, s)
    return s


@gluon.jit
def write_rows(
    acc, m, total, o_desc, o_smem, o_ptr, lse_ptr, parts, lse_parts, record, strides,
    HEADS: gl.constexpr, G: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, DTYPE: gl.constexpr,
    ROW_S: gl.constexpr, ROW_O: gl.constexpr,
):  # fmt: skip
    """Normalise and store one consumer's rows: by the copy engine if all are real; row by row if not, or if this is a piece of a tile."""
    batch = gl.load(record)
    head = gl.load(record + 1)
    q_row = gl.load(record + 2)
    row_lo = gl.load(record + 3)
    row_hi = gl.load(record + 4)
    slot = gl.load(record + 10)
    whole = slot < 0
    total = gl.convert_layout(gl.sum(total, 1), ROW_S)
    m = gl.convert_layout(gl.max(m, 1), ROW_S)
    seen = total > 0
    lse = gl.where(seen, m * LN2 + gl.log(total), -float("inf"))
    inverse = gl.where(seen, 1.0 / total, 0.0)
    acc = acc * gl.convert_layout(inverse, ROW_O)[:, None]
    rows_s = G * ROWS + gl.arange(0, ROWS, ROW_S)
    lse_base = gl.where(whole, lse_ptr + (batch * HEADS + head) * strides[3] + q_row, lse_parts + slot * (2 * ROWS))
    gl.store(lse_base + rows_s, lse, mask=(rows_s >= row_lo) & (rows_s < row_hi))
    tma.store_wait(0)
    staged = o_smem.reshape((ROWS, D))
    staged.store(acc.to(DTYPE))
    if whole & (row_lo <= G * ROWS) & (row_hi >= (G + 1) * ROWS):
        fence_async_shared()
        tma_store(o_desc, [batch, head, q_row + G * ROWS, 0], o_smem)
    else:
        THREADS: gl.constexpr = D // 8
        FLAT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // THREADS, THREADS], [4, 1], [1, 0])
        rows = G * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, FLAT))
        cols = gl.arange(0, D, gl.SliceLayout(0, FLAT))
        stride = gl.where(whole, strides[2], D).to(gl.int64)
        home = o_ptr + batch.to(gl.int64) * strides[0] + head.to(gl.int64) * strides[1] + q_row * stride
        base = gl.where(whole, home, parts + slot.to(gl.int64) * (2 * ROWS * D))
        real = (rows >= row_lo) & (rows < row_hi)
        gl.store(
            base + (rows * stride)[:, None] + cols[None, :],
            staged.load(FLAT),
            mask=real[:, None] & (cols < DV)[None, :],
        )


@gluon.jit
def read_tile(tiles, bias, t, bias_stride_b, bias_stride_g, GROUP: gl.constexpr, BIAS: gl.constexpr):
    """What scores of a tile need: length, first position, list, bias."""
    record = tiles + t * FIELDS
    tile_bias = bias
    if BIAS:
        tile_bias = (
            bias
            + gl.load(record) * bias_stride_b
            + (gl.load(record + 1) // GROUP) * bias_stride_g
            + gl.load(record + 5)
        )
    return gl.load(record + 6), gl.load(record + 7), gl.load(record + 8), gl.load(record + 9), tile_bias
