"""Block scores against the rules' own formulas and against a dense softmax."""

import pytest
import torch

from sparsesearch.block_mask import BlockGrid
from sparsesearch.kernels.triton_index import block_mass, pooled_means
from sparsesearch.rules.pooled_topk import block_means

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRIDS = [
    BlockGrid(1, 1, 16),
    BlockGrid(63, 63, 16),
    BlockGrid(40, 130, 32),
    BlockGrid(37, 150, 24),
    BlockGrid(30, 50, 16, causal=False),
]


def _inputs(grid: BlockGrid, head_dim: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(grid.kv_len)
    q = torch.randn(4, grid.q_len, head_dim, generator=generator) * head_dim**-0.5
    return q.to(DEVICE), torch.randn(2, grid.kv_len, head_dim, generator=generator).to(DEVICE)


def _weights(q: torch.Tensor, k: torch.Tensor, grid: BlockGrid) -> tuple[torch.Tensor, torch.Tensor]:
    scores = q.double() @ k.double().repeat_interleave(2, 0).transpose(-1, -2)
    if grid.causal:
        position = torch.arange(grid.q_start, grid.kv_len, device=q.device)[:, None]
        scores = scores.masked_fill(torch.arange(grid.kv_len, device=q.device) > position, -torch.inf)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp(), lse.float()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_pooled_means_are_those_of_the_rule(grid: BlockGrid) -> None:
    q, k = _inputs(grid)
    torch.testing.assert_close(pooled_means(q, grid, start=grid.q_start), block_means(q, grid, grid.q_start))
    torch.testing.assert_close(pooled_means(k, grid, start=0), block_means(k, grid, 0))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_block_mass_is_the_softmax_summed_per_tile(grid: BlockGrid) -> None:
    q, k = _inputs(grid)
    weights, lse = _weights(q, k, grid)
    expected = torch.zeros(4, grid.num_q_blocks, grid.num_k_blocks, dtype=torch.float64, device=q.device)
    q_block = torch.arange(grid.q_start, grid.kv_len) // grid.block_tokens - grid.first_q_block
    for row, block in enumerate(q_block.tolist()):
        for key in range(grid.kv_len):
            expected[:, block, key // grid.block_tokens] += weights[:, row, key]
    got = block_mass(q, k, lse, grid)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        got.sum((1, 2)), torch.full((4,), float(grid.q_len), device=q.device), rtol=1e-5, atol=1e-5
    )
