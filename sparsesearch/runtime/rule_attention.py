"""One rule on one sequence: the way of a CPU, and of what no kernel expresses (a model's own sliding window, sequences with gaps)."""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparsesearch.block_mask import BlockGrid, expand
from sparsesearch.errors import UnsupportedModelError
from sparsesearch.kernels.reference import running_mean
from sparsesearch.kernels.torch_gather import tile_attention_masked
from sparsesearch.rules.base import Rule
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.dense_source import DenseSource
from sparsesearch.rules.reuse import Reuse
from sparsesearch.runtime.backends import attend_tiles
from sparsesearch.runtime.binding import LayerBinding
from sparsesearch.runtime.mask_code import Span

_STRIP_TOKENS = 256  # queries per step where an element mask is needed; bounds that mask's memory


def take(x: Float[Tensor, "B H T D"], rows: slice | list[int], slots: slice | Tensor) -> Float[Tensor, "b H t D"]:
    """Some rows and slots, as a view where they are contiguous."""
    return x[rows][:, :, slots.to(x.device) if isinstance(slots, Tensor) else slots]


def pick_heads(x: Float[Tensor, "B H T D"], heads: Sequence[int]) -> Float[Tensor, "B h T D"]:
    """Some heads (repeats allowed), as a view where they are contiguous."""
    if list(heads) == list(range(heads[0], heads[0] + len(heads))):
        return x[:, heads[0] : heads[0] + len(heads)]
    return x.index_select(1, torch.tensor(heads, device=x.device))


def attend_rule(
    rule: Rule,
    q: Float[Tensor, "b h s D"],
    all_k: Float[Tensor, "b G t D"],
    all_v: Float[Tensor, "b G t D"],
    kv_heads: list[int],
    span: Span,
    binding: LayerBinding,
    scale: float,
    sliding_window: int | None,
    place: tuple[int, tuple[int, ...]],
) -> Float[Tensor, "b h s D"]:
    """One rule on one sequence; `kv_heads` are those of q's heads, `place` is the sequence's number and the heads' in the layer."""
    grid = span.grid
    cut = sliding_window if sliding_window is not None and grid.kv_len > sliding_window else None
    if rule.rest == "zero":
        return torch.zeros_like(q)
    dense = isinstance(rule, Dense) or (rule.dynamic and not rule.decodes and grid.q_len == 1)
    dense = dense or (rule.dynamic and binding.leaves is None and rule.keeps_all(grid))
    by_position = grid.q_len == 1 and not rule.dynamic and not dense
    if by_position and rule.rest == "drop" and cut is None and binding.backend != "reference":
        keys = _decoding_keys(rule, grid).to(q.device)  # only these are read
        heads = torch.tensor(kv_heads, device=q.device)[:, None]
        return F.scaled_dot_product_attention(q, all_k[:, heads, keys], all_v[:, heads, keys], scale=scale)
    k, v = pick_heads(all_k, kv_heads), pick_heads(all_v, kv_heads)
    if rule.rest == "mean_value":
        # a uniform mean over the keys a sliding window leaves is attention with all scores equal
        return running_mean(v, grid).to(q.dtype) if cut is None else _attend_strips(q * 0, k, v, None, span, scale, cut)
    if dense:
        return _attend_dense(q, k, v, span, scale, cut)
    if rule.dynamic and span.k_start > 0:
        raise UnsupportedModelError(
            f"{binding.path}: {rule.kind} must see all keys to choose, but the model's sliding-window cache has dropped some. Prefill in "
            "one call, and give this layer static rules, or rules that leave decoding dense."
        )
    tiles = _dynamic_tiles(rule, q * scale, k, grid, binding, *place) if rule.dynamic else _static_tiles(rule, grid)
    if isinstance(rule, DenseSource):
        return _attend_dense(q, k, v, span, scale, cut)
    if cut is not None:
        return _attend_strips(q, k, v, tiles, span, scale, cut)
    return attend_tiles(q, k, v, tiles, grid, scale=scale, backend=binding.backend)


