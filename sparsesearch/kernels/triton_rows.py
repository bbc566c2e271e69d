"""Token orders on the device: rows gathered while they are copied, so that an order costs one pass over the data and no more.

A head of its own order reads its own index; heads that share an order share the row of the index. The way back is the same gather with
the inverse order, so nothing is scattered and every output row is written once.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sparsesearch.errors import SpecError

TILE_TOKENS = 64


@triton.jit
def copy_rows(
    x, index, out, x_stride_b, x_stride_h, x_stride_s, i_stride_b, i_stride_h, o_stride_b, o_stride_h, o_stride_s,
    num_heads, num_rows, ROWS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Copy one tile of rows of one head. Grid: (tiles, batch x heads)."""
    batch = (tl.program_id(1) // num_heads).to(tl.int64)
    head = (tl.program_id(1) % num_heads).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, D)
    source = tl.load(index + batch * i_stride_b + head * i_stride_h + row, mask=row < num_rows, other=-1).to(tl.int64)
    real = (row < num_rows)[:, None] & (col < DV)[None, :]
    read = x + batch * x_stride_b + head * x_stride_h + source[:, None] * x_stride_s + col[None, :]
    write = out + batch * o_stride_b + head * o_stride_h + row.to(tl.int64)[:, None] * o_stride_s + col[None, :]
    tl.store(write, tl.load(read, mask=real & (source >= 0)[:, None], other=0.0), mask=real)


@torch.library.custom_op("sparsesearch::gather_rows", mutates_args=())
def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of each head in another order, contiguous: out[b, h, i] = x[b, h, index[b, h, i]].

    Args:
        x: [B, H, S, D] of any strides with contiguous rows (a token-major projection needs no copy first).
        index: int32 [B or 1, H or 1, R]; -1 gives a row of zeros (padding up to a block border).

    Returns:
        [B, H, R, D] like x.

    Raises:
        SpecError: shapes disagree.
    """
    if x.ndim != 4 or x.stride(-1) != 1 or index.ndim != 3 or index.dtype != torch.int32 or index.stride(-1) != 1:
        raise SpecError(
            f"x must be [B, H, S, D] with contiguous rows and index int32 [B, H, R], but got {tuple(x.shape)} and "
            f"{index.dtype} {tuple(index.shape)}."
        )
    batch, num_heads, _, width = x.shape
    if index.shape[0] not in (1, batch) or index.shape[1] not in (1, num_heads):
        raise SpecError(
            f"index must have 1 or {batch} batches and 1 or {num_heads} heads, but has {tuple(index.shape)}."
        )
    num_rows = index.shape[2]
    out = x.new_empty(batch, num_heads, num_rows, width)
    strides = [0 if index.shape[i] == 1 else index.stride(i) for i in (0, 1)]
    grid = (triton.cdiv(num_rows, TILE_TOKENS), batch * num_heads)
    if num_rows:
        with torch.cuda.device(x.get_device()):
            copy_rows[grid](
                x, index, out, *x.stride()[:3], *strides, *out.stride()[:3], num_heads, num_rows,
                ROWS=TILE_TOKENS, D=triton.next_power_of_2(width), DV=width, num_warps=4,
            )  # fmt: skip
    return out


@gather_rows.register_fake
def _gather_rows_shape(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], index.shape[2], x.shape[3])


def scatter_rows(x: Float[Tensor, "B H R D"], index: Int[Tensor, "B H R"], num_rows: int) -> Float[Tensor, "B H S D"]:
    """The way back: out[b, h, index[b, h, i]] = x[b, h, i]; rows that no index names are 0.

    Args:
        x: rows in the other order.
        index: as given to `gather_rows`; each row named at most once, -1 for padding.
        num_rows: S.
    """
    rows: Tensor = gather_rows(x, inverse_index(index, num_rows))
    return rows


def inverse_index(index: Int[Tensor, "B H R"], num_rows: int) -> Int[Tensor, "B H S"]:
    """Where each of `num_rows` rows went under `index`; -1 for rows it does not name. Worth keeping: an order serves a whole model."""
    place = torch.arange(index.shape[-1], device=index.device, dtype=torch.int32).expand(index.shape)
    back = index.new_full((*index.shape[:-1], num_rows + 1), -1)
    named = torch.where(index >= 0, index, num_rows).long()  # padding lands in a column that is cut off
    return back.scatter_(-1, named, place)[..., :num_rows].contiguous()
