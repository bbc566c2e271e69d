"""Compact lists of key blocks: which ones each tile of queries computes, shared by all heads and sequences with the same choice."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.errors import SpecError
from sparsesearch.kernels.element_mask import WORD_BITS, ElementMask

if TYPE_CHECKING:
    from sparsesearch.kernels.schedule import HeadTiles, Span, TileShape

Ints: TypeAlias = np.ndarray[Any, np.dtype[np.signedinteger[Any]]]

TILE_FIELDS = (
    "batch",  # row of the batch
    "head",  # query head
    "q_row",  # row of the tile's first query in q; negative when a chunk starts inside the tile
    "row_lo",  # first row of the tile that is a real query
    "row_hi",  # one past the last
    "k_row",  # row of the sequence's first key in k
    "kv_len",  # keys of the sequence
    "q_pos",  # position of the tile's first query in the sequence
    "lo",  # first entry
    "hi",  # one past the last
    "slot",  # where a piece of a cut tile leaves its partial output; -1 for a whole tile
    "spare",
)
ENTRY_SHIFT = 3
"""An entry is key block << 3 | upper half absent << 1 | lower half absent << 2 | partial; an absent half is masked, hence also partial."""


def num_tiles(grid: BlockGrid, shape: "TileShape") -> int:
    """Tiles of queries of one head; a chunk's first may start before it."""
    return -(-grid.kv_len // shape.rows) - grid.q_start // shape.rows


class TileLists:
    """Compact lists of key blocks; heads and sequences with the same choice share them."""

    def __init__(self, shape: "TileShape", elements: Sequence[ElementMask | None]) -> None:
        self.shape = shape
        given = {id(one): one for one in elements if one is not None}
        if len({one.words.shape[1:] for one in given.values()}) > 1:
            raise SpecError("the bitmaps of all sequences must be of one block size.")
        self.words = torch.cat([one.words for one in given.values()]) if given else None
        sizes = [one.words.numel() for one in given.values()]
        self._first_word = dict(zip(given, np.cumsum([0, *sizes]).tolist(), strict=False))
        self._parts: list[Ints] = []
        self._masks: list[Ints] = []
        self._length = 0
        self._known: dict[tuple[BlockGrid, int, int, int], Ints] = {}

    def entries(self) -> Ints:
        """All lists end to end; one dummy entry if there is none, so that kernels may read ahead."""
        return np.concatenate([*self._parts, np.zeros(1, np.int64)])

    def masks(self) -> Ints:
        """Where each entry's bitmaps start, beside `entries`."""
        return np.concatenate([*self._masks, np.full((1, 2), -1, np.int64)])

    def tiles_of(self, span: "Span", choice: "HeadTiles", group: int) -> Ints:
        """Records of one sequence, by KV head, then by query: heads of a group at the same queries side by side, because they share keys."""
        grid, shape = span.grid, self.shape
        count = num_tiles(grid, shape)
        bounds = np.stack([self._bounds(grid, choice, r) for r in range(len(choice.choices))])
        kv_heads = len(choice.of_head) // group
        of_head = np.array(choice.of_head).reshape(kv_heads, 1, group)
        q_pos = (grid.q_start // shape.rows + np.arange(count)) * shape.rows
        q_pos = q_pos[:, None]
        records = np.zeros((kv_heads, count, group, len(TILE_FIELDS)), np.int32)
        records[..., 0] = span.batch
        records[..., 1] = np.arange(len(choice.of_head)).reshape(kv_heads, 1, group)
        records[..., 2] = span.q_offset + q_pos - grid.q_start
        records[..., 3] = np.maximum(grid.q_start - q_pos, 0)
        records[..., 4] = np.minimum(grid.kv_len - q_pos, shape.rows)
        records[..., 5] = span.k_offset
        records[..., 6] = grid.kv_len
        records[..., 7] = q_pos
        records[..., 8:10] = bounds[of_head, np.arange(count)[:, None]]
        records[..., 10] = -1
        return records.reshape(-1, len(TILE_FIELDS))

    def _bounds(self, grid: BlockGrid, choice: "HeadTiles", index: int) -> Ints:
        key = (grid, id(choice.choices), id(choice.elements), index)
        if key not in self._known:
            entries, per_tile = tile_entries(choice.choices[index], grid, self.shape)
            if self.words is not None:
                masks = np.full((len(entries), 2), -1, np.int64)
                if choice.elements is not None:
                    masks = entry_masks(entries, per_tile, choice.elements, index, grid, self.shape)
                    masks = np.where(masks < 0, -1, masks + self._first_word[id(choice.elements)])
                entries = entries | (masks >= 0).any(1)  # a tile with a bitmap is partial
                self._masks.append(masks)
            ends = np.cumsum(per_tile) + self._length
            self._parts.append(entries)
            self._length += len(entries)
            self._known[key] = np.stack([ends - per_tile, ends], 1)
        return self._known[key]


def entry_masks(
    entries: Ints, per_tile: Ints, elements: ElementMask, choice: int, grid: BlockGrid, shape: "TileShape"
) -> Ints:
    """Where the bitmap of each entry's upper and lower half starts in the choice's words, or -1."""
    block, keys = grid.block_tokens, shape.keys
    if elements.words.shape[1] != block or keys % WORD_BITS:
        raise SpecError(
            f"bitmaps must have the plan's block size and tiles a multiple of {WORD_BITS} keys, but got bitmaps of "
            f"{elements.words.shape[1]}, blocks of {block} and tiles of {keys} keys."
        )
    tile = grid.q_start // shape.rows + np.repeat(np.arange(len(per_tile)), per_tile)
    first = tile[:, None] * shape.rows + np.array([0, shape.rows // 2])  # first query of each half
    key = (entries >> ENTRY_SHIFT) * keys
    inner = (first % block) * (block // WORD_BITS) + (key % block // WORD_BITS)[:, None]
    return elements.offsets(choice, grid, first // block - grid.first_q_block, (key // block)[:, None], inner)


def tile_entries(mask: Bool[Tensor, "M N"], grid: BlockGrid, shape: "TileShape") -> tuple[Ints, Ints]:
    """Entries of one choice of blocks, tile by tile, keys ascending; and how many each tile has."""
    block, rows, keys = grid.block_tokens, shape.rows, shape.keys
    pairs = rows // block if rows > block else 1
    if block % keys or (block % rows if pairs == 1 else rows % block or pairs > 2):
        raise SpecError(
            f"a kernel tile of {rows} x {keys} cannot run blocks of {block} tokens: rows must be twice the block or divide it, "
            "keys must divide it. Profile in blocks of 64 or 128 tokens (--block-tokens)."
        )
    bits = (mask & grid.reachable()).numpy()
    halves = (
        np.arange(grid.q_start // rows * 2, -(-grid.kv_len // rows) * 2) * rows // 2
    )  # first query of each half tile
    source = halves // block - grid.first_q_block
    real = (source >= 0) & (source < bits.shape[0])
    columns = np.arange(-(-grid.kv_len // keys)) * keys // block

    def half(index: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        chosen: np.ndarray[Any, np.dtype[np.bool_]] = bits[np.where(real, source, 0)[index::2]] & real[index::2, None]
        return chosen if keys == block else chosen[:, columns]

    upper, lower = half(0), half(1)
    place = np.flatnonzero(upper | lower)
    tile, key = np.divmod(place, len(columns))
    absent = np.stack([~upper.ravel()[place], ~lower.ravel()[place]], 1)
    q_first = np.maximum((grid.q_start // rows + tile) * rows, grid.q_start)
    past = key * keys + keys
    partial = (past > grid.kv_len) | absent.any(1)
    if grid.causal:
        reached = key * keys < (grid.q_start // rows + tile + 1) * rows
        tile, key, absent, q_first, past, partial = (a[reached] for a in (tile, key, absent, q_first, past, partial))
        partial = partial | (past - 1 > q_first)
    entries = key << ENTRY_SHIFT | absent[:, 1].astype(np.int64) << 2 | absent[:, 0].astype(np.int64) << 1 | partial
    return entries, np.bincount(tile, minlength=num_tiles(grid, shape))
