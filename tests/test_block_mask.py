"""The block grid against element masks made one query and one key at a time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsesearch.block_mask import BlockGrid, blocks_of, density, expand
from sparsesearch.errors import SpecError


@st.composite
def grids(draw: st.DrawFn) -> BlockGrid:
    kv_len = draw(st.integers(1, 90))
    return BlockGrid(
        draw(st.integers(1, kv_len)), kv_len, draw(st.sampled_from([1, 7, 16, 64])), causal=draw(st.booleans())
    )


def tiles(grid: BlockGrid, seed: int = 0, *unit: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(*unit, grid.num_q_blocks, grid.num_k_blocks, generator=generator) < 0.5
    return chosen & grid.reachable()


@given(grids())
def test_reachable_tiles_are_those_with_a_visible_key(grid: BlockGrid) -> None:
    reached = torch.zeros(grid.num_q_blocks, grid.num_k_blocks, dtype=torch.bool)
    for query in range(grid.q_start, grid.kv_len):
        for key in range(query + 1 if grid.causal else grid.kv_len):
            reached[query // grid.block_tokens - grid.first_q_block, key // grid.block_tokens] = True
    assert torch.equal(grid.reachable(), reached)


@given(grids(), st.integers(0, 5))
def test_expansion_is_tile_by_tile_and_causal(grid: BlockGrid, seed: int) -> None:
    mask = tiles(grid, seed)
    expected = torch.tensor(
        [
            [
                bool(mask[query // grid.block_tokens - grid.first_q_block, key // grid.block_tokens])
                and (not grid.causal or key <= query)
                for key in range(grid.kv_len)
            ]
            for query in range(grid.q_start, grid.kv_len)
        ]
    )
    assert torch.equal(expand(mask, grid), expected)


@given(grids())
def test_every_query_sees_its_own_tile(grid: BlockGrid) -> None:
    diagonal = grid.diagonal()
    assert (diagonal.sum(1) == 1).all()
    assert not (diagonal & ~grid.reachable()).any()
    visible = expand(diagonal, grid)
    own = torch.arange(grid.q_len), torch.arange(grid.q_start, grid.kv_len)
    assert visible[own].all()


@given(grids(), st.integers(0, 5))
def test_density_is_a_share_of_what_dense_computes(grid: BlockGrid, seed: int) -> None:
    assert density(grid.reachable(), grid) == 1
    assert density(torch.zeros_like(grid.reachable()), grid) == 0
    everything = torch.ones_like(grid.reachable())
    assert density(everything, grid) == 1, "tiles of the future do not count"
    mask = tiles(grid, seed)
    assert density(mask, grid) == pytest.approx(int(mask.sum()) / int(grid.reachable().sum()))


def test_units_are_averaged_and_expanded_one_by_one() -> None:
    grid = BlockGrid(63, 130, 32)
    masks = tiles(grid, 3, 2, 3)
    assert density(masks, grid) == pytest.approx(sum(density(one, grid) for one in masks.flatten(0, 1)) / 6)
    expanded = expand(masks, grid)
    assert expanded.shape == (2, 3, 63, 130)
    assert torch.equal(expanded[1, 2], expand(masks[1, 2], grid))


def test_a_chunk_is_a_part_of_the_whole() -> None:
    whole = BlockGrid(200, 200, 64)
    mask = tiles(whole)
    for q_len in (1, 63, 72, 199):
        chunk = BlockGrid(q_len, 200, 64)
        rows = mask[chunk.first_q_block :]
        assert torch.equal(expand(rows, chunk), expand(mask, whole)[200 - q_len :])


def test_counts() -> None:
    grid = BlockGrid(1, 129, 64)
    assert (grid.q_start, grid.first_q_block, grid.num_q_blocks, grid.num_k_blocks) == (128, 2, 1, 3)
    assert grid.law_len == 129
    assert BlockGrid(1, 129, 64, law_len=100).law_len == 100
    assert [blocks_of(tokens, 64) for tokens in (0, 1, 64, 65, 64.5)] == [0, 1, 1, 2, 2]


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 5), (6, 5), (-1, 1)])
def test_impossible_lengths(q_len: int, kv_len: int) -> None:
    with pytest.raises(SpecError, match="1 <= q_len <= kv_len must hold"):
        BlockGrid(q_len, kv_len, 64)


def test_impossible_tiles() -> None:
    with pytest.raises(SpecError, match="block_tokens >= 1 must hold"):
        BlockGrid(1, 1, 0)
