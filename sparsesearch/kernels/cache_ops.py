"""Ragged caches as PyTorch operators: opaque to torch.compile, safe in CUDA graphs, with plain PyTorch beside the kernels for a CPU.

A (sequence, KV head) pair keeps `sinks` blocks, a ring of `windows` - 1 full blocks, and the block being filled, in this order, so that what
a new token may see is always the first `lens` rows: no table and no mask. A pair that keeps everything has a window as long as `KEEP_ALL`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

KEEP_ALL = 1 << 22
"""Blocks of a window that never slides."""


@torch.library.custom_op("sparsesearch::append_token", mutates_args=("keys", "values", "seen", "lens"))
def append_token(
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    room: Tensor,
    sinks: Tensor,
    windows: Tensor,
    seen: Tensor,
    lens: Tensor,
    block_tokens: int,
    kernel: bool,
) -> None:
    """Take one new token per sequence into the cache.

    Args:
        k: new keys [B, G, 1, D], contiguous columns.
        v: new values.
        keys: rows [rows, D] of all pairs.
        values: likewise.
        start: int64, first row of each pair.
        room: int32, rows of each pair; a token beyond them is not kept.
        sinks: int32, blocks of each pair's sink.
        windows: int32, blocks of its window, the one being filled included; 0 keeps nothing.
        seen: int32, tokens so far; counted up.
        lens: int32, rows a new token sees; updated.
        block_tokens: side of a tile.
        kernel: Triton, or else PyTorch.
    """
    if kernel:
        from sparsesearch.kernels import triton_cache

        with torch.cuda.device(k.get_device()):
            triton_cache.launch(k, v, keys, values, start, room, sinks, windows, seen, lens, block_tokens)
        return
    position = seen.long()
    block, offset, tail = position // block_tokens, position % block_tokens, sinks + windows.long() - 1
    full = (offset == 0) & (block >= sinks + windows) & (windows > 1)
    for pair in full.nonzero()[:, 0].tolist():
        slot = int(sinks[pair] + (block[pair] - 1 - sinks[pair]) % (windows[pair] - 1))
        source, target = (int(start[pair]) + int(index) * block_tokens for index in (tail[pair], slot))
        for rows in (keys, values):
            rows[target : target + block_tokens] = rows[source : source + block_tokens].clone()
    place = torch.minimum(block, tail) * block_tokens + offset
    kept = (windows > 0) & (place < room)
    for rows, new in ((keys, k), (values, v)):
        rows[(start + place)[kept]] = new.flatten(0, 2)[kept]
    lens.copy_(torch.where(kept, place + 1, lens).int())
    seen.add_(1)


@torch.library.custom_op("sparsesearch::gathered_decode", mutates_args=())
def gathered_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_start: Tensor,
    kv_lens: Tensor,
    table: Tensor | None,
    scale: float,
    page_tokens: int,
) -> Tensor:
    """What `decode.ragged_decode` returns first, in PyTorch, one pair at a time: for a CPU."""
    out = torch.zeros_like(q).view(kv_lens.numel(), -1, q.shape[-1])
    queries = q.reshape(out.shape)
    for pair, (start, count) in enumerate(zip(kv_start.tolist(), kv_lens.tolist(), strict=True)):
        if not count:
            continue
        index = torch.arange(count, device=q.device)
        if table is not None:
            index = table[pair, index // page_tokens].long() * page_tokens + index % page_tokens
            keys, values = k[start + index], v[start + index]
        else:
            keys, values = k[start : start + count], v[start : start + count]
        out[pair] = F.scaled_dot_product_attention(queries[pair][None], keys[None], values[None], scale=scale)[0]
    return out.view(q.shape)


@gathered_decode.register_fake
def _gathered_decode_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_start: Tensor,
    kv_lens: Tensor,
    table: Tensor | None,
    scale: float,
    page_tokens: int,
) -> Tensor:
    return torch.empty_like(q)
