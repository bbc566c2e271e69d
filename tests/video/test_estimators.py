"""Rules that look at queries and keys, against their definitions computed plainly."""

import pytest
import torch
import torch.nn.functional as F

from sparsesearch.block_mask import BlockGrid
from sparsesearch.errors import SpecError
from sparsesearch.layout import Layout, video_layout
from sparsesearch.order import Tile
from sparsesearch.rules.block_mass import BlockMass, head_sparsities, tile_mass
from sparsesearch.rules.draft_attention import DraftAttention


def tensors(length: int, *unit: int) -> tuple[torch.Tensor, torch.Tensor]:
    q, k = torch.randn(2, *unit, length, 16, generator=torch.Generator().manual_seed(length))
    return q, k


@pytest.mark.parametrize(
    ("q_len", "kv_len", "causal"), [(100, 100, False), (100, 100, True), (37, 130, True), (1, 65, False)]
)
def test_tile_mass_is_the_summed_softmax(
    q_len: int, kv_len: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsesearch.rules.block_mass._STEP_ELEMENTS", 6000)  # several steps
    grid = BlockGrid(q_len, kv_len, 16, causal=causal)
    q, k = tensors(kv_len, 3)
    q = q[:, kv_len - q_len :]
    scores = q.double() @ k.double().transpose(-1, -2)
    if causal:
        scores = scores.masked_fill(torch.arange(kv_len) > torch.arange(kv_len - q_len, kv_len)[:, None], -torch.inf)
    weights = scores.softmax(-1)
    rows = torch.arange(kv_len - q_len, kv_len) // 16 - grid.first_q_block
    columns = torch.arange(kv_len) // 16
    expected = torch.zeros(3, grid.num_q_blocks, grid.num_k_blocks, dtype=torch.double)
    for i in range(q_len):
        for j in range(kv_len):
            expected[:, rows[i], columns[j]] += weights[:, i, j]
    assert torch.allclose(tile_mass(q, k, grid).double(), expected, atol=1e-5)


def test_block_mass_keeps_the_heaviest_of_each_row() -> None:
    layout = video_layout(4, 8, 8, text_last=16)
    grid = BlockGrid(272, 272, 16, causal=False, layout=layout)
    q, k = tensors(272, 2)
    tiles = BlockMass(keep=0.25).select(grid, q, k)
    mass = tile_mass(q, k, grid)[:, :16, :16]
    best = mass.topk(4, -1).indices
    expected = torch.zeros(2, 16, 16, dtype=torch.bool).scatter(-1, best, True) | torch.eye(16, dtype=torch.bool)
    assert torch.equal(tiles[:, :16, :16], expected)
    assert tiles[:, 16].all()
    assert tiles[:, :, 16].all()


def test_block_mass_per_segment() -> None:
    """SparseD: the best share of the prompt's blocks and the best share of the generation's, each on its own."""
    layout = Layout.model_validate(
        {"segments": [{"kind": "prompt", "shape": [160]}, {"kind": "generation", "shape": [64]}]}
    )
    grid = BlockGrid(224, 224, 16, causal=False, layout=layout)
    q, k = tensors(224, 1)
    k[:, 160:] *= 10  # generation outweighs the prompt
    tiles = BlockMass(keep=0.3, per_segment=True).select(grid, q, k)[0]
    off_diagonal = tiles & ~torch.eye(14, dtype=torch.bool)
    mass = tile_mass(q, k, grid)[0]
    for row in range(14):
        prompt, generation = mass[row, :10].topk(3).indices, mass[row, 10:].topk(2).indices + 10
        assert set(off_diagonal[row].nonzero()[:, 0].tolist()) <= {*prompt.tolist(), *generation.tolist()}
        assert tiles[row, prompt].all()
        assert tiles[row, generation].all()


def test_adaspa_sparsities() -> None:
    recall = torch.tensor([0.9, 0.5, 0.85, 0.7, 0.6, 0.2])
    out = head_sparsities(recall, 0.8)
    assert torch.allclose(out, torch.tensor([0.9, 0.7, 0.9, 0.8, 0.8, 0.7]))
    assert out.mean().item() == pytest.approx(0.8)
    assert head_sparsities(torch.full((5,), 0.9), 0.8).mean().item() == pytest.approx(0.8)
    with pytest.raises(SpecError, match="1/3"):
        head_sparsities(recall, 0.2)


def test_draft_attention_pools_like_the_paper() -> None:
    """Average pooling of 8 x 16 patches per frame, softmax, and one threshold for the whole head."""
    layout = video_layout(3, 16, 32)
    grid = BlockGrid(1536, 1536, 128, causal=False, layout=layout)
    q, k = tensors(1536, 2)
    rule = DraftAttention(keep=0.3)
    there = rule.order.permutation(layout)
    tiles = rule.select(grid, q[:, there] * 4, k[:, there])
    pooled = [F.avg_pool2d(x.view(2 * 3, 16, 32, 16).permute(0, 3, 1, 2), (8, 16)) for x in (q * 4, k)]
    flat_q, flat_k = (x.permute(0, 2, 3, 1).reshape(2, 12, 16) for x in pooled)
    draft = (flat_q @ flat_k.transpose(1, 2)).softmax(-1)
    threshold = draft.flatten(1).sort(descending=True).values[:, round(0.3 * 144) - 1]
    expected = (draft >= threshold[:, None, None]) | torch.eye(12, dtype=torch.bool)
    assert torch.equal(tiles, expected)
    assert len(set(tiles[0].sum(-1).tolist())) > 1, "rows have different budgets"


def test_draft_attention_leaves_text_out_of_its_share() -> None:
    layout = video_layout(2, 8, 8, text_first=20)
    grid = BlockGrid(148, 148, 16, causal=False, layout=layout)
    q, k = tensors(148, 1)
    tiles = DraftAttention(keep=0.25, order=Tile(1, 4, 4)).select(grid, q, k)[0]
    free = tiles[:8, :8]
    assert 16 <= int(free.sum()) <= 16 + 8  # the share, and diagonal tiles it lacks
    assert tiles[8:].all()
    assert tiles[:, 8:].all()


@pytest.mark.parametrize("rule", [BlockMass(keep=0.2), DraftAttention(keep=0.2)])
def test_they_need_queries_and_keys(rule: BlockMass | DraftAttention) -> None:
    grid = BlockGrid(32, 32, 16, causal=False, layout=video_layout(2, 4, 4))
    with pytest.raises(SpecError, match="queries and keys"):
        rule.select(grid)
