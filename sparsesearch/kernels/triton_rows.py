"""The Triton kernel of `row_copies`."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def copy_rows(
    whole, part, heads, permutation, stride_b, stride_h, stride_s, part_b, part_h, part_s, length,
    D: tl.constexpr, PADDED_D: tl.constexpr, ROWS: tl.constexpr, PUT: tl.constexpr,
):  # fmt: skip
    """part[b, i, r] = whole[b, heads[i], permutation[r]], or the reverse if PUT."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, PADDED_D)
    inside = (rows < length)[:, None] & (column < D)[None, :]
    token = tl.load(permutation + rows, mask=rows < length, other=0).to(tl.int64)
    head = tl.load(heads + tl.program_id(1)).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    there = whole + batch * stride_b + head * stride_h + token[:, None] * stride_s + column[None, :]
    here = (
        part
        + batch * part_b
        + tl.program_id(1).to(tl.int64) * part_h
        + rows[:, None].to(tl.int64) * part_s
        + column[None, :]
    )
    if PUT:
        tl.store(there, tl.load(here, mask=inside), mask=inside)
    else:
        tl.store(here, tl.load(there, mask=inside), mask=inside)


def launch(whole: Tensor, part: Tensor, heads: Tensor, permutation: Tensor, *, rows: int, put: bool) -> None:
    """Copy; both tensors have contiguous rows."""
    assert whole.stride(-1) == 1, "rows of q, k, v and out are contiguous"
    assert part.stride(-1) == 1
    length, head_dim = permutation.numel(), whole.shape[-1]
    grid = (triton.cdiv(length, rows), heads.numel(), whole.shape[0])
    copy_rows[grid](
        whole, part, heads, permutation, *whole.stride()[:3], *part.stride()[:3], length,
        D=head_dim, PADDED_D=triton.next_power_of_2(head_dim), ROWS=rows, PUT=put, num_warps=4,
    )  # fmt: skip
