"""Counts of a schedule, and the memory traffic of its replay."""

import numpy as np
import pytest
import torch

from sparsesearch.block_mask import BlockGrid
from sparsesearch.cost.device.load import memory_traffic, tile_load
from sparsesearch.cost.device.tile_cases import TileCase, tile_cases
from sparsesearch.kernels.schedule import HeadTiles, Span, TileShape, Workers, build_schedule

FEW = Workers(count=4, l2_bytes=1e6)


def load_of(case: TileCase, workers: Workers = FEW, cache_bytes: float = 1e9):  # type: ignore[no-untyped-def]
    schedule = case.schedule(workers, "gluon")
    return schedule, tile_load(
        schedule, num_kv_heads=case.num_kv_heads, head_dim=case.head_dim, dtype_bytes=2, cache_bytes=cache_bytes
    )


def test_counts_are_those_of_the_choice() -> None:
    """1024 tokens, 4 heads: 8 rows of tiles each; dense has 36 blocks per head, 8 of them on the diagonal."""
    schedule, load = load_of(TileCase("dense", 1024, 64, num_heads=4, num_kv_heads=2))
    assert load.blocks.sum() == 4 * 36 == schedule.num_blocks
    assert load.partial.sum() == 4 * 8
    assert load.tiles.sum() == 4 * 8
    assert load.merges == load.pieces == 0
    assert load.io_bytes == 2 * 4 * 1024 * 64 * 2
    assert len(load.blocks) == FEW.count
    assert load.blocks.max() <= schedule.makespan * load.blocks.mean() + 8


def test_ragged_ends_and_cut_tiles_are_counted() -> None:
    schedule, load = load_of(TileCase("stream", 1000, 64, size=1, num_heads=4, num_kv_heads=2), Workers(64, 1e6))
    assert load.pieces == schedule.num_slots > 0
    assert load.merges == len(schedule.merges) > 0
    assert load.io_bytes > 2 * 4 * 1000 * 64 * 2  # every piece reads its queries and writes its part
    assert load.blocks.sum() == schedule.num_blocks


def test_a_large_cache_reads_every_block_once_and_a_small_one_again() -> None:
    case = TileCase("scatter", 8192, 64, size=8, num_heads=8, num_kv_heads=2)
    schedule = case.schedule(Workers(8, 1e5), "gluon")
    touched = len(
        {(int(r[1]) // 4, int(e) >> 3) for r in schedule.tiles for e in schedule.entries[int(r[8]) : int(r[9])]}
    )
    volumes = [memory_traffic(schedule, num_kv_heads=2, cache_blocks=blocks) for blocks in (1e9, 100, 20, 0)]
    assert volumes[0] == touched
    assert volumes == sorted(volumes)
    assert volumes[-1] > 2 * touched
    assert volumes[-1] <= schedule.num_blocks


def test_heads_of_a_group_share_what_they_read() -> None:
    grid = BlockGrid(512, 512, 128)
    choice = [HeadTiles(grid.reachable()[None], (0,) * 4)]
    shape = TileShape(128, 128)
    for num_kv_heads in (1, 2, 4):
        schedule = build_schedule((Span(grid),), choice, num_kv_heads=num_kv_heads, shape=shape, workers=FEW)
        assert memory_traffic(schedule, num_kv_heads=num_kv_heads, cache_blocks=1e9) == num_kv_heads * 4


def test_no_tiles_is_no_work() -> None:
    grid = BlockGrid(256, 256, 128)
    empty = [HeadTiles(torch.zeros(1, 2, 2, dtype=torch.bool), (0, 0))]
    schedule = build_schedule((Span(grid),), empty, num_kv_heads=1, shape=TileShape(128, 128), workers=FEW)
    load = tile_load(schedule, num_kv_heads=1, head_dim=64, dtype_bytes=2, cache_bytes=1e6)
    assert load.blocks.sum() == load.traffic_bytes == load.io_bytes == 0


@pytest.mark.parametrize("block_tokens", [64, 128])
def test_cases_are_made_again_from_their_parameters(block_tokens: int) -> None:
    cases = [case for case in tile_cases(128, block_tokens) if case.length <= 8192]
    assert {case.family for case in cases} == {"dense", "window", "scatter", "stream"}
    for case in cases:
        first, second = (TileCase(**case.to_dict()).schedule(FEW, "gluon") for _ in range(2))
        assert torch.equal(first.tiles, second.tiles)
        assert torch.equal(first.entries, second.entries)
    sizes = [np.bincount(case.head_tiles().of_head).sum() for case in cases]
    assert set(sizes) == {32}
