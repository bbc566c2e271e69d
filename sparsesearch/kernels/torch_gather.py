"""Tile attention in plain PyTorch: gather the chosen key blocks, then batched SDPA. The CPU's fast path.

A masked SDPA is always slower than a dense one, because it visits every key. So the rows (unit, query block) are grouped by their number of
tiles, the tiles' keys are gathered in ascending order, and only the last block of a group may still need an element mask: the causal
triangle of the diagonal tile, or the ragged end of a sequence.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparsesearch.block_mask import BlockGrid, expand

# Gathered keys per step. Small enough to stay in the second-level cache: at 4096 tokens, 8 heads of 32, 14 of 64 tiles per row, two cores,
# steps of 0.5 MB took 127 ms, 2 MB 154 ms, everything at once 188 ms. With gradients each step costs one pass over all keys in backward.
_STEP_ELEMENTS = 1 << 17
_STEP_ELEMENTS_GRAD = 1 << 24


def tile_attention_torch(
    q: Float[Tensor, "*unit S D"],
    k: Float[Tensor, "*unit T D"],
    v: Float[Tensor, "*unit T D"],
    tiles: Bool[Tensor, "*#unit M N"],
    grid: BlockGrid,
    *,
    scale: float,
) -> Float[Tensor, "*unit S D"]:
    """Softmax attention over the chosen tiles; equals `kernels.reference.tile_attention`, in q's precision, and is differentiable.

    A query block without tiles gives 0.
    """
    if tiles.dim() == 2 and grid.num_q_blocks == 1:
        return _one_row(q, k, v, tiles, grid, scale)
    return _gathered(q, k, v, tiles, grid, scale, _sdpa)[0]


def tile_attention_masked(
    q: Float[Tensor, "*unit S D"],
    k: Float[Tensor, "*unit T D"],
    v: Float[Tensor, "*unit T D"],
    tiles: Bool[Tensor, "*#unit M N"],
    grid: BlockGrid,
    *,
    scale: float,
) -> Float[Tensor, "*unit S D"]:
    """The same by one SDPA under an element mask: all of dense's work, in one launch each way.

    For gradients on a GPU, where the row groups of `tile_attention_torch` are thousands of small launches per layer.
    """
    mask = expand(tiles.to(q.device), grid)
    empty = ~mask.any(-1, keepdim=True)  # SDPA makes NaN of a row without keys
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | empty, scale=scale)
    return out.masked_fill(empty, 0.0)


def tile_state_torch(
    q: Float[Tensor, "*unit S D"],
    k: Float[Tensor, "*unit T D"],
    v: Float[Tensor, "*unit T D"],
    tiles: Bool[Tensor, "*#unit M N"],
    grid: BlockGrid,
    *,
    scale: float,
) -> tuple[Float[Tensor, "*unit S D"], Float[Tensor, "*unit S"]]:
    """As `tile_attention_torch`, and the log-sum-exp of the scaled scores, -inf where a query has no key."""
    return _gathered(q, k, v, tiles, grid, scale, _sdpa_state)


def gathered_state(
    q: Float[Tensor, "*unit S D"],
    k: Float[Tensor, "*unit P D"],
    v: Float[Tensor, "*unit P D"],
    tiles: Bool[Tensor, "*#unit M N"],
    grid: BlockGrid,
    bias: Float[Tensor, " P"],
    per_block: int,
    *,
    scale: float,
) -> tuple[Float[Tensor, "*unit S D"], Float[Tensor, "*unit S"]]:
    """Softmax over fewer keys than the grid has: key block j holds the j-th `per_block` of `k`, each with a bias on its scores."""
    return _gathered(q, k, v, tiles, grid, scale, _sdpa_state, per_block, bias)


Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor | None]]


def _gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Tensor,
    grid: BlockGrid,
    scale: float,
    attend: Attend,
    key_block: int | None = None,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp (-inf where `attend` gives none); keys in blocks of `key_block` (with a bias of their own) or of the grid's size."""
    units, block = q.shape[:-2].numel(), grid.block_tokens
    own, front = key_block or block, grid.q_start % block
    q_blocks = _blocks(q, block, front)
    k_blocks, v_blocks = (_blocks(x, own, 0, grid.num_k_blocks).flatten(1) for x in (k, v))
    flat = tiles.cpu().reshape(-1, *tiles.shape[-2:])
    if flat.shape[0] not in (1, units):
        flat = tiles.cpu().expand(*q.shape[:-2], *tiles.shape[-2:]).reshape(units, *tiles.shape[-2:])
    whole_keys = None
    if key_bias is not None:
        padded = F.pad(key_bias, (0, grid.num_k_blocks * own - len(key_bias)), value=-torch.inf)
        whole_keys = padded.view(grid.num_k_blocks, own)
    places, outputs, sums = [], [], []
    step_elements = _STEP_ELEMENTS_GRAD if torch.is_grad_enabled() or q.is_cuda else _STEP_ELEMENTS
    for rows, columns, masked in _groups(flat, grid, units, plain=key_bias is not None):
        count = columns.shape[1]
        bias = _last_block_bias(count, grid, q) if masked else None
        step = max(torch.get_num_threads(), step_elements // (count * own * q.shape[-1]))
        for start in range(0, len(rows), step):
            row = rows[start : start + step].to(q.device)
            column = columns[start : start + step].flatten().to(q.device)
            keys = k_blocks.index_select(0, column).view(len(row), count * own, -1)
            values = v_blocks.index_select(0, column).view(len(row), count * own, -1)
            queries = q_blocks.index_select(0, row)
            if whole_keys is not None:
                bias = whole_keys[column % grid.num_k_blocks].view(len(row), 1, count * own).expand(-1, block, -1)
            output, total = attend(queries, keys, values, bias, scale)
            places.append(row)
            outputs.append(output)
            sums.append(total)
    blocks = v.new_zeros(units * grid.num_q_blocks, block, v.shape[-1])
    totals = v.new_full((units * grid.num_q_blocks, block), -torch.inf)
    if places:
        blocks = blocks.index_copy(0, torch.cat(places), torch.cat(outputs))
    found = [total for total in sums if total is not None]
    if found:
        totals = totals.to(found[0].dtype).index_copy(0, torch.cat(places), torch.cat(found))
    here = slice(front, front + grid.q_len)
    out = blocks.view(units, -1, v.shape[-1])[:, here].reshape(*q.shape[:-1], v.shape[-1])
    return out, totals.view(units, -1)[:, here].reshape(q.shape[:-1])


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, None]:
    # a leading batch of 1: SDPA's fused CPU kernel takes four dimensions only
    return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=bias, scale=scale)[0], None


