"""The parts of a fused decoding step as PyTorch operators: for up to `MOST_ROWS` rows, on a GPU or in Triton's interpreter."""

import torch
from torch import Tensor

from sparsesearch.kernels.skinny_tiling import num_programs, tiling_for

MOST_ROWS = 16
"""Rows that one pass over the weights serves; above, a general matrix product is as fast."""


@torch.library.custom_op("sparsesearch::skinny_linear", mutates_args=())
def skinny_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    add: Tensor | None,
    squares: Tensor | None,
    gain: Tensor | None,
    eps: float,
    paired: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """A linear of few rows with what stands around it.

    Args:
        x: [M, K], contiguous, M <= MOST_ROWS; with `squares`, the input times the norm's gain, not yet divided by its size.
        weight: [N, K], contiguous; [2N, K] if `paired`, all gates first.
        bias: like the weights' lines.
        add: residual [M, N].
        squares: fp32 [M, any], whose sum per row is that of the input's squares.
        gain: [N] of the norm that follows.
        eps: of the norm before.
        paired: SiLU of the first half times the second.

    Returns:
        The output [M, N]; with `gain`, output · gain and the output's squares in parts, otherwise two empty tensors.
    """
    from sparsesearch.kernels import triton_skinny

    lines = weight.shape[0]
    tiling = tiling_for(lines, x.shape[1], x.shape[0])
    out = x.new_empty(x.shape[0], lines // 2 if paired else lines)
    scaled = torch.empty_like(out) if gain is not None else x.new_empty(0)
    parts = num_programs(lines, tiling)
    written = x.new_empty((x.shape[0], parts) if gain is not None else 0, dtype=torch.float32)
    with torch.cuda.device(x.get_device()):
        triton_skinny.launch(x, weight, bias, add, squares, gain, eps, paired, out, scaled, written, tiling)
    return out, scaled, written


@skinny_linear.register_fake
def _skinny_linear_shapes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    add: Tensor | None,
    squares: Tensor | None,
    gain: Tensor | None,
    eps: float,
    paired: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    lines = weight.shape[0]
    out = x.new_empty(x.shape[0], lines // 2 if paired else lines)
    if gain is None:
        return out, x.new_empty(0), x.new_empty(0, dtype=torch.float32)
    parts = num_programs(lines, tiling_for(lines, x.shape[1], x.shape[0]))
    return out, torch.empty_like(out), x.new_empty(x.shape[0], parts, dtype=torch.float32)


@torch.library.custom_op("sparsesearch::scale_rows", mutates_args=())
def scale_rows(x: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Rows times gain, and the sum of each row's squares [M, 1]: what `skinny_linear` takes from rows that it has not written."""
    from sparsesearch.kernels import triton_skinny

    scaled, squares = torch.empty_like(x), x.new_empty(x.shape[0], 1, dtype=torch.float32)
    with torch.cuda.device(x.get_device()):
        triton_skinny.launch_scale(x, gain, scaled, squares)
    return scaled, squares


@scale_rows.register_fake
def _scale_rows_shapes(x: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], 1, dtype=torch.float32)


@torch.library.custom_op("sparsesearch::rotate_append", mutates_args=("keys", "values", "seen", "lens", "slots"))
def rotate_append(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_gain: Tensor | None,
    k_gain: Tensor | None,
    eps: float,
    num_heads: int,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    room: Tensor,
    sinks: Tensor,
    windows: Tensor,
    seen: Tensor,
    lens: Tensor,
    slots: Tensor,
    block_tokens: int,
) -> Tensor:
    """Rotate the new token's queries and keys, and take its keys and values into a ragged cache.

    Args:
        qkv: [B, (H + 2G) · D], contiguous: queries, keys and values.
        cos: [B, D], contiguous.
        sin: likewise.
        q_gain: [D] of the queries' norm per head, if they have one.
        k_gain: of the keys'.
        eps: of both norms.
        num_heads: H.
        keys: and what follows as in `cache_ops.append_token`.
        values: rows.
        start: first row of each pair.
        room: rows of each pair.
        sinks: blocks of its sink.
        windows: blocks of its window.
        seen: tokens so far.
        lens: rows a new token sees.
        slots: slots so far.
        block_tokens: side of a tile.

    Returns:
        Queries [B, H, D].
    """
    from sparsesearch.kernels import triton_rotate

    head_dim = keys.shape[1]
    q = qkv.new_empty(qkv.shape[0], num_heads, head_dim)
    cache = (start, room, sinks, windows, seen, lens, slots)
    with torch.cuda.device(qkv.get_device()):
        triton_rotate.launch(qkv, cos, sin, q_gain, k_gain, eps, q, keys, values, cache, block_tokens)
    return q


@rotate_append.register_fake
def _rotate_append_shape(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_gain: object,
    k_gain: object,
    eps: float,
    num_heads: int,
    keys: Tensor,
    *_: object,
) -> Tensor:
    return qkv.new_empty(qkv.shape[0], num_heads, keys.shape[1])


@torch.library.custom_op("sparsesearch::rotate", mutates_args=())
def rotate(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_gain: Tensor | None,
    k_gain: Tensor | None,
    eps: float,
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Like `rotate_append`, for caches of other kinds: queries [B, H, D], keys and values [B, G, D]."""
    from sparsesearch.kernels import triton_rotate

    q, k, v = _rotate_shapes(qkv, cos, sin, q_gain, k_gain, eps, num_heads)
    with torch.cuda.device(qkv.get_device()):
        triton_rotate.launch(qkv, cos, sin, q_gain, k_gain, eps, q, k, v, None, 16)
    return q, k, v


@rotate.register_fake
def _rotate_shapes(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_gain: Tensor | None,
    k_gain: Tensor | None,
    eps: float,
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, head_dim = cos.shape
    kv_heads = (qkv.shape[1] // head_dim - num_heads) // 2
    return (
        qkv.new_empty(batch, num_heads, head_dim),
        qkv.new_empty(batch, kv_heads, head_dim),
        qkv.new_empty(batch, kv_heads, head_dim),
    )
