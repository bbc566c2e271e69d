"""Ragged caches as PyTorch operators: opaque to torch.compile, safe in CUDA graphs, with plain PyTorch beside the kernels for a CPU.

A (sequence, KV head) pair keeps `sinks` blocks, a ring of `windows` - 1 full blocks, and the block being filled, in this order, so that what
a new token may see is always the first `lens` rows: no table and no mask. A pair that keeps everything has a window as long as `KEEP_ALL`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

KEEP_ALL = 1 << 22
"""Blocks of a window that never slides."""


@torch.library.custom_op("sparsesearch::append_token", mutates_args=("keys", "values", "seen", "lens", "slots"))
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
    slots: Tensor,
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
        slots: int64 scalar, slots so far; counted up.
        block_tokens: side of a tile.
        kernel: Triton, or else PyTorch.
    """
    if kernel:
        from sparsesearch.kernels import triton_cache

        with torch.cuda.device(k.get_device()):
            triton_cache.launch(k, v, keys, values, start, room, sinks, windows, seen, lens, slots, block_tokens)
        return
    slots.add_(1)
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


@torch.library.custom_op("sparsesearch::fill_prompt", mutates_args=("keys", "values", "seen"))
def fill_prompt(
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    room: Tensor,
    sinks: Tensor,
    windows: Tensor,
    counts: Tensor,
    offsets: Tensor,
    seen: Tensor,
    block_tokens: int,
    kernel: bool,
) -> None:
    """Take the prompts of empty sequences into the cache.

    Args:
        k: keys [B, G, S, D], contiguous columns.
        v: values.
        keys: rows [rows, D] of all pairs.
        values: likewise.
        start: int64, first row of each pair.
        room: int32, rows of each pair.
        sinks: int32, blocks of each pair's sink.
        windows: int32, blocks of its window; 0 keeps nothing.
        counts: int32, tokens of each sequence.
        offsets: int32, slot of its first one.
        seen: int32, per pair; set to the sequence's tokens.
        block_tokens: side of a tile.
        kernel: Triton, or else PyTorch.
    """
    if kernel:
        from sparsesearch.kernels import triton_cache

        with torch.cuda.device(k.get_device()):
            triton_cache.launch_fill(
                k, v, keys, values, start, room, sinks, windows, counts, offsets, seen, block_tokens
            )
        return
    batch, num_kv_heads = k.shape[:2]
    for pair in range(batch * num_kv_heads):
        row, head, sink, window = pair // num_kv_heads, pair % num_kv_heads, int(sinks[pair]), int(windows[pair])
        count = int(counts[row])
        seen[pair] = count
        if window == 0 or count == 0:
            continue
        last = (count - 1) // block_tokens
        blocks = torch.arange(last + 1)
        kept = blocks[(blocks < sink) | (blocks > last - window)]
        moves = (kept >= sink) & (kept < last) & (last >= sink + window)
        slot = torch.where(moves, sink + (kept - sink) % max(window - 1, 1), kept.clamp(max=sink + window - 1))
        inside = torch.arange(block_tokens)
        position = (kept[:, None] * block_tokens + inside).flatten()
        place = (slot[:, None] * block_tokens + inside).flatten()[position < count]
        position = position[position < count]
        target = int(start[pair]) + place.to(k.device)
        for rows, new in ((keys, k), (values, v)):
            rows[target] = new[row, head, (int(offsets[row]) + position).to(k.device)]


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
