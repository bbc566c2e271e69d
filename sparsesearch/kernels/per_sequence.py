"""Backends that take one unpadded sequence at a time, keys repeated to the query heads: `torch_gather` and the oracle, `reference`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparsesearch.block_mask import expand
from sparsesearch.kernels.reference import masked_attention
from sparsesearch.kernels.schedule import HeadTiles, Span
from sparsesearch.kernels.torch_gather import tile_attention_torch, tile_state_torch

if TYPE_CHECKING:
    from sparsesearch.rules.base import Rule


def tiles_per_head(tiles: HeadTiles) -> Bool[Tensor, "H M N"]:
    """The tiles of each head; nothing to gather if every head has its own choice, as dynamic rules give it."""
    if tiles.of_head == tuple(range(len(tiles.choices))):
        return tiles.choices
    return tiles.choices[list(tiles.of_head)]


def tiles_of(choice: "tuple[Rule, ...] | list[HeadTiles]", spans: Sequence[Span]) -> list[HeadTiles]:
    """The tiles of every sequence, if need be those that its heads' static rules select."""
    if isinstance(choice, list):
        return choice
    distinct = tuple(dict.fromkeys(choice))
    of_head = tuple(distinct.index(rule) for rule in choice)
    return [HeadTiles(torch.stack([rule.select(span.grid) for rule in distinct]), of_head) for span in spans]


def run_per_sequence(
    q: Float[Tensor, "B H S D"],
    k: Float[Tensor, "B G T D"],
    v: Float[Tensor, "B G T D"],
    spans: Sequence[Span],
    tiles: Sequence[HeadTiles],
    *,
    scale: float,
    oracle: bool,
    need_lse: bool,
) -> tuple[Float[Tensor, "B H S D"], Float[Tensor, "B H S"] | None]:
    """Output, 0 in rows of no sequence, and log-sum-exp, -inf there; the gather backend gives it only if `need_lse`."""
    out = torch.zeros_like(q)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    group = q.shape[1] // k.shape[1]
    for span, choice in zip(spans, tiles, strict=True):
        rows = slice(span.q_offset, span.q_offset + span.grid.q_len)
        keys = slice(span.k_offset, span.k_offset + span.grid.kv_len)
        own_q, own_k, own_v = q[span.batch, :, rows], k[span.batch, :, keys], v[span.batch, :, keys]
        own_k, own_v = own_k.repeat_interleave(group, 0), own_v.repeat_interleave(group, 0)
        mask = tiles_per_head(choice).to(q.device)
        if oracle:
            allowed = expand(mask, span.grid)
            if choice.elements is not None:
                inside = choice.elements.expand(len(choice.choices), span.grid)
                allowed = allowed & inside[list(choice.of_head)].to(q.device)
            own_out, own_lse = masked_attention(own_q, own_k, own_v, allowed, scale=scale)
            out[span.batch, :, rows], lse[span.batch, :, rows] = own_out, own_lse.float()
        elif need_lse:
            state = tile_state_torch(own_q, own_k, own_v, mask, span.grid, scale=scale)
            out[span.batch, :, rows], lse[span.batch, :, rows] = state
        else:
            out[span.batch, :, rows] = tile_attention_torch(own_q, own_k, own_v, mask, span.grid, scale=scale)
    return out, lse if oracle or need_lse else None
