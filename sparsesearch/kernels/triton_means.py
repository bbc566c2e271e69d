"""Go on with a softmax over mean keys: the tail of a rule whose unselected blocks stand by their means, in one pass over queries and output.

A row of tiles starts from what the tile kernel left (output and log-sum-exp), sees one mean per key block that its tiles do not hold, and writes the
output of both parts. With a spread matrix the tail's first-order term is added: share of the tail x qᵀH.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsesearch.kernels.triton_prefill import padded_head_dim

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MASKED = tl.constexpr(-1.0e30)
NO_KEY = tl.constexpr(-1.0e25)  # see hopper_prefill
MEANS = 64


@triton.jit
def add_means(
    q, k, v, tiles, bias, spread, out, lse, q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_n,
    t_stride_b, t_stride_h, t_stride_m, t_stride_n, s_stride_b, s_stride_h, o_stride_b, o_stride_h, o_stride_s, l_stride_b, l_stride_h,
    heads, q_len, front, num_means, scale, spread_scale,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head. Grid: (query blocks, batch x heads)."""
    block = tl.program_id(0)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    row = block * BM - front + tl.arange(0, BM)
    real = (row >= 0) & (row < q_len)
    cols = tl.arange(0, D)
    wide = real[:, None] & (cols < DV)[None, :]
    at = row.to(tl.int64)[:, None]
    q_tile = tl.load(q + batch * q_stride_b + head * q_stride_h + at * q_stride_s + cols[None, :], mask=wide, other=0.0)
    o_ptr = out + batch * o_stride_b + head * o_stride_h + at * o_stride_s + cols[None, :]
    l_ptr = lse + batch * l_stride_b + head * l_stride_h + row
    before = tl.load(l_ptr, mask=real, other=-float("inf"))
    seen = before > NO_KEY
    m = tl.where(seen, before * LOG2E, NO_KEY)
    first = tl.where(seen, 1.0, 0.0)  # the weight of the computed tiles, under the present maximum
    total = first
    acc = tl.load(o_ptr, mask=wide, other=0.0).to(tl.float32) * first[:, None]
    chosen = tiles + batch * t_stride_b + head * t_stride_h + block.to(tl.int64) * t_stride_m
    k_head = k + batch * k_stride_b + head * k_stride_h + cols[:, None]
    v_head = v + batch * k_stride_b + head * k_stride_h + cols[None, :]
    scale2 = scale * LOG2E
    for low in range(0, num_means, BN):
        mean = low + tl.arange(0, BN)
        inside = mean < num_means
        wanted = tl.load(chosen + mean * t_stride_n, mask=inside, other=0) != 0
        k_tile = tl.load(k_head + mean[None, :] * k_stride_n, mask=inside[None, :] & (cols < DV)[:, None], other=0.0)
        s = tl.dot(q_tile, k_tile, input_precision=PRECISION) * scale2
        s += (tl.load(bias + mean, mask=inside, other=0.0) * LOG2E)[None, :]
        s = tl.where(wanted[None, :], s, MASKED)
        m_new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - m_new[:, None])
        decay = tl.exp2(m - m_new)
        total = total * decay + tl.sum(p, 1)
        first = first * decay
        v_tile = tl.load(v_head + mean[:, None] * k_stride_n, mask=inside[:, None] & (cols < DV)[None, :], other=0.0)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * decay[:, None], input_precision=PRECISION)
        m = m_new
    any_key = total > 0
    safe = tl.where(any_key, total, 1.0)
    acc = acc * tl.where(any_key, 1.0 / safe, 0.0)[:, None]
    if FIRST:
        line = tl.arange(0, D)
        s_ptr = spread + batch * s_stride_b + head * s_stride_h + line[:, None] * DV + cols[None, :]
        h_tile = tl.load(s_ptr, mask=(line < DV)[:, None] & (cols < DV)[None, :], other=0.0)
        share = tl.where(any_key, 1.0 - first / safe, 0.0) * spread_scale
        acc += tl.dot(q_tile, h_tile, input_precision=PRECISION) * share[:, None]
    tl.store(o_ptr, acc.to(out.dtype.element_ty), mask=wide)
    tl.store(l_ptr, tl.where(any_key, m * LN2 + tl.log(safe), -float("inf")), mask=real)


def serves(block_tokens: int) -> bool:
    """Whether a tile's queries make a kernel's tile: a power of two of them, 16 to 128."""
    return 16 <= block_tokens <= 128 and block_tokens & (block_tokens - 1) == 0


def constants(block_tokens: int, head_dim: int, *, first: bool, fp32: bool = False) -> dict[str, int | bool | str]:
    """Compile-time arguments of `add_means`."""
    return {
        "BM": block_tokens,
        "BN": MEANS,
        "D": padded_head_dim(head_dim),
        "DV": head_dim,
        "FIRST": first,
        "PRECISION": "ieee" if fp32 else "tf32",
    }


def options(block_tokens: int, head_dim: int) -> dict[str, int | bool]:
    """Warps and pipeline depth."""
    return {
        "num_warps": 8 if block_tokens * padded_head_dim(head_dim) >= 128 * 64 else 4,
        "num_stages": 2,
        "enable_fp_fusion": True,
    }


def launch(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, bias: Tensor, spread: Tensor | None, out: Tensor, lse: Tensor, *,
    block_tokens: int, front: int, scale: float, spread_scale: float,
) -> None:  # fmt: skip
    """Run the kernel on `out` and `lse`, in place.

    q and out [B, H, S, D] with contiguous rows; k and v the means [B, H, N, D], contiguous; tiles [B, H, M, N] boolean, any strides; bias [N] fp32;
    spread [B, H, D, D] like q, contiguous, or None; lse [B, H, S] fp32 with contiguous rows. `front`: places of the first block before the first query.
    """
    batch, heads, q_len, size = q.shape
    codes = tiles.view(torch.uint8)
    matrix = q if spread is None else spread
    add_means[(tiles.shape[2], batch * heads)](
        q, k, v, codes, bias, matrix, out, lse, *q.stride()[:3], *k.stride()[:3], *codes.stride(), *matrix.stride()[:2],
        *out.stride()[:3], *lse.stride()[:2], heads, q_len, front, k.shape[2], scale, spread_scale,
        **constants(block_tokens, size, first=spread is not None, fp32=q.dtype == torch.float32), **options(block_tokens, size),
    )  # fmt: skip
