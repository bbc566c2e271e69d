"""Copies that put the rows of chosen heads into another order, and back: what an order costs at run time.

    take_rows   out[b, i, r] = x[b, heads[i], permutation[r]]
    put_rows    out[b, heads[i], permutation[r]] = y[b, i, r], in place

On a GPU one Triton kernel each, bound by memory (a row is 128 or 256 bytes, contiguous); elsewhere PyTorch indexing. Both are operators that
torch.compile sees through.
"""

import torch
from torch import Tensor

_ROWS = 64


@torch.library.custom_op("sparsesearch::take_rows", mutates_args=())
def take_rows(x: Tensor, heads: Tensor, permutation: Tensor) -> Tensor:
    """Rows of `x` [B, H, S, D] in the order of `permutation` [R], for the heads in `heads` [I]: a contiguous [B, I, R, D]."""
    out = x.new_empty(x.shape[0], heads.numel(), permutation.numel(), x.shape[-1])
    if not x.is_cuda:
        return out.copy_(x[:, heads][:, :, permutation])
    _launch(x, out, heads, permutation, put=False)
    return out


@take_rows.register_fake
def _take_rows_shape(x: Tensor, heads: Tensor, permutation: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], heads.numel(), permutation.numel(), x.shape[-1])


@torch.library.custom_op("sparsesearch::put_rows", mutates_args=("out",))
def put_rows(out: Tensor, y: Tensor, heads: Tensor, permutation: Tensor) -> None:
    """Write the rows of `y` back to where `take_rows` took them from."""
    if not out.is_cuda:
        out[:, heads[:, None], permutation] = y
        return
    _launch(out, y, heads, permutation, put=True)


def _launch(whole: Tensor, part: Tensor, heads: Tensor, permutation: Tensor, *, put: bool) -> None:
    from sparsesearch.kernels import triton_rows

    with torch.cuda.device(whole.get_device()):
        triton_rows.launch(whole, part, heads, permutation, rows=_ROWS, put=put)