def attend_static(
    rules: Sequence[Rule],
    q: Float[Tensor, "b h s D"],
    all_k: Float[Tensor, "b G s D"],
    all_v: Float[Tensor, "b G s D"],
    kv_heads: list[int],
    grid: BlockGrid,
    scale: float,
) -> Float[Tensor, "b h s D"]:
    """Heads of static rules that only drop tiles, on whole sequences, in one masked call; `rules` and `kv_heads` are those of q's heads."""
    tiles = torch.stack([_static_tiles(rule, grid) for rule in rules])
    return tile_attention_masked(q, pick_heads(all_k, kv_heads), pick_heads(all_v, kv_heads), tiles, grid, scale=scale)


def _dynamic_tiles(
    rule: Rule,
    q: Float[Tensor, "b h s D"],
    k: Float[Tensor, "b h t D"],
    grid: BlockGrid,
    binding: LayerBinding,
    sequence: int,
    heads: tuple[int, ...],
) -> Bool[Tensor, "b h M N"]:
    """The rule's own choice, left behind for whoever reuses it; or what an earlier layer left."""
    if isinstance(rule, Reuse):
        return rule.select(
            grid, q, k, left=binding.taken(sequence, grid, heads).to(q.device)
        )  # layers may lie on several devices
    tiles = rule.select(grid, q, k)
    if binding.leaves is not None:
        whole = tiles.expand(*q.shape[:2], *tiles.shape[-2:])  # one for all heads where everything is chosen
        binding.leaves.leave(sequence, grid, heads, rule.left_behind(whole, grid, q, k))
    return tiles


@lru_cache(maxsize=32)
def _static_tiles(rule: Rule, grid: BlockGrid) -> Bool[Tensor, "M N"]:
    """Layers of one call mostly share their static choices."""
    with torch.inference_mode(False):  # kept for later calls, which may need gradients
        return rule.select(grid)


@lru_cache(maxsize=32)
def _decoding_keys(rule: Rule, grid: BlockGrid) -> Int[Tensor, " keys"]:
    """Keys that the only query of a call sees."""
    with torch.inference_mode(False):
        return expand(_static_tiles(rule, grid), grid)[0].nonzero()[:, 0]


def _attend_dense(q: Tensor, k: Tensor, v: Tensor, span: Span, scale: float, cut: int | None) -> Tensor:
    grid = span.grid
    if cut is None and grid.q_len in (1, grid.kv_len):
        return F.scaled_dot_product_attention(q, k, v, is_causal=grid.q_len > 1, scale=scale)
    return _attend_strips(q, k, v, None, span, scale, cut)


def _attend_strips(
    q: Float[Tensor, "b h s D"],
    k: Float[Tensor, "b h t D"],
    v: Float[Tensor, "b h t D"],
    tiles: Tensor | None,
    span: Span,
    scale: float,
    cut: int | None,
) -> Float[Tensor, "b h s D"]:
    """Masked SDPA strip by strip, each with only the keys it can reach: for element masks that tiles cannot express.

    Those are the model's own sliding window (`cut` nearest keys), and dense heads in a chunk that continues a prompt.
    """
    grid, parts = span.grid, []
    for start in range(0, grid.q_len, _STRIP_TOKENS):
        queries = q[:, :, start : start + _STRIP_TOKENS]
        first, end = grid.q_start + start, grid.q_start + start + queries.shape[2]
        low = max(span.k_start, 0 if cut is None else first - cut + 1)
        q_pos, k_pos = torch.arange(first, end)[:, None], torch.arange(low, end)
        mask = k_pos <= q_pos
        if cut is not None:
            mask = mask & (k_pos > q_pos - cut)
        if tiles is not None:
            block = grid.block_tokens
            mask = mask & tiles.cpu()[..., q_pos // block - grid.first_q_block, k_pos // block]
        keys = slice(low - span.k_start, end - span.k_start)
        parts.append(
            F.scaled_dot_product_attention(
                queries, k[:, :, keys], v[:, :, keys], attn_mask=mask.to(q.device), scale=scale
            )
        )
    return torch.cat(parts, 2)
