import pytest
import torch

from sparsesearch.block_mask import BlockGrid, expand
from sparsesearch.kernels.reference import tile_attention
from sparsesearch.kernels.torch_gather import tile_attention_masked, tile_attention_torch
from sparsesearch.rules.sink_window import SinkWindow

GRIDS = [
    BlockGrid(1, 1, 64),
    BlockGrid(63, 63, 64),
    BlockGrid(64, 64, 64),
    BlockGrid(157, 157, 16),
    BlockGrid(1, 130, 64),
    BlockGrid(37, 100, 16),
    BlockGrid(5, 12, 1),
    BlockGrid(100, 100, 16, causal=False),
    BlockGrid(33, 70, 16, causal=False),
]


def random_tiles(grid: BlockGrid, units: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    chosen = torch.rand(*units, grid.num_q_blocks, grid.num_k_blocks, generator=generator) < 0.4
    return chosen & grid.reachable()


def tensors(grid: BlockGrid, units: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float32):
    lengths = (grid.q_len, grid.kv_len, grid.kv_len)
    return [torch.randn(*units, length, 8, generator=generator, dtype=torch.float64).to(dtype) for length in lengths]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("tile_units", [(), (1, 3), (2, 3), (2, 1)], ids=str)
@pytest.mark.parametrize("attend", [tile_attention_torch, tile_attention_masked])
def test_equals_the_oracle_for_any_choice_of_tiles(grid, tile_units, attend, generator):
    """Rows without a diagonal tile and rows without any tile included."""
    q, k, v = tensors(grid, (2, 3), generator, torch.float64)
    tiles = random_tiles(grid, tile_units, generator)
    ours = attend(q, k, v, tiles, grid, scale=0.3)
    torch.testing.assert_close(ours, tile_attention(q, k, v, tiles, grid, scale=0.3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_is_that_of_the_precision(dtype, generator):
    """No worse than twice what dense attention in that precision makes of the same mask, plus one rounding of the output."""
    grid = BlockGrid(300, 300, 64)
    q, k, v = tensors(grid, (4,), generator, dtype)
    tiles = SinkWindow(sink=64, window=64).select(grid)
    exact = tile_attention(q.double(), k.double(), v.double(), tiles, grid, scale=0.35)
    scores = (q @ k.mT * 0.35).masked_fill(~expand(tiles, grid), -torch.inf)
    baseline = (scores.softmax(-1) @ v - exact).abs().max()
    error = (tile_attention_torch(q, k, v, tiles, grid, scale=0.35) - exact).abs().max()
    assert error <= 2 * baseline + torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("attend", [tile_attention_torch, tile_attention_masked])
def test_gradients_equal_the_oracles(attend, generator):
    grid = BlockGrid(45, 100, 16)
    inputs = [x.requires_grad_() for x in tensors(grid, (2,), generator, torch.float64)]
    tiles = random_tiles(grid, (2,), generator)
    weight = torch.randn(2, 45, 8, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad((attend(*inputs, tiles, grid, scale=0.3) * weight).sum(), inputs)
    exact = torch.autograd.grad((tile_attention(*inputs, tiles, grid, scale=0.3) * weight).sum(), inputs)
    for mine, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


def test_keys_outside_the_chosen_tiles_are_never_read(generator):
    grid = BlockGrid(96, 96, 16)
    q, k, v = tensors(grid, (1,), generator)
    tiles = SinkWindow(sink=16, window=16).select(grid)
    expected = tile_attention_torch(q, k, v, tiles, grid, scale=0.3)
    k[:, 16:64], v[:, 16:64] = torch.nan, torch.nan
    late = tile_attention_torch(q, k, v, tiles, grid, scale=0.3)
    assert torch.equal(late[:, 80:], expected[:, 80:])
