"""The tile schedule of a dynamic rule, built on the device without waiting for the host.

Everything whose size depends on the choice has its largest size instead: a tile's list starts where the dense list would. Lists are
filled by one kernel; order and dealing are a few operations on vectors of tiles, the same each time, so a CUDA graph may hold them.

Dealing: tiles sorted by length go to the workers boustrophedon, round after round, while that cannot overfill anyone; the rest, light by
then, are laid end to end and cut where each worker's share ends. (The exact greedy of `schedule.deal` is a loop over tiles.)
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Int
from torch import Tensor

from sparsesearch.errors import SpecError
from sparsesearch.kernels.schedule import (
    ENTRY_SHIFT,
    TILE_OVERHEAD,
    HeadTiles,
    Span,
    TileSchedule,
    TileShape,
    Workers,
    build_schedule,
)

SHIFT = tl.constexpr(ENTRY_SHIFT)
NOTHING = 0b111  # key block 0, partial, both halves absent: a tile without keys computes one masked block and gives 0


@triton.jit
def list_entries(
    mask, entries, counts, first_entry, num_q_blocks, num_k_blocks, num_tiles, q_start, kv_len, first_q_block,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write the list of one tile of one head. Grid: (tiles of the sequence, heads)."""
    head = tl.program_id(1)
    absolute = q_start // ROWS + tl.program_id(0)
    tile = head * num_tiles + tl.program_id(0)
    q_first = tl.maximum(absolute * ROWS, q_start)
    lo = tl.load(first_entry + tile)
    count = 0
    num_keys = (kv_len + KEYS - 1) // KEYS
    if CAUSAL:
        num_keys = tl.minimum(num_keys, (absolute * ROWS + ROWS + KEYS - 1) // KEYS)
    upper_block = absolute * ROWS // BLOCK - first_q_block
    lower_block = (absolute * ROWS + ROWS // 2) // BLOCK - first_q_block
    rows_of_head = mask + head.to(tl.int64) * num_q_blocks * num_k_blocks
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
        tl.store(entries + lo, 7)
    tl.store(counts + tile, tl.maximum(count, 1))


@dataclass(frozen=True)
class _Frame:
    """What does not depend on the choice: records of all tiles with the dense lists' starts."""

    records: Int[Tensor, "T 12"]
    first_tile: tuple[int, ...]
    num_entries: int
    dense_blocks: int
    covered_rows: int


def build_on_device(
    spans: tuple[Span, ...],
    choices: list[Bool[Tensor, "H M N"]],
    *,
    shape: TileShape,
    workers: Workers,
) -> TileSchedule:
    """Lists and order of tiles for choices that lie on the device; the host waits for nothing.

    `num_blocks`, `covered_rows` and `makespan` of the result are those of dense attention and an even deal, since the truth stays on the
    device; no tile is cut.

    Args:
        spans: the sequences of the batch.
        choices: per sequence, the tiles of each query head; contiguous, on one device.
        shape: tile of the kernel that will run it, as for `schedule.build_schedule`.
        workers: what it runs on.

    Raises:
        SpecError: the tile does not fit the plan's blocks, or the choices do not fit the sequences.
    """
    num_heads, device = choices[0].shape[0], choices[0].device
    frame = _frame(spans, num_heads, shape, str(device))
    entries = torch.empty(frame.num_entries, dtype=torch.int32, device=device)
    counts = torch.empty(len(frame.records), dtype=torch.int32, device=device)
    first_entry = frame.records[:, 8].contiguous()
    for span, choice, first in zip(spans, choices, frame.first_tile, strict=True):
        grid = span.grid
        if choice.shape != (num_heads, grid.num_q_blocks, grid.num_k_blocks):
            raise SpecError(
                f"a choice must be [{num_heads}, {grid.num_q_blocks}, {grid.num_k_blocks}], but is {tuple(choice.shape)}."
            )
        num_tiles = -(-grid.kv_len // shape.rows) - grid.q_start // shape.rows
        list_entries[(num_tiles, num_heads)](
            choice.contiguous().view(torch.uint8), entries, counts[first:], first_entry[first:], grid.num_q_blocks,
            grid.num_k_blocks, num_tiles, grid.q_start, grid.kv_len, grid.first_q_block,
            BLOCK=grid.block_tokens, ROWS=shape.rows, KEYS=shape.keys, CAUSAL=grid.causal,
            CHUNK=min(1024, triton.next_power_of_2(-(-grid.kv_len // shape.keys))), num_warps=4,
        )  # fmt: skip
    order, bin_ptr = deal_on_device(counts, workers.count)
    records = frame.records.clone()
    records[:, 9] = records[:, 8] + counts
    return TileSchedule(
        tiles=records[order],
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


def deal_on_device(counts: Int[Tensor, " T"], workers: int) -> tuple[Int[Tensor, " T"], Int[Tensor, " P1"]]:
    """Order of the tiles, grouped by worker and longest first, and where each worker's start; see the module."""
    device, num_tiles = counts.device, counts.numel()
    cost, order = torch.sort(counts, descending=True, stable=True)
    cost = cost.float() + TILE_OVERHEAD
    rank = torch.arange(num_tiles, device=device)
    turn, seat = rank // workers, rank % workers
    snake = torch.where(turn % 2 == 0, seat, workers - 1 - seat)
    level = cost.sum() / workers
    full_rounds = (cost[::workers].cumsum(0) <= level).sum()
    heavy = turn < full_rounds
    load = torch.zeros(workers, device=device).scatter_add_(0, snake, cost * heavy)
    room = (level - load).clamp(min=0).cumsum(0)
    light = cost * ~heavy
    middle = light.cumsum(0) - light / 2
    share = room * (light.sum() / room[-1].clamp(min=1e-6))
    owner = torch.where(heavy, snake, torch.searchsorted(share, middle).clamp(max=workers - 1))
    by_worker = torch.sort(owner, stable=True).indices
    tiles_of = torch.zeros(workers + 1, dtype=torch.int32, device=device)
    tiles_of.scatter_add_(0, owner + 1, torch.ones_like(owner, dtype=torch.int32))
    return order[by_worker], tiles_of.cumsum(0, dtype=torch.int32)


@lru_cache(maxsize=64)
def _frame(spans: tuple[Span, ...], num_heads: int, shape: TileShape, device: str) -> _Frame:
    records, first_tile, base, tiles, dense, covered = [], [], 0, 0, 0, 0
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
        tiles += block.shape[0] * block.shape[1]
        dense += one.dense_blocks * num_heads
        covered += one.covered_rows * num_heads
        records.append(block.flatten(0, 1))
    stacked = torch.cat(records).int().to(device)
    return _Frame(stacked, tuple(first_tile), base, dense, covered)
