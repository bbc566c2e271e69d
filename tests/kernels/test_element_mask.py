"""Bitmaps inside tiles, against masks that are written out."""

import pytest
import torch

from sparsesearch.block_mask import BlockGrid, expand
from sparsesearch.errors import SpecError, UnsupportedKernelError
from sparsesearch.kernels.dispatch import prefill
from sparsesearch.kernels.element_mask import ElementMask, tiles_of_mask, window_tiles
from sparsesearch.kernels.schedule import HeadTiles, Span, TileShape, Workers, build_schedule

GRIDS = [BlockGrid(1, 1, 32), BlockGrid(63, 63, 32), BlockGrid(40, 301, 64), BlockGrid(512, 512, 128)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_any_mask_survives(grid: BlockGrid, causal: bool) -> None:
    grid = BlockGrid(grid.q_len, grid.kv_len, grid.block_tokens, causal=causal)
    generator = torch.Generator().manual_seed(grid.kv_len)
    mask = torch.rand(2, grid.q_len, grid.kv_len, generator=generator) < 0.2
    chosen, elements = tiles_of_mask(mask, grid)
    seen = expand(grid.reachable(), grid)
    assert torch.equal(expand(chosen, grid) & elements.expand(2, grid), mask & seen)


def test_whole_tiles_have_no_bitmap() -> None:
    grid = BlockGrid(256, 256, 64)
    tiles = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    chosen, elements = tiles_of_mask(expand(tiles, grid), grid)
    assert torch.equal(chosen, tiles & grid.reachable())
    assert len(elements.at) == 0


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("sink", "window"), [(0, 1), (4, 33), (64, 64), (37, 100), (5, 4096)])
def test_window_is_exact(grid: BlockGrid, sink: int, window: int) -> None:
    chosen, elements = window_tiles(grid, sink=sink, window=window)
    query, key = torch.arange(grid.q_start, grid.kv_len)[:, None], torch.arange(grid.kv_len)
    expected = ((key < sink) | (query - key < window)) & (key <= query)
    assert torch.equal((expand(chosen, grid) & elements.expand(1, grid))[0], expected)
    assert len(elements.words) <= 8, "bitmaps repeat along the window's edge"


def test_bitmaps_do_not_grow_with_the_sequence() -> None:
    few = window_tiles(BlockGrid(1024, 1024, 128), sink=4, window=300)[1]
    many = window_tiles(BlockGrid(16384, 16384, 128), sink=4, window=300)[1]
    assert len(few.words) == len(many.words)


def test_a_tile_may_hold_parts_of_two_bitmaps() -> None:
    """Tiles of 128 queries and 64 keys over blocks of 64 and of 128."""
    for block in (64, 128):
        grid = BlockGrid(300, 300, block)
        chosen, elements = window_tiles(grid, sink=3, window=70)
        tiles = HeadTiles(chosen, (0,), elements)
        schedule = build_schedule((Span(grid),), [tiles], num_kv_heads=1, shape=TileShape(128, 64), workers=Workers(1))
        assert schedule.masks is not None
        assert schedule.words is not None
        assert schedule.masks.shape == (len(schedule.entries), 2)
        flagged = (schedule.masks >= 0).any(1)
        assert flagged.any()
        assert (schedule.entries[flagged] & 1).all(), "a tile with a bitmap is partial"
        assert int(schedule.masks.max()) < schedule.words.numel()


def test_bad_input() -> None:
    with pytest.raises(SpecError, match="multiple of 32"):
        ElementMask(torch.zeros(0, 3), torch.zeros(0), torch.zeros(0, 16, 1, dtype=torch.int32))
    with pytest.raises(SpecError, match="causal grid"):
        window_tiles(BlockGrid(64, 64, 32, causal=False), sink=0, window=3)
    with pytest.raises(SpecError, match="a mask must be"):
        tiles_of_mask(torch.ones(1, 3, 3, dtype=torch.bool), BlockGrid(4, 4, 32))
    chosen, elements = window_tiles(BlockGrid(64, 64, 32), sink=0, window=3)
    tiles = [HeadTiles(chosen, (0,), elements)]
    q = torch.zeros(1, 1, 64, 16)
    with pytest.raises(UnsupportedKernelError, match="no bitmaps"):
        prefill(q, q, q, (Span(BlockGrid(64, 64, 32)),), tiles, scale=1.0, backend="torch")
