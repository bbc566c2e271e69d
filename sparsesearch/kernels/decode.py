"""Attention of one new token per sequence over ragged caches: every KV head may keep another number of keys."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsesearch.errors import SpecError, UnsupportedKernelError
from sparsesearch.kernels.ops import ragged_decode as _op

MOST_PAIRS = 4096
"""Pairs of sequence and KV head in one call."""


def ragged_decode(
    q: Float[Tensor, "B H D"],
    k: Float[Tensor, "rows D"],
    v: Float[Tensor, "rows D"],
    kv_start: Int[Tensor, " pairs"],
    kv_lens: Int[Tensor, " pairs"],
    *,
    scale: float,
    table: Int[Tensor, "pairs pages"] | None = None,
    page_tokens: int = 64,
) -> tuple[Float[Tensor, "B H D"], Float[Tensor, "B H"]]:
    """Softmax attention of each query over the keys its KV head has kept.

    Pair b·G + g is KV head g of sequence b. Its keys are rows kv_start … kv_start + kv_lens - 1 of `k`; with a `table`, key t is row
    kv_start + table[pair, t // page_tokens] · page_tokens + t % page_tokens, which serves paged caches and, with the pages a rule chose,
    sparse decoding. Nothing is read back to the host, so lengths, tables and contents may change between replays of a CUDA graph.

    Args:
        q: queries, contiguous; rotated.
        k: rows of keys, such as `cache.view(-1, D)`; contiguous columns.
        v: likewise.
        kv_start: int64, first row of each pair.
        kv_lens: int32, keys of each pair; 0 gives output 0.
        scale: factor on q·k.
        table: int32 pages of each pair.
        page_tokens: keys per page.

    Returns:
        Output like q, and the fp32 log-sum-exp, -inf where a pair has no key.

    Raises:
        UnsupportedKernelError: the tensors are on the CPU and the interpreter is off, or a layout is not served.
        SpecError: shapes disagree.
    """
    num_pairs = kv_lens.numel()
    if q.ndim != 3 or num_pairs % q.shape[0] or q.shape[0] * q.shape[1] % num_pairs or kv_start.numel() != num_pairs:
        raise SpecError(f"q [B, H, D] and B·G pairs must fit, but got {tuple(q.shape)} and {num_pairs} pairs.")
    if k.ndim != 2 or k.shape != v.shape or k.shape[1] != q.shape[-1] or not q.dtype == k.dtype == v.dtype:
        raise SpecError(
            f"k and v must be [rows, {q.shape[-1]}] of q's dtype, but got {tuple(k.shape)}, {tuple(v.shape)}."
        )
    if (
        kv_lens.dtype != torch.int32
        or kv_start.dtype != torch.int64
        or (table is not None and table.dtype != torch.int32)
    ):
        raise SpecError("kv_lens and table must be int32 and kv_start int64.")
    if not q.is_contiguous() or k.stride(1) != 1 or v.stride(1) != 1:
        raise UnsupportedKernelError("decoding needs contiguous q and rows of k and v; call .contiguous().")
    if num_pairs > MOST_PAIRS:
        raise UnsupportedKernelError(
            f"decoding serves at most {MOST_PAIRS} (sequence, KV head) pairs per call, not {num_pairs}; cut the batch."
        )
    out: tuple[Tensor, Tensor] = _op(q, k, v, kv_start, kv_lens, table, scale, page_tokens)
    return out
