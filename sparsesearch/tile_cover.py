"""From formulas over frames, rows and columns to tiles.

A tile is computed iff the formula keeps some pair of its tokens, so whatever the sizes, a rule never computes less than its formula. A block's
tokens are first written as a few boxes (1 for a whole tile of tokens, 2 or 3 for a piece of rows); pairs of boxes are then decided axis by
axis, exactly, for formulas that are a conjunction over the axes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy import ndarray
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.errors import SpecError
from sparsesearch.layout import Layout
from sparsesearch.order import Order

Ints: TypeAlias = ndarray[Any, np.dtype[np.int64]]

_PAIRS_PER_STEP = 1 << 25


def layout_of(grid: BlockGrid, rule: str) -> Layout:
    """The grid's layout.

    Raises:
        SpecError: it has none.
    """
    if grid.layout is None:
        raise SpecError(
            f"{rule} needs to know frames and text: BlockGrid must be given layout=..., but has none. "
            "Diffusers pipelines learn it from a forward pass; elsewhere make it with `layout.video_layout`."
        )
    return grid.layout


def complete(tiles: Bool[Tensor, "*unit M N"], grid: BlockGrid, order: Order) -> Bool[Tensor, "*unit M N"]:
    """A geometric choice plus what is always computed: tiles that the layout's policy makes dense, and the diagonal."""
    always = dense_pairs(grid, order) | grid.diagonal()
    return grid.reachable(tiles.device) & (tiles | always.to(tiles.device))


@lru_cache(maxsize=64)
def dense_pairs(grid: BlockGrid, order: Order) -> Bool[Tensor, "M N"]:
    """Tiles that hold a pair of tokens whose segments the policy makes dense; shared, so not to be changed in place."""
    layout = layout_of(grid, "the text policy")
    present = segments_in_blocks(layout, order, grid.block_tokens).float()
    kinds = [segment.kind for segment in layout.segments]
    dense = torch.tensor([[float(layout.pair_policy(row, column) == "dense") for column in kinds] for row in kinds])
    return (present[grid.first_q_block :] @ dense @ present.T) > 0


@lru_cache(maxsize=64)
def segments_in_blocks(layout: Layout, order: Order, block_tokens: int) -> Bool[Tensor, "N segments"]:
    """Which segments each block holds tokens of."""
    segment = layout.segment_of_token()[order.permutation(layout)]
    block = torch.arange(layout.num_tokens) // block_tokens
    present = torch.zeros(int(block[-1]) + 1, len(layout.segments), dtype=torch.bool)
    present[block, segment] = True
    return present


def path_interval(grid: BlockGrid, order: Order) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
    """First and last place, along the order's path through the grid segment, that each block holds; last < first if it holds none."""
    layout = layout_of(grid, "a band")
    start = layout.grid_start if order.is_identity else 0
    tokens = layout.segments[layout.grid_index].tokens
    first = grid.k_blocks()[0] * grid.block_tokens - start
    return first.clamp(min=0), (first + grid.block_tokens - 1).clamp(max=tokens - 1)


def cover(
    grid: BlockGrid, order: Order, allowed: Sequence[Bool[Tensor, "L L"]], *, units: tuple[int, int, int] | None = None
) -> Bool[Tensor, "M N"]:
    """Tiles that hold a pair (q, k) of grid tokens with allowed[a][q_a, k_a] on every axis a.

    Args:
        grid: with a layout.
        order: over which the blocks are counted.
        allowed: one mask per axis: frames, rows, columns; or two, see `boxes_of`.
        units: as in `boxes_of`.
    """
    boxes = boxes_of(layout_of(grid, "a rule with a geometry"), order, grid.block_tokens, units)
    tables = [_interval_table(boxes.lo[:, a], boxes.hi[:, a], mask.numpy()) for a, mask in enumerate(allowed)]

    def pairs(rows: slice) -> Any:
        kept = np.ones((rows.stop - rows.start, len(boxes.block)), bool)
        for ids, table in tables:
            kept &= table[ids[rows]][:, ids]
        return kept

    return tiles_of_pairs(grid, boxes, pairs)


