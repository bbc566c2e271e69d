"""Prefill on any GPU that Triton knows: the same lists and the same meaning as the Hopper kernel, and the merge of cut tiles.

One loop over a tile's list, full and partial blocks alike, with the mask under a branch on the entry's flag: two loops cost a tenth on
Ampere and make ptxas serialise the matrix instructions on Hopper. Loads are masked pointers, so nothing here needs a Hopper. The
interpreter (TRITON_INTERPRET=1) runs it on the CPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MASKED = tl.constexpr(-1.0e30)
NO_KEY = tl.constexpr(-1.0e25)  # see hopper_prefill
FIELDS = tl.constexpr(12)
ENTRY_SHIFT = tl.constexpr(3)


@triton.jit
def tile_list_attention(
    q, k, v, out, lse, parts, lse_parts, bias, masks, words, tiles, entries, bin_ptr,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_g, k_stride_t, v_stride_b, v_stride_g, v_stride_t,
    o_stride_b, o_stride_h, o_stride_s, lse_stride_b, lse_stride_h, bias_stride_b, bias_stride_g, word_stride, num_keys, scale,
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    CAUSAL: tl.constexpr, BIAS: tl.constexpr, MASKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One persistent worker over its tiles. Grid: one program per bin of the schedule."""
    worker = tl.program_id(0)
    rows = tl.arange(0, BM)
    cols = tl.arange(0, D)
    half = (rows >= BM // 2).to(tl.int32)
    scale2 = scale * LOG2E
    for t in range(tl.load(bin_ptr + worker), tl.load(bin_ptr + worker + 1)):
        record = tiles + t * FIELDS
        batch = tl.load(record).to(tl.int64)
        head = tl.load(record + 1).to(tl.int64)
        q_row = tl.load(record + 2)
        row_lo = tl.load(record + 3)
        row_hi = tl.load(record + 4)
        k_row = tl.load(record + 5)
        kv_len = tl.load(record + 6)
        q_pos = tl.load(record + 7) + rows
        slot = tl.load(record + 10).to(tl.int64)
        real = (rows >= row_lo) & (rows < row_hi)
        q_ptr = (
            q
            + batch * q_stride_b
            + head * q_stride_h
            + (q_row + rows).to(tl.int64)[:, None] * q_stride_s
            + cols[None, :]
        )
        q_tile = tl.load(q_ptr, mask=real[:, None] & (cols < DV)[None, :], other=0.0)
        k_head = k + batch * k_stride_b + (head // GROUP) * k_stride_g + cols[:, None]
        v_head = v + batch * v_stride_b + (head // GROUP) * v_stride_g + cols[None, :]
        m = tl.full([BM], NO_KEY, tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, D], tl.float32)
        for i in range(tl.load(record + 8), tl.load(record + 9)):
            entry = tl.load(entries + i)
            k_pos = (entry >> ENTRY_SHIFT) * BN + tl.arange(0, BN)
            loaded = k_pos < tl.where(
                (entry & 1) != 0, kv_len, num_keys - k_row
            )  # whole blocks may lie past kv_len: pooled keys
            at = (k_row + k_pos).to(tl.int64)
            k_tile = tl.load(k_head + at[None, :] * k_stride_t, mask=loaded[None, :] & (cols < DV)[:, None], other=0.0)
            s = tl.dot(q_tile, k_tile, input_precision=PRECISION) * scale2
            if BIAS:
                b = tl.load(bias + batch * bias_stride_b + (head // GROUP) * bias_stride_g + at, mask=loaded, other=0.0)
                s += (b * LOG2E)[None, :]
            if (entry & 1) != 0:
                limit = tl.where(((entry >> (1 + half)) & 1) != 0, 0, kv_len)
                if CAUSAL:
                    limit = tl.minimum(limit, q_pos + 1)
                s = tl.where(k_pos[None, :] < limit[:, None], s, MASKED)
                if MASKS:
                    start = tl.load(masks + 2 * i + half)
                    row = words + start + rows % (BM // 2) * word_stride
                    bit = tl.arange(0, BN)
                    for w in tl.static_range(BN // 32):
                        word = tl.load(row + w, mask=start >= 0, other=-1)[:, None]
                        hidden = (bit // 32 == w)[None, :] & (((word >> (bit % 32)[None, :]) & 1) == 0)
                        s = tl.where(hidden, MASKED, s)
            m_new = tl.maximum(m, tl.max(s, 1))
            p = tl.exp2(s - m_new[:, None])
            decay = tl.exp2(m - m_new)
            total = total * decay + tl.sum(p, 1)
            v_tile = tl.load(v_head + at[:, None] * v_stride_t, mask=loaded[:, None] & (cols < DV)[None, :], other=0.0)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * decay[:, None], input_precision=PRECISION)
            m = m_new
        seen = total > 0
        log_sum = tl.where(seen, m * LN2 + tl.log(tl.where(seen, total, 1.0)), -float("inf"))
        acc = acc * tl.where(seen, 1.0 / tl.where(seen, total, 1.0), 0.0)[:, None]
        whole = slot < 0
        lse_base = tl.where(whole, lse + batch * lse_stride_b + head * lse_stride_h + q_row, lse_parts + slot * BM)
        tl.store(lse_base + rows, log_sum, mask=real)
        stride = tl.where(whole, o_stride_s, D).to(tl.int64)
        base = tl.where(whole, out + batch * o_stride_b + head * o_stride_h + q_row * stride, parts + slot * (BM * D))
        tl.store(
            base + (rows * stride)[:, None] + cols[None, :],
            acc.to(out.dtype.element_ty),
            mask=real[:, None] & (cols < DV)[None, :],
        )


@triton.jit
def merge_pieces(
    out, lse, parts, lse_parts, merges, o_stride_b, o_stride_h, o_stride_s, lse_stride_b, lse_stride_h,
    ROWS: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """O = Σ exp(lse_i - lse) O_i over the pieces of one cut tile. Grid: (cut tiles, ROWS / BM)."""
    record = merges + tl.program_id(0) * 7
    batch = tl.load(record).to(tl.int64)
    head = tl.load(record + 1).to(tl.int64)
    q_row = tl.load(record + 2)
    row_lo = tl.load(record + 3)
    row_hi = tl.load(record + 4)
    first = tl.load(record + 5).to(tl.int64)
    count = tl.load(record + 6)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    cols = tl.arange(0, D)
    real_rows = (rows >= row_lo) & (rows < row_hi)
    real = real_rows[:, None] & (cols < DV)[None, :]
    top = tl.full([BM], -float("inf"), tl.float32)
    for i in range(count):
        top = tl.maximum(top, tl.load(lse_parts + (first + i) * ROWS + rows, mask=real_rows, other=-float("inf")))
    top = tl.where(top == -float("inf"), 0.0, top)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    for i in range(count):
        weight = tl.exp(tl.load(lse_parts + (first + i) * ROWS + rows, mask=real_rows, other=-float("inf")) - top)
        piece = parts + ((first + i) * ROWS + rows)[:, None] * D + cols[None, :]
        acc += weight[:, None] * tl.load(piece, mask=real, other=0.0).to(tl.float32)
        total += weight
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    merged = tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), -float("inf"))
    tl.store(lse + batch * lse_stride_b + head * lse_stride_h + q_row + rows, merged, mask=real_rows)
    o_ptr = out + batch * o_stride_b + head * o_stride_h + (q_row + rows).to(tl.int64)[:, None] * o_stride_s
    tl.store(o_ptr + cols[None, :], acc.to(out.dtype.element_ty), mask=real)


def padded_head_dim(head_dim: int) -> int:
    """Width of a tile: the next power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def launch(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, parts: Tensor, lse_parts: Tensor, bias: Tensor | None,
    masks: Tensor | None, words: Tensor | None, tiles: Tensor, entries: Tensor, bin_ptr: Tensor, *, scale: float, causal: bool, rows: int, keys: int,
) -> None:  # fmt: skip
    """Run the kernel. Shapes as in `dispatch.prefill`, parts [slots, rows, padded head_dim] like q, lse_parts [slots, rows]."""
    own_bias = lse if bias is None else bias
    fixed = constants(
        rows=rows, keys=keys, group=q.shape[1] // k.shape[1], head_dim=q.shape[-1], causal=causal, bias=bias is not None,
        masks=masks is not None, fp32=q.dtype == torch.float32,
    )  # fmt: skip
    tile_list_attention[(bin_ptr.numel() - 1,)](
        q, k, v, out, lse, parts, lse_parts, own_bias, entries if masks is None else masks, entries if words is None else words, tiles, entries, bin_ptr, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *out.stride()[:3], lse.stride(0), lse.stride(1), own_bias.stride(0), own_bias.stride(1), 0 if words is None else words.shape[2], k.shape[2], scale,
        **fixed, **options(rows, keys, q.shape[-1]),
    )  # fmt: skip


def constants(
    *, rows: int, keys: int, group: int, head_dim: int, causal: bool, bias: bool, masks: bool, fp32: bool
) -> dict[str, int | bool | str]:
    """Compile-time arguments of `tile_list_attention`."""
    return {
        "GROUP": group,
        "BM": rows,
        "BN": keys,
        "D": padded_head_dim(head_dim),
        "DV": head_dim,
        "CAUSAL": causal,
        "BIAS": bias,
        "MASKS": masks,
        "PRECISION": "ieee" if fp32 else "tf32",
    }


def options(rows: int, keys: int, head_dim: int) -> dict[str, int | bool]:
    """Warps and pipeline depth: 128 x 128 at head_dim 128 in 4 warps spills 1.4 kB on Hopper and serialises the matrix instructions."""
    padded = padded_head_dim(head_dim)
    wide = rows * max(keys, padded) >= 128 * 128
    return {"num_warps": 8 if wide else 4, "num_stages": 2 if padded >= 128 else 3, "enable_fp_fusion": True}


def launch_merge(out: Tensor, lse: Tensor, parts: Tensor, lse_parts: Tensor, merges: Tensor) -> None:
    """Merge the pieces of cut tiles into `out` and `lse`; nothing to do if no tile was cut."""
    if merges.shape[0] == 0:
        return
    rows, padded = parts.shape[1:]
    merge_pieces[(merges.shape[0], rows // 16)](
        out, lse, parts, lse_parts, merges, *out.stride()[:3], lse.stride(0), lse.stride(1),
        ROWS=rows, BM=16, D=padded, DV=out.shape[-1], num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
