"""The tile schedule of a dynamic rule, built on the device without waiting for the host.

Everything whose size depends on the choice has its largest size instead: a tile's list starts where the dense list would. One kernel
fills the lists, one deals the tiles (`device_deal`), and one copies their records; a CUDA graph may hold them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Int
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.errors import SpecError
from sparsesearch.kernels.device_deal import deal_on_device
from sparsesearch.kernels.schedule import (
    HeadTiles,
    Span,
    TileSchedule,
    TileShape,
    Workers,
    build_schedule,
)
from sparsesearch.kernels.tile_lists import ENTRY_SHIFT, TILE_FIELDS

SHIFT = tl.constexpr(ENTRY_SHIFT)
FIELDS = tl.constexpr(len(TILE_FIELDS))
NOTHING = tl.constexpr(
    0b111
)  # key block 0, partial, both halves absent: a tile without keys computes one masked block and gives 0


@triton.jit
def list_entries(
    bank, chosen, row_of_head, entries, records, filled, counts, places, histogram, num_q_blocks, num_k_blocks, num_tiles, q_start, kv_len,
    first_q_block,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write the list of one tile of one head. Grid: (tiles of the sequence, heads)."""
    head = tl.program_id(1)
    absolute = q_start // ROWS + tl.program_id(0)
    tile = head * num_tiles + tl.program_id(0)
    q_first = tl.maximum(absolute * ROWS, q_start)
    fields = tl.arange(0, 16)
    record = tl.load(records + tile * FIELDS + fields, mask=fields < FIELDS, other=0)
    lo = tl.load(records + tile * FIELDS + 8)
    count = 0
    num_keys = (kv_len + KEYS - 1) // KEYS
    if CAUSAL:
        num_keys = tl.minimum(num_keys, (absolute * ROWS + ROWS + KEYS - 1) // KEYS)
    upper_block = absolute * ROWS // BLOCK - first_q_block
    lower_block = (absolute * ROWS + ROWS // 2) // BLOCK - first_q_block
    row = tl.load(row_of_head + head).to(tl.int64)
    if row >= 0:
        rows_of_head = bank + row * num_q_blocks * num_k_blocks
    else:
        rows_of_head = chosen + (-1 - row) * num_q_blocks * num_k_blocks
    for start in range(0, num_keys, CHUNK):
        key = start + tl.arange(0, CHUNK)
        column = key * KEYS // BLOCK
        inside = (key < num_keys) & (column < num_k_blocks)
        upper_row = tl.full([CHUNK], 0, tl.int32) + upper_block
        lower_row = tl.full([CHUNK], 0, tl.int32) + lower_block
        upper_real = inside & (upper_row >= 0)
        lower_real = inside & (lower_row >= 0) & (lower_row < num_q_blocks)
        upper = tl.load(rows_of_head + upper_row * num_k_blocks + column, mask=upper_real, other=0)
        lower = tl.load(rows_of_head + lower_row * num_k_blocks + column, mask=lower_real, other=0)
        upper = (upper != 0).to(tl.int32)
        lower = (lower != 0).to(tl.int32)
        present = upper | lower
        partial = ((key * KEYS + KEYS > kv_len) | (upper == 0) | (lower == 0)).to(tl.int32)
        if CAUSAL:
            partial = partial | (key * KEYS + KEYS - 1 > q_first).to(tl.int32)
        entry = (key << SHIFT) | ((1 - lower) << 2) | ((1 - upper) << 1) | partial
        at = lo + count + tl.cumsum(present, 0) - 1
        tl.store(entries + at, entry, mask=present != 0)
        count += tl.sum(present, 0)
    if count == 0:
        tl.store(entries + lo, NOTHING)
    count = tl.maximum(count, 1)
    tl.store(filled + tile * FIELDS + fields, tl.where(fields == 9, lo + count, record), mask=fields < FIELDS)
    tl.store(counts + tile, count)
    tl.store(places + tile, tl.atomic_add(histogram + count, 1))


@dataclass(frozen=True)
class BankedTiles:
    """The tiles of every query head of one sequence, on a device: heads with one static rule share a row.

    Attributes:
        bank: choices that last.
        chosen: choices of this call.
        row_of_head: int32; a row of `bank` where it is not negative, else row -1 - row_of_head of `chosen`.
    """

    bank: Bool[Tensor, "r M N"]
    chosen: Bool[Tensor, "n M N"]
    row_of_head: Int[Tensor, " H"]

    @classmethod
    def of(cls, tiles: Bool[Tensor, "H M N"]) -> "BankedTiles":
        """A choice of its own for every head."""
        return cls(tiles[:0], tiles, _own_rows(len(tiles), str(tiles.device)))

    def per_head(self) -> Bool[Tensor, "H M N"]:
        """The tiles of each head, copied."""
        joined = torch.cat([self.bank, self.chosen])
        rows = self.row_of_head.long()
        return joined[torch.where(rows < 0, len(self.bank) - 1 - rows, rows)]

    def num_tiles(self) -> Int[Tensor, ""]:
        """How many tiles are chosen, over all heads."""
        counts = torch.cat([self.bank.sum((1, 2)), self.chosen.sum((1, 2))])
        rows = self.row_of_head.long()
        return counts[torch.where(rows < 0, len(self.bank) - 1 - rows, rows)].sum()


@lru_cache(maxsize=64)
def _own_rows(num_heads: int, device: str) -> Int[Tensor, " H"]:
    with torch.inference_mode(False):
        return torch.arange(-1, -1 - num_heads, -1, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class _Frame:
    """What does not depend on the choice: records of all tiles with the dense lists' starts."""

    records: Int[Tensor, "T 12"]
    first_tile: tuple[int, ...]
    num_entries: int
    longest: int
    dense_blocks: int
    covered_rows: int


def build_on_device(
    spans: tuple[Span, ...],
    choices: Sequence[BankedTiles | Bool[Tensor, "H M N"]],
    *,
    shape: TileShape,
    workers: Workers,
) -> TileSchedule:
    """Lists and order of tiles for choices that lie on the device; the host waits for nothing.

    `num_blocks`, `covered_rows` and `makespan` of the result are those of dense attention and an even deal, since the truth stays on the
    device; no tile is cut.

    Args:
        spans: the sequences of the batch.
        choices: per sequence, the tiles of each query head, on one device.
        shape: tile of the kernel that will run it, as for `schedule.build_schedule`.
        workers: what it runs on.

    Raises:
        SpecError: the tile does not fit the plan's blocks, or the choices do not fit the sequences.
    """
    banked = [choice if isinstance(choice, BankedTiles) else BankedTiles.of(choice) for choice in choices]
    num_heads, device = banked[0].row_of_head.numel(), banked[0].chosen.device
    frame = _frame(spans, num_heads, shape, str(device))
    num_tiles, num_classes = len(frame.records), frame.longest + 1
    filled, counts = torch.empty_like(frame.records), torch.empty(num_tiles, dtype=torch.int32, device=device)
    places = torch.empty_like(counts)
    histogram, light_counts = counts.new_zeros(num_classes + workers.count).split([num_classes, workers.count])
    entries = torch.empty(frame.num_entries, dtype=torch.int32, device=device)
    for span, choice, first in zip(spans, banked, frame.first_tile, strict=True):
        own = tuple(x[first:] for x in (frame.records, filled, counts, places))
        _list(span.grid, choice, num_heads, shape, entries, own, histogram)
    order, bin_ptr = deal_on_device(counts, places, histogram, workers.count, light_counts)
    return TileSchedule(
        tiles=filled.index_select(0, order),
        entries=entries,
        bin_ptr=bin_ptr,
        merges=torch.zeros(0, 7, dtype=torch.int32, device=device),
        shape=shape,
        causal=spans[0].grid.causal,
        num_heads=num_heads,
        num_slots=0,
        num_blocks=frame.dense_blocks,
        dense_blocks=frame.dense_blocks,
        covered_rows=frame.covered_rows,
        makespan=1.0,
    )


def _list(
    grid: BlockGrid,
    choice: BankedTiles,
    num_heads: int,
    shape: TileShape,
    entries: Int[Tensor, " E"],
    tiles: tuple[Tensor, ...],
    histogram: Int[Tensor, " classes"],
) -> None:
    """Fill the lists of one sequence; `tiles` are records, filled records, counts and places from its first tile on."""
    found = (choice.row_of_head.numel(), *choice.chosen.shape[1:])
    if found != (num_heads, grid.num_q_blocks, grid.num_k_blocks):
        raise SpecError(f"a choice must be [{num_heads}, {grid.num_q_blocks}, {grid.num_k_blocks}], but is {found}.")
    tiles_per_head = -(-grid.kv_len // shape.rows) - grid.q_start // shape.rows
    list_entries[(tiles_per_head, num_heads)](
        choice.bank.contiguous().view(torch.uint8), choice.chosen.contiguous().view(torch.uint8), choice.row_of_head, entries,
        *tiles, histogram, grid.num_q_blocks, grid.num_k_blocks, tiles_per_head, grid.q_start, grid.kv_len, grid.first_q_block,
        BLOCK=grid.block_tokens, ROWS=shape.rows, KEYS=shape.keys, CAUSAL=grid.causal,
        CHUNK=min(1024, triton.next_power_of_2(-(-grid.kv_len // shape.keys))), num_warps=1,
    )  # fmt: skip


@lru_cache(maxsize=64)
def _frame(spans: tuple[Span, ...], num_heads: int, shape: TileShape, device: str) -> _Frame:
    records, first_tile, base, tiles, longest, dense, covered = [], [], 0, 0, 0, 0, 0
    for span in spans:
        choice = HeadTiles(span.grid.reachable()[None], (0,))
        one = build_schedule((span,), [choice], num_kv_heads=1, shape=shape, workers=Workers(1, 1e18))
        lists = one.tiles[one.tiles[:, 7].argsort()].long()
        heads = torch.arange(num_heads)[:, None]
        capacity = int(lists[:, 9].max())
        block = lists.repeat(num_heads, 1, 1)
        block[..., 1] = heads
        block[..., 8] += base + heads * capacity
        base += num_heads * capacity
        first_tile.append(tiles)
        longest = max(longest, int((lists[:, 9] - lists[:, 8]).max()))
        tiles += block.shape[0] * block.shape[1]
        dense += one.dense_blocks * num_heads
        covered += one.covered_rows * num_heads
        records.append(block.flatten(0, 1))
    stacked = torch.cat(records).int().to(device)
    return _Frame(stacked, tuple(first_tile), base, longest, dense, covered)