@dataclass(frozen=True)
class Boxes:
    """The grid tokens of each block as boxes: first and last coordinate per axis."""

    block: Ints
    lo: Ints
    hi: Ints


def tiles_of_pairs(grid: BlockGrid, boxes: Boxes, pairs: Callable[[slice], Any]) -> Bool[Tensor, "M N"]:
    """Tiles with a kept pair of boxes; `pairs(rows)` decides the boxes `rows` of the queries against all boxes of the keys."""
    starts = np.flatnonzero(np.diff(boxes.block, prepend=-1))
    owners, bounds = boxes.block[starts], [*starts, len(boxes.block)]
    out = np.zeros((grid.num_k_blocks, grid.num_k_blocks), bool)
    step = max(1, _PAIRS_PER_STEP * len(owners) // max(len(boxes.block) ** 2, 1))
    for first in range(0, len(owners), step):
        last = min(first + step, len(owners))
        kept = pairs(slice(int(bounds[first]), int(bounds[last])))
        by_key = np.logical_or.reduceat(kept, starts, axis=1)
        out[owners[first:last, None], owners] = np.logical_or.reduceat(
            by_key, starts[first:last] - bounds[first], axis=0
        )
    return torch.from_numpy(out[grid.first_q_block :])


@lru_cache(maxsize=32)
def boxes_of(layout: Layout, order: Order, block_tokens: int, units: tuple[int, int, int] | None = None) -> Boxes:
    """Cut each block's grid tokens into boxes.

    The axes are frames, rows and columns. With `units` = (t, h, w) there are two: frame // t, and the running number of the h x w patch of
    the frame that holds the token (with h = w = 1 the position row·width + column).
    """
    cells = layout.coordinates()[order.permutation(layout)].numpy()
    real = cells[:, 0] >= 0
    block = np.flatnonzero(real) // block_tokens
    cells = cells[real]
    if units is not None:
        patches = -(-layout.grid_shape[2] // units[2])
        cells = np.stack([cells[:, 0] // units[0], cells[:, 1] // units[1] * patches + cells[:, 2] // units[2]], 1)
    lo, hi = cells, cells
    merged = True
    while merged:
        merged = False
        for axis in reversed(range(cells.shape[1])):
            others = [a for a in range(cells.shape[1]) if a != axis]
            same = (block[1:] == block[:-1]) & (lo[1:, others] == lo[:-1, others]).all(1)
            same &= (hi[1:, others] == hi[:-1, others]).all(1)
            after, before = lo[1:, axis] == hi[:-1, axis] + 1, hi[1:, axis] == lo[:-1, axis] - 1
            equal = (lo[1:, axis] == lo[:-1, axis]) & (hi[1:, axis] == hi[:-1, axis])
            same &= after | before | equal
            if same.any():
                first = np.flatnonzero(np.concatenate([[True], ~same]))
                block = block[first]
                lo, hi = np.minimum.reduceat(lo, first, axis=0), np.maximum.reduceat(hi, first, axis=0)
                merged = True
    return Boxes(block, lo, hi)


def _interval_table(lo: Ints, hi: Ints, allowed: ndarray[Any, np.dtype[np.bool_]]) -> tuple[Ints, Any]:
    """Number the distinct intervals, and decide for each pair of them whether any allowed pair lies inside."""
    intervals, ids = np.unique(np.stack([lo, hi], 1), axis=0, return_inverse=True)
    count = np.zeros((allowed.shape[0] + 1, allowed.shape[1] + 1), np.int64)
    count[1:, 1:] = allowed.cumsum(0).cumsum(1)
    begin, end = intervals[:, 0], intervals[:, 1] + 1
    inside = (
        count[np.ix_(end, end)] - count[np.ix_(begin, end)] - count[np.ix_(end, begin)] + count[np.ix_(begin, begin)]
    )
    return ids.reshape(-1), inside > 0
