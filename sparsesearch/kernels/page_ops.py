"""Which pages a decoded token reads, chosen by the bounds of key blocks, as a PyTorch operator: opaque to torch.compile, safe in CUDA graphs."""

import torch
from torch import Tensor


@torch.library.custom_op("sparsesearch::pages_by_bounds", mutates_args=("low", "high"))
def pages_by_bounds(
    q: Tensor,
    keys: Tensor,
    low: Tensor,
    high: Tensor,
    start: Tensor,
    seen: Tensor,
    kv_heads: Tensor,
    bounded: Tensor,
    places: Tensor,
    budget: Tensor,
    sink_blocks: int,
    block_tokens: int,
) -> tuple[Tensor, Tensor]:
    """The pages of some query heads for the newest token of each sequence, and how many keys they hold, as `ragged_decode` takes them.

    A head keeps the `budget` blocks of the largest bound Σ_d max(q_d · low_d, q_d · high_d), among them the newest block and the first
    `sink_blocks`, which are in whatever the budget; ties go to the earlier block.

    Args:
        q: [B, H, D], contiguous; any positive factor changes nothing.
        keys: rows [rows, D]; those of a pair lie in order of position from its `start`, the newest included.
        low: [B, n, N, D], smallest value of each channel in each block, of the KV heads whose bounds are kept; the newest key is let in.
        high: largest, likewise.
        start: int64 [B · G], first row of each pair of sequence and KV head.
        seen: int32 [B · G], tokens so far, the newest included.
        kv_heads: int64 [g], the KV heads of the heads that choose.
        bounded: int64 [g], where these lie among the n.
        places: int64 [h], where the heads that choose lie among all query heads of `kv_heads`.
        budget: int32 [B], blocks per head.
        sink_blocks: blocks at the start.
        block_tokens: side of a tile.

    Returns:
        Pages int32 [B · h, N], 0 behind those that are read, and keys int32 [B · h].

    Raises:
        UnsupportedKernelError: a head has more blocks than a program can hold.
    """
    from sparsesearch.kernels import triton_bounds

    table, lens = _room(q, low, places)
    scores = q.new_empty(
        q.shape[0], kv_heads.numel() * (q.shape[0] * q.shape[1] // start.numel()), low.shape[2], dtype=torch.float32
    )
    with torch.cuda.device(q.get_device()):
        triton_bounds.launch(
            q, keys, low, high, start, seen, kv_heads, bounded, places, budget, table, lens, scores,
            sink_blocks=sink_blocks, block_tokens=block_tokens,
        )  # fmt: skip
    return table, lens


@pages_by_bounds.register_fake
def _pages_shapes(
    q: Tensor,
    keys: Tensor,
    low: Tensor,
    high: Tensor,
    start: Tensor,
    seen: Tensor,
    kv_heads: Tensor,
    bounded: Tensor,
    places: Tensor,
    budget: Tensor,
    sink_blocks: int,
    block_tokens: int,
) -> tuple[Tensor, Tensor]:
    return _room(q, low, places)


def _room(q: Tensor, low: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    pairs = q.shape[0] * places.numel()
    return q.new_empty(pairs, low.shape[2], dtype=torch.int32), q.new_empty(pairs, dtype=torch.int32)
