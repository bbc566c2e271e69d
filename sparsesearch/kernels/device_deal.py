"""Tiles of a choice that lies on the device dealt to workers there.

Tiles sorted by length (by counting: lengths are small integers) go to the workers boustrophedon, round after round, while that cannot overfill
anyone; the rest, light by then, are laid end to end and cut where each worker's share ends. (The exact greedy of `deal` is a loop over tiles.)
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

from sparsesearch.kernels.deal import TILE_OVERHEAD

OVERHEAD = tl.constexpr(TILE_OVERHEAD)


@triton.jit
def deal_tiles(
    counts, places, histogram, class_start, sorted_cost, sorted_tile, share, light_counts, order, bin_ptr, num_tiles, num_classes,
    workers, CLASSES: tl.constexpr, WORKERS: tl.constexpr, CHUNK: tl.constexpr, ROUNDS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Sort tiles by length and deal them. Grid: 1, so that barriers order what one step writes and the next one reads."""
    classes = tl.arange(0, CLASSES)
    members = tl.load(histogram + classes, mask=classes < num_classes, other=0)
    tl.store(class_start + classes, num_tiles - tl.cumsum(members, 0), mask=classes < num_classes)
    all_work = tl.sum(members * (classes + OVERHEAD), 0)
    level = all_work / workers
    tl.debug_barrier()
    for start in range(0, num_tiles, CHUNK):
        tile = start + tl.arange(0, CHUNK)
        real = tile < num_tiles
        count = tl.load(counts + tile, mask=real, other=0)
        rank = tl.load(class_start + count, mask=real, other=0) + tl.load(places + tile, mask=real, other=0)
        tl.store(sorted_cost + rank, count, mask=real)
        tl.store(sorted_tile + rank, tile, mask=real)
    tl.debug_barrier()
    rounds = 0
    before = 0.0
    for start in range(0, num_tiles // workers, CHUNK):
        turn = start + tl.arange(0, CHUNK)
        real = turn < num_tiles // workers
        longest = tl.where(real, tl.load(sorted_cost + turn * workers, mask=real, other=0) + OVERHEAD, 0.0)
        rounds += tl.sum((real & (before + tl.cumsum(longest, 0) <= level)).to(tl.int32), 0)
        before += tl.sum(longest, 0)
    seat = tl.arange(0, WORKERS)
    load = tl.zeros([WORKERS], tl.float32)
    for start in range(0, rounds, ROUNDS):
        turn = start + tl.arange(0, ROUNDS)
        place = tl.where(turn[:, None] % 2 == 0, seat[None, :], workers - 1 - seat[None, :])
        dealt = (turn[:, None] < rounds) & (seat[None, :] < workers)
        cost = tl.load(sorted_cost + turn[:, None] * workers + place, mask=dealt, other=0) + OVERHEAD
        load += tl.sum(tl.where(dealt, cost, 0.0), 0)
    room = tl.cumsum(tl.where(seat < workers, tl.maximum(level - load, 0.0), 0.0), 0)
    scale = (all_work - tl.sum(load, 0)) / tl.maximum(tl.max(room, 0), 1e-6)
    tl.store(share + seat, room * scale, mask=seat < workers)
    tl.debug_barrier()
    before = 0.0
    for start in range(rounds * workers, num_tiles, CHUNK):
        rank = start + tl.arange(0, CHUNK)
        real = rank < num_tiles
        cost = tl.where(real, tl.load(sorted_cost + rank, mask=real, other=0) + OVERHEAD, 0.0)
        middle = before + tl.cumsum(cost, 0) - cost / 2
        before += tl.sum(cost, 0)
        owner = tl.zeros([CHUNK], tl.int32)
        for bit in tl.static_range(BITS):  # the first worker whose share reaches the tile's middle
            step = WORKERS >> (bit + 1)
            probe = owner + step - 1
            reached = tl.load(share + probe, mask=probe < workers - 1, other=float("inf"))
            owner = tl.where(reached < middle, owner + step, owner)
        tl.atomic_add(light_counts + owner, 1, mask=real)
        tile = tl.load(sorted_tile + rank, mask=real, other=0)
        tl.store(order + rank + rounds * (1 + owner - workers), tile, mask=real)
    tl.debug_barrier()
    light = tl.load(light_counts + seat, mask=seat < workers, other=0)
    tl.store(bin_ptr + seat, rounds * seat + tl.cumsum(light, 0) - light, mask=seat < workers)
    tl.store(bin_ptr + workers, num_tiles)
    tl.debug_barrier()
    for start in range(0, rounds * workers, CHUNK):
        rank = start + tl.arange(0, CHUNK)
        real = rank < rounds * workers
        turn = rank // workers
        place = rank % workers
        owner = tl.where(turn % 2 == 0, place, workers - 1 - place)
        tile = tl.load(sorted_tile + rank, mask=real, other=0)
        tl.store(order + tl.load(bin_ptr + owner, mask=real, other=0) + turn, tile, mask=real)


def deal_on_device(
    counts: Int[Tensor, " T"],
    places: Int[Tensor, " T"],
    histogram: Int[Tensor, " classes"],
    workers: int,
    light_counts: Int[Tensor, " workers"] | None = None,
) -> tuple[Int[Tensor, " T"], Int[Tensor, " P1"]]:
    """Order of the tiles, grouped by worker and longest first, and where each worker's start; see the module.

    Args:
        counts: blocks of each tile, at least 1.
        places: a different number below histogram[c] for each tile of c blocks.
        histogram: tiles per number of blocks.
        workers: number of workers.
        light_counts: scratch, all 0.
    """
    num_tiles, num_classes = counts.numel(), histogram.numel()
    scratch = counts.new_empty(num_classes + 2 * num_tiles)
    class_start, sorted_cost, sorted_tile = scratch.split([num_classes, num_tiles, num_tiles])
    share = counts.new_empty(workers, dtype=torch.float32)
    light_counts = counts.new_zeros(workers) if light_counts is None else light_counts
    order, bin_ptr = torch.empty_like(counts), counts.new_empty(workers + 1)
    deal_tiles[(1,)](
        counts, places, histogram, class_start, sorted_cost, sorted_tile, share, light_counts, order, bin_ptr, num_tiles,
        num_classes, workers, CLASSES=triton.next_power_of_2(num_classes), WORKERS=triton.next_power_of_2(workers),
        BITS=(workers - 1).bit_length(),
        CHUNK=min(8192, max(16, triton.next_power_of_2(num_tiles))), ROUNDS=16, num_warps=16,
    )  # fmt: skip
    return order, bin_ptr
