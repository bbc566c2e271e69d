"""Errors of candidates without running them: equal to running each one, whatever the shape and however it is cut into pieces."""

import pytest
import torch

from sparsesearch.block_mask import BlockGrid, expand
from sparsesearch.kernels.reference import level_attention, masked_attention
from sparsesearch.profiling.denoising import tile_errors as module
from sparsesearch.profiling.denoising.tile_errors import tile_errors, tile_masses


def tensors(units: int, tokens: int, size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(units, tokens, size, generator=generator) for _ in range(3)]


def choices(units: int, blocks: int, count: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(blocks)
    tiles = torch.rand(units, count, blocks, blocks, generator=generator) < 0.5
    tiles[:, 0] = True
    return tiles | torch.eye(blocks, dtype=torch.bool)


@pytest.mark.parametrize("piece_bytes", [1, 1e5, 1e9])
@pytest.mark.parametrize(("units", "tokens", "block"), [(1, 1, 16), (3, 63, 16), (2, 128, 32), (5, 100, 32)])
def test_equal_to_running_every_candidate(
    units: int, tokens: int, block: int, piece_bytes: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", piece_bytes)
    q, k, v = tensors(units, tokens, 8)
    blocks = -(-tokens // block)
    tiles, grid = choices(units, blocks), BlockGrid(tokens, tokens, block, causal=False)
    weight = torch.randn(units, 8, 8, generator=torch.Generator().manual_seed(1))
    found = tile_errors(q, k, v, tiles, weight.mT @ weight, scale=0.3, block_tokens=block)
    for unit in range(units):
        dense = masked_attention(q[unit], k[unit], v[unit], torch.ones(tokens, tokens, dtype=torch.bool), scale=0.3)[0]
        for candidate in range(tiles.shape[1]):
            mask = expand(tiles[unit, candidate], grid)
            delta = masked_attention(q[unit], k[unit], v[unit], mask, scale=0.3)[0] - dense
            wanted = float((delta.float() @ weight[unit].T).square().sum())
            assert float(found.error[unit, candidate]) == pytest.approx(wanted, rel=1e-4, abs=1e-5)
        norm = float((dense.float() @ weight[unit].T).square().sum())
        assert float(found.norm[unit]) == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("piece_bytes", [1, 1e9])
@pytest.mark.parametrize(("units", "tokens", "block"), [(1, 1, 16), (3, 63, 16), (2, 100, 32)])
def test_means_in_place_of_tiles(
    units: int, tokens: int, block: int, piece_bytes: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Candidates with and without means side by side, against the oracle of levels and the first-order term written out."""
    monkeypatch.setattr(module, "PIECE_BYTES", piece_bytes)
    q, k, v = tensors(units, tokens, 8)
    blocks, terms = -(-tokens // block), [None, 0, 1, None]
    tiles, grid = choices(units, blocks, 4), BlockGrid(tokens, tokens, block, causal=False)
    gram = torch.eye(8).expand(units, 8, 8)
    found = tile_errors(q, k, v, tiles, gram, scale=0.3, block_tokens=block, terms=terms).error
    pieces = [slice(j * block, min((j + 1) * block, tokens)) for j in range(blocks)]
    for unit in range(units):
        dense = masked_attention(q[unit], k[unit], v[unit], torch.ones(tokens, tokens, dtype=torch.bool), scale=0.3)[0]
        spread = sum((k[unit, p] - k[unit, p].mean(0)).T @ v[unit, p] for p in pieces)
        for candidate, order in enumerate(terms):
            levels = torch.where(tiles[unit, candidate], 1, 0 if order is None else block)
            out, lse = level_attention(q[unit], k[unit], v[unit], levels, grid, scale=0.3)
            if order == 1:
                kept = masked_attention(q[unit], k[unit], v[unit], expand(levels == 1, grid), scale=0.3)[1]
                out = out + (1 - (kept - lse).exp())[:, None] * 0.3 * (q[unit] @ spread) / tokens
            wanted = float((out - dense).square().sum())
            assert float(found[unit, candidate]) == pytest.approx(wanted, rel=1e-3, abs=1e-6)


def test_some_query_blocks_only() -> None:
    q, k, v = tensors(2, 96, 8)
    tiles, gram = choices(2, 6), torch.eye(8).expand(2, 8, 8)
    each = [
        tile_errors(q, k, v, tiles, gram, scale=0.3, block_tokens=16, query_blocks=torch.tensor([row])).error
        for row in range(6)
    ]
    whole = tile_errors(q, k, v, tiles, gram, scale=0.3, block_tokens=16).error
    torch.testing.assert_close(torch.stack(each).sum(0), whole)


@pytest.mark.parametrize("tokens", [1, 40, 64])
def test_masses_are_the_softmax_summed(tokens: int) -> None:
    q, k, _ = tensors(2, tokens, 8)
    blocks = -(-tokens // 16)
    attention = (q @ k.mT * 0.3).softmax(-1)
    padded = torch.nn.functional.pad(attention, (0, blocks * 16 - tokens, 0, blocks * 16 - tokens))
    wanted = padded.unflatten(1, (blocks, 16)).unflatten(3, (blocks, 16)).sum((2, 4))
    torch.testing.assert_close(tile_masses(q, k, scale=0.3, block_tokens=16), wanted)
