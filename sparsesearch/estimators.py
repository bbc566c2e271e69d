"""What dynamic rules look at before they choose: pooled rows, bounds, and attention of a few queries, per tile.

Everything is summed by reshaping, never by scattering, so that a GPU gives the same bits every time; nothing waits for the host, and what
is larger than a score per tile is computed strip by strip.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.errors import SpecError

_STRIP_ELEMENTS = 1 << 27  # fp32 scores held at once: 0.5 GB


def blocked(
    x: Float[Tensor, "*unit S D"], grid: BlockGrid, start: int, fill: float = 0.0
) -> Float[Tensor, "*unit M block D"]:
    """Rows cut into the grid's blocks; row 0 of `x` is position `start`, and `fill` stands where blocks reach beyond the rows."""
    front = start % grid.block_tokens
    back = -(front + x.shape[-2]) % grid.block_tokens
    padded = F.pad(x, (0, 0, front, back), value=fill) if front or back else x
    blocks: Tensor = padded.unflatten(-2, (-1, grid.block_tokens))
    return blocks


def rows_per_block(length: int, grid: BlockGrid, start: int, device: torch.device) -> Int[Tensor, "M 1"]:
    """How many of `length` rows lie in each block, the first row at position `start`."""
    block = grid.block_tokens
    first = torch.arange(start // block, (start + length - 1) // block + 1, device=device)[:, None] * block
    return (first + block).clamp(max=start + length) - first.clamp(min=start)


def block_means(x: Float[Tensor, "*unit S D"], grid: BlockGrid, start: int) -> Float[Tensor, "*unit M D"]:
    """Mean of the rows of `x` in each block of the grid; row 0 of `x` is position `start`. Ragged blocks average what they have."""
    sums = blocked(x, grid, start).sum(-2, dtype=torch.promote_types(x.dtype, torch.float32))
    return sums / rows_per_block(x.shape[-2], grid, start, x.device)


def block_bounds(
    k: Float[Tensor, "*unit T D"], grid: BlockGrid
) -> tuple[Float[Tensor, "*unit N D"], Float[Tensor, "*unit N D"]]:
    """Smallest and largest value of each channel in each key block (Quest's page metadata)."""
    return blocked(k, grid, 0, torch.inf).amin(-2).float(), blocked(k, grid, 0, -torch.inf).amax(-2).float()


def probe_mass(
    q: Float[Tensor, "*unit S D"], k: Float[Tensor, "*unit T D"], grid: BlockGrid, probe: int
) -> Float[Tensor, "*unit m N"]:
    """Attention of the last `probe` queries, summed per tile: row r is the r-th query block that holds some of them.

    Queries carry the softmax scale. The rows sum to the number of probes in them.
    """
    tail = tail_grid(grid, probe)
    q_pos = torch.arange(tail.q_start, tail.kv_len, device=q.device)[:, None]
    hidden = torch.arange(tail.kv_len, device=q.device) > q_pos if grid.causal else None
    parts = []
    for queries, keys in _unit_strips(q[..., -tail.q_len :, :], k, tail.q_len * tail.kv_len):
        scores = (queries @ keys.transpose(-1, -2)).float()
        mass = (scores if hidden is None else scores.masked_fill(hidden, -torch.inf)).softmax(-1)
        whole = F.pad(mass, (0, -tail.kv_len % grid.block_tokens)) if tail.kv_len % grid.block_tokens else mass
        columns = whole.unflatten(-1, (tail.num_k_blocks, grid.block_tokens)).sum(-1)
        parts.append(blocked(columns, grid, tail.q_start).sum(-2))
    return torch.cat(parts).reshape(*q.shape[:-2], tail.num_q_blocks, tail.num_k_blocks)


def tail_grid(grid: BlockGrid, probe: int) -> BlockGrid:
    """The grid of the last `probe` queries of a call, or of all its queries if they are fewer."""
    return BlockGrid(min(probe, grid.q_len), grid.kv_len, grid.block_tokens, grid.law_len, grid.causal)


def diagonal_sums(mass: Float[Tensor, "*unit m N"], tail: BlockGrid) -> Float[Tensor, "*unit N"]:
    """Mass per distance in blocks: d[δ] = Σ_p mass[p, p - δ] over the tail's query blocks p."""
    key_block = tail.q_blocks(mass.device) - tail.k_blocks(mass.device)  # of distance δ, in row p
    shifted = mass.gather(-1, key_block.clamp(min=0).expand(mass.shape))
    return torch.where(key_block >= 0, shifted, 0.0).sum(-2)


def antidiagonal_mass(
    q: Float[Tensor, "*unit S D"], k: Float[Tensor, "*unit T D"], grid: BlockGrid, stride: int
) -> Float[Tensor, "*unit M N"]:
    """Estimated attention per tile from one antidiagonal in each stride x stride patch.

    s[a, b] = (1/stride) Σ_i q[a·stride + stride - 1 - i] · k[b·stride + i]; softmax over the patches b that row a can see; summed over the
    patches of each tile, so that every row of tiles sums to its patches.

    Raises:
        SpecError: `stride` does not divide the tile.
    """
    block = grid.block_tokens
    if block % stride:
        raise SpecError(f"stride must divide the tile of {block} tokens, but is {stride}. Take 4, 8 or 16.")
    cells = block // stride
    q_rows = blocked(q, grid, grid.q_start).unflatten(-2, (cells, stride)).flip(-2).flatten(-4, -3).flatten(-2)
    k_rows = blocked(k, grid, 0).unflatten(-2, (cells, stride)).flatten(-4, -3).flatten(-2)
    first_cell, strips = grid.first_q_block * cells, []
    per_strip = max(1, _STRIP_ELEMENTS // (q.shape[:-2].numel() * k_rows.shape[-2] * cells))
    for low in range(0, grid.num_q_blocks, per_strip):
        high = min(low + per_strip, grid.num_q_blocks)
        seen = (grid.first_q_block + high if grid.causal else grid.num_k_blocks) * cells
        rows = torch.arange(first_cell + low * cells, first_cell + high * cells, device=q.device)[:, None]
        columns = torch.arange(seen, device=q.device)
        hidden = (columns > rows) if grid.causal else (columns * stride >= grid.kv_len)
        scores = (q_rows[..., low * cells : high * cells, :] @ k_rows[..., :seen, :].transpose(-1, -2)).float() / stride
        mass = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        real = (rows * stride < grid.kv_len) & ((rows + 1) * stride > grid.q_start)
        tiles = mass.unflatten(-1, (-1, cells)).sum(-1) * real
        strips.append(F.pad(tiles.unflatten(-2, (-1, cells)).sum(-2), (0, grid.num_k_blocks - seen // cells)))
    return torch.cat(strips, -2)


def tile_row_maxima(
    q: Float[Tensor, "*unit S D"], k: Float[Tensor, "*unit T D"], grid: BlockGrid
) -> Iterator[Float[Tensor, "*unit rows N"]]:
    """Per query block, the largest score of each of its queries in each key block; -inf where it sees none."""
    block, k_pos = grid.block_tokens, torch.arange(grid.kv_len, device=k.device)
    keys = k.transpose(-1, -2)
    for p in range(grid.first_q_block, grid.num_k_blocks):
        first, end = max(p * block, grid.q_start), min((p + 1) * block, grid.kv_len)
        scores = (q[..., first - grid.q_start : end - grid.q_start, :] @ keys).float()
        if grid.causal:
            scores = scores.masked_fill(k_pos > torch.arange(first, end, device=k.device)[:, None], -torch.inf)
        whole = F.pad(scores, (0, -grid.kv_len % block), value=-torch.inf)
        yield whole.unflatten(-1, (grid.num_k_blocks, block)).amax(-1)


def _unit_strips(
    q: Float[Tensor, "*unit S D"], k: Float[Tensor, "*unit T D"], elements: int
) -> Iterator[tuple[Float[Tensor, "u S D"], Float[Tensor, "u T D"]]]:
    """A few units at a time, so that `elements` per unit stay within a strip."""
    queries, keys = q.reshape(-1, *q.shape[-2:]), k.reshape(-1, *k.shape[-2:])
    step = max(1, _STRIP_ELEMENTS // elements)
    for low in range(0, len(queries), step):
        yield queries[low : low + step], keys[low : low + step]