def _sdpa_state(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """With the log-sum-exp, which the public function keeps to itself."""
    if q.device.type == "cpu":
        mask = None if bias is None else bias.to(q.dtype).expand(len(q), -1, -1)[None]
        out, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[None], k[None], v[None], 0.0, False, attn_mask=mask, scale=scale
        )
        return out[0], total[0]
    scores = (q @ k.transpose(-1, -2)).float() * scale
    scores = scores if bias is None else scores + bias
    total = scores.logsumexp(-1)
    return (scores - total[..., None]).exp().to(v.dtype) @ v, total


def _blocks(
    x: Float[Tensor, "*unit S D"], block: int, front: int, count: int | None = None
) -> Float[Tensor, "units_blocks block D"]:
    """Cut each unit's tokens into whole blocks, `count` of them or as many as it takes; zeros fill the ends."""
    back = -(front + x.shape[-2]) % block if count is None else count * block - front - x.shape[-2]
    padded = F.pad(x, (0, 0, front, back)) if front or back else x
    return padded.reshape(-1, block, x.shape[-1])


def _groups(
    tiles: Bool[Tensor, "U_or_1 M N"], grid: BlockGrid, units: int, *, plain: bool = False
) -> list[tuple[Int[Tensor, " rows"], Int[Tensor, "rows count"], bool]]:
    """Rows with equally many tiles: their index, their key blocks (ascending), and whether the last block needs an element mask.

    Indices run over all units: row u·M + p, key block u·N + j.
    """
    owners, num_rows, num_columns = tiles.shape
    counts = tiles.sum(-1).flatten()
    if plain:  # whoever gathers has masks of his own
        masked = torch.zeros_like(counts, dtype=torch.bool)
    elif grid.causal:
        masked = tiles.diagonal(grid.first_q_block, -2, -1).flatten()
    else:
        masked = (tiles[..., -1] & (grid.kv_len % grid.block_tokens != 0)).flatten()
    owner, _, column = tiles.nonzero(as_tuple=True)
    column = owner * num_columns + column
    first = counts.cumsum(0) - counts
    groups = []
    for key in sorted(set((counts * 2 + masked).tolist())):
        count, is_masked = divmod(int(key), 2)
        if count == 0:
            continue
        rows = ((counts == count) & (masked == bool(is_masked))).nonzero()[:, 0]
        columns = column[first[rows, None] + torch.arange(count)]
        if owners == 1 and units > 1:  # one choice for all units
            unit = torch.arange(units)[:, None]
            columns = (columns + unit[:, :, None] * num_columns).flatten(0, 1)
            rows = (rows + unit * num_rows).flatten()
        groups.append((rows, columns, bool(is_masked)))
    return groups


def _last_block_bias(count: int, grid: BlockGrid, like: Tensor) -> Float[Tensor, "block keys"]:
    """0 where a key of the group's gathered blocks is visible, -inf where the last block hides it."""
    block = grid.block_tokens
    bias = like.new_zeros(block, count * block)
    if grid.causal:
        bias[:, -block:] = torch.full((block, block), -torch.inf, dtype=like.dtype, device=like.device).triu(1)
    else:
        bias[:, grid.kv_len % block - block :] = -torch.inf
    return bias


def _one_row(
    q: Float[Tensor, "*unit S D"],
    k: Float[Tensor, "*unit T D"],
    v: Float[Tensor, "*unit T D"],
    tiles: Bool[Tensor, "1 N"],
    grid: BlockGrid,
    scale: float,
) -> Float[Tensor, "*unit S D"]:
    """All queries share one row of tiles (decoding, short chunks): take the visible keys, once for all units."""
    visible = expand(tiles, grid).to(q.device)
    keys = visible.any(0).nonzero()[:, 0]
    if len(keys) == 0:
        return v.new_zeros(*q.shape[:-1], v.shape[-1])
    mask = visible[:, keys]
    bias = None if bool(mask.all()) else torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    return F.scaled_dot_product_attention(q, k[..., keys, :], v[..., keys, :], attn_mask=bias, scale=scale)
