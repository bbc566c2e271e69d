"""What a tile schedule asks of a device: tiles and blocks of every worker, pieces to merge, and bytes that miss the cache."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from sparsesearch.kernels.schedule import TileSchedule
from sparsesearch.kernels.tile_lists import ENTRY_SHIFT

CHUNK_ENTRIES = 1 << 22


@dataclass(frozen=True)
class TileLoad:
    """Counts from which a schedule's time is predicted.

    Attributes:
        tiles: tiles of each worker.
        blocks: key blocks of each worker.
        partial: of these, those that are masked element by element.
        merges: cut tiles.
        pieces: pieces that they were cut into.
        traffic_bytes: keys and values that come from memory; see `memory_traffic`.
        io_bytes: queries read and outputs written.
    """

    tiles: Float[ndarray, " W"]
    blocks: Float[ndarray, " W"]
    partial: Float[ndarray, " W"]
    merges: int
    pieces: int
    traffic_bytes: float
    io_bytes: float


def tile_load(
    schedule: TileSchedule, *, num_kv_heads: int, head_dim: int, dtype_bytes: int, cache_bytes: float
) -> TileLoad:
    """Count a schedule, wherever it lies.

    Args:
        schedule: tiles, lists and order.
        num_kv_heads: KV heads of the call.
        head_dim: elements per head.
        dtype_bytes: bytes per element.
        cache_bytes: keys and values that the shared cache is counted on to hold.
    """
    records = schedule.tiles.cpu().numpy().astype(np.int64)
    entries = schedule.entries.cpu().numpy()
    bin_ptr = schedule.bin_ptr.cpu().numpy()
    low, high = records[:, 8], records[:, 9]
    marked = np.concatenate([[0], np.cumsum(entries & 1)])
    owner = np.repeat(np.arange(schedule.num_workers), np.diff(bin_ptr))

    def per_worker(values: ndarray) -> Float[ndarray, " W"]:
        return np.bincount(owner, weights=values, minlength=schedule.num_workers)

    rows = records[:, 4] - records[:, 3]
    block_bytes = 2.0 * schedule.shape.keys * head_dim * dtype_bytes
    return TileLoad(
        tiles=per_worker(np.ones(len(records))),
        blocks=per_worker(high - low),
        partial=per_worker(marked[high] - marked[low]),
        merges=int(schedule.merges.shape[0]),
        pieces=schedule.num_slots,
        traffic_bytes=block_bytes
        * memory_traffic(schedule, num_kv_heads=num_kv_heads, cache_blocks=cache_bytes / block_bytes),
        io_bytes=2.0 * float(rows.sum()) * head_dim * dtype_bytes,
    )


def memory_traffic(schedule: TileSchedule, *, num_kv_heads: int, cache_blocks: float) -> float:
    """Key blocks that are read from memory, each with its keys and values.

    The workers' tiles are replayed in waves of one tile per worker. Inside a wave a block is read once, however many tiles want it; in a
    later wave it is still there if the blocks touched since then fit the cache (LRU stack distance, Mattson et al. 1970, on waves).
    """
    records = schedule.tiles.cpu().numpy().astype(np.int64)
    if len(records) == 0:
        return 0.0
    entries = schedule.entries.cpu().numpy() >> ENTRY_SHIFT
    bin_ptr = schedule.bin_ptr.cpu().numpy()
    wave = np.arange(len(records)) - np.repeat(bin_ptr[:-1], np.diff(bin_ptr))
    length = records[:, 9] - records[:, 8]
    group = schedule.num_heads // num_kv_heads
    columns = int(entries.max(initial=0)) + 1
    pair = records[:, 0] * num_kv_heads + records[:, 1] // group
    touched = np.zeros((int(wave.max()) + 1, (int(pair.max()) + 1) * columns), dtype=bool)
    ends = np.cumsum(length)
    bounds = np.searchsorted(ends, np.arange(0, int(ends[-1]), CHUNK_ENTRIES), side="right")
    for lo, hi in zip(bounds, [*bounds[1:], len(records)], strict=True):
        span = slice(lo, max(hi, lo + 1))
        count = length[span]
        place = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
        block = entries[np.repeat(records[span, 8], count) + place]
        touched[np.repeat(wave[span], count), np.repeat(pair[span] * columns, count) + block] = True
    return _misses(touched, cache_blocks)


def _misses(touched: ndarray, cache_blocks: float) -> float:
    volume = np.concatenate([[0.0], np.cumsum(touched.sum(1))])
    last = np.full(touched.shape[1], -1)
    misses = 0
    for wave, now in enumerate(touched):
        before = last[now]
        distance = volume[wave] - volume[np.maximum(before, 0)]
        misses += int(((before < 0) | (distance > cache_blocks)).sum())
        last[now] = wave
    return float(misses)
