"""Exact masks inside chosen tiles: windows that end between block borders, single columns, segments, any bitmap.

A rule decides on whole tiles; where the truth is finer, a chosen tile may carry a bitmap. Equal bitmaps are stored once: all tiles on the
edge of a window share two or three, whatever the sequence's length.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.errors import SpecError

if TYPE_CHECKING:
    from sparsesearch.kernels.schedule import Ints

WORD_BITS = 32


@dataclass(frozen=True)
class ElementMask:
    """Bitmaps of some tiles of R choices; tiles without one are computed whole.

    Causality and the sequence's end are cut by the kernels and need no bitmap.

    Attributes:
        at: (choice, query block, key block) of each tile that has a bitmap; query blocks are counted from the call's first.
        which: its bitmap.
        words: U distinct bitmaps; bit j % 32 of words[u, i, j // 32] says that the block's query i may see its key j.
    """

    at: Int[Tensor, "K 3"]
    which: Int[Tensor, " K"]
    words: Int[Tensor, "U B W"]

    def __post_init__(self) -> None:
        block, width = self.words.shape[1:]
        if block % WORD_BITS or width * WORD_BITS != block or self.words.dtype != torch.int32:
            raise SpecError(
                f"bitmaps must be int32 [U, B, B / 32] with B a multiple of 32, but are {self.words.dtype} {tuple(self.words.shape)}."
            )

    def offsets(self, choice: int, grid: BlockGrid, rows: "Ints", columns: "Ints", inner: "Ints") -> "Ints":
        """First word of each asked tile's bitmap, moved by `inner` words; -1 where it has none.

        Args:
            choice: which of the R choices.
            grid: the grid they were made for.
            rows: query blocks.
            columns: key blocks.
            inner: words between the bitmap's start and the part that is asked for.
        """
        mine = (self.at[:, 0] == choice).numpy()
        codes = (self.at[:, 1] * grid.num_k_blocks + self.at[:, 2]).numpy()[mine]
        order = np.argsort(codes)
        codes, which = codes[order], self.which.numpy()[mine][order]
        asked = rows * grid.num_k_blocks + columns
        if len(codes) == 0:
            return np.full_like(asked, -1)
        place = np.minimum(np.searchsorted(codes, asked), len(codes) - 1)
        block, width = self.words.shape[1:]
        return np.where(codes[place] == asked, which[place] * block * width + inner, -1)

    def expand(self, num_choices: int, grid: BlockGrid) -> Bool[Tensor, "R S T"]:
        """Element by element, for the oracle: True wherever no bitmap forbids."""
        block = grid.block_tokens
        shape = (num_choices, grid.num_q_blocks, grid.num_k_blocks, block, block)
        full = torch.ones(shape, dtype=torch.bool)
        full[self.at[:, 0], self.at[:, 1], self.at[:, 2]] = _unpack(self.words)[self.which]
        flat = full.permute(0, 1, 3, 2, 4).reshape(num_choices, grid.num_q_blocks * block, -1)
        skipped = grid.q_start - grid.first_q_block * block
        return flat[:, skipped : skipped + grid.q_len, : grid.kv_len]


def tiles_of_mask(mask: Bool[Tensor, "R S T"], grid: BlockGrid) -> tuple[Bool[Tensor, "R M N"], ElementMask]:
    """Any mask of elements as tiles and bitmaps; for masks that are small enough to write out.

    Args:
        mask: what each query may see; causality is the grid's own and need not be in it.
        grid: the call.

    Raises:
        SpecError: the mask's shape is not the call's.
    """
    if mask.shape[1:] != (grid.q_len, grid.kv_len):
        raise SpecError(f"a mask must be [R, {grid.q_len}, {grid.kv_len}], but is {tuple(mask.shape)}.")
    block = grid.block_tokens
    skipped = grid.q_start - grid.first_q_block * block
    below = grid.num_q_blocks * block - skipped - grid.q_len
    right = grid.num_k_blocks * block - grid.kv_len

    def blocks(x: Tensor, *, fill: bool) -> Tensor:
        whole = F.pad(x.to(torch.uint8), (0, right, skipped, below), value=int(fill)).bool()
        tiles: Tensor = whole.unflatten(-1, (-1, block)).unflatten(-3, (-1, block)).transpose(-2, -3)
        return tiles

    seen = torch.ones(grid.q_len, grid.kv_len, dtype=torch.bool)
    if grid.causal:
        seen = seen.tril(grid.q_start)
    allowed = blocks(mask & seen, fill=False)
    chosen = allowed.any(-1).any(-1)
    bitmap = blocks(mask, fill=True)
    hidden = blocks(~seen, fill=True)
    at = (chosen & ~(bitmap | hidden).all(-1).all(-1)).nonzero()
    words, which = _pack(bitmap[at[:, 0], at[:, 1], at[:, 2]] if len(at) else bitmap[:0, 0, 0]).unique(
        dim=0, return_inverse=True
    )
    return chosen, ElementMask(at, which.reshape(-1), words)


def window_tiles(grid: BlockGrid, *, sink: int, window: int) -> tuple[Bool[Tensor, "1 M N"], ElementMask]:
    """The first `sink` keys and the last `window` ones, exact to the token, as in sliding-window models.

    Query i sees key j if j < sink or i - j < window. Only the tiles on the two edges carry bitmaps.

    Raises:
        SpecError: the mask is not causal, or a number is negative.
    """
    if not grid.causal or sink < 0 or window < 1:
        raise SpecError(
            f"a causal grid, sink >= 0 and window >= 1 must hold, but got {grid}, sink={sink}, window={window}."
        )
    block = grid.block_tokens
    row, column = grid.q_blocks(), grid.k_blocks()
    gap = (row - column) * block  # i - j lies between gap - block + 1 and gap + block - 1
    near, all_near = gap - block + 1 < window, gap + block - 1 < window
    early, all_early = column * block < sink, (column + 1) * block <= sink
    chosen = (near | early) & grid.reachable()
    rows, columns = (chosen & ~all_near & ~all_early).nonzero(as_tuple=True)
    # what decides a bitmap: the gap, if the window's edge is inside; and where the sink ends in the tile
    gaps = (rows + grid.first_q_block - columns) * block
    gaps = gaps.clamp(max=window + 2 * block)
    sinks = (sink - columns * block).clamp(0, block)
    kinds, which = torch.stack([gaps, sinks], 1).unique(dim=0, return_inverse=True)
    i, j = torch.arange(block)[:, None], torch.arange(block)[None, :]
    bits = (kinds[:, 0, None, None] + i - j < window) | (j < kinds[:, 1, None, None])
    at = torch.stack([torch.zeros_like(rows), rows, columns], 1)
    return chosen[None], ElementMask(at, which.reshape(-1), _pack(bits))


def _pack(bits: Bool[Tensor, "U B B"]) -> Int[Tensor, "U B W"]:
    columns = bits.unflatten(-1, (-1, WORD_BITS)).long() << torch.arange(WORD_BITS)
    words: Tensor = columns.sum(-1).to(torch.int32)  # two's complement keeps the top bit
    return words


def _unpack(words: Int[Tensor, "U B W"]) -> Bool[Tensor, "U B B"]:
    return ((words[..., None] >> torch.arange(WORD_BITS, dtype=torch.int32)) & 1).bool().flatten(-2)
