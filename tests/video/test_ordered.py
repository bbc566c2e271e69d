"""Layers with heads of several orders, against the oracle evaluated in the model's order."""

import pytest
import torch

from sparsesearch.block_mask import BlockGrid, expand
from sparsesearch.errors import SpecError
from sparsesearch.kernels.dispatch import Backend
from sparsesearch.kernels.ordered import StepMemory, attend
from sparsesearch.kernels.reference import masked_attention
from sparsesearch.kernels.row_copies import put_rows, take_rows
from sparsesearch.layout import Layout, video_layout
from sparsesearch.order import parse_order
from sparsesearch.rules import LengthLaw, Rule
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.diagonal_band import DiagonalBand
from sparsesearch.rules.first_frames import FirstFrames
from sparsesearch.rules.mean_value import MeanValue
from sparsesearch.rules.neighbourhood import Neighbourhood
from sparsesearch.rules.pooled_topk import PooledTopk
from sparsesearch.rules.zero import Zero

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # with a GPU, Triton runs there and not in its interpreter
RULES: tuple[Rule, ...] = (
    DiagonalBand(reach=LengthLaw(b=0.1), order=parse_order("axes(hwf)")),
    Zero(),
    DiagonalBand(reach=LengthLaw(b=0.1)),
    Neighbourhood.model_validate({"window": "2x4x4", "order": "tile(2,4,4)"}),
    MeanValue(),
    DiagonalBand(reach=LengthLaw(b=0.2), order=parse_order("axes(hwf)")),
    FirstFrames(),
    Dense(),
)


def grid_of(layout: Layout, block: int = 16) -> BlockGrid:
    return BlockGrid(layout.num_tokens, layout.num_tokens, block, causal=False, layout=layout)


def tensors(layout: Layout, heads: int, kv_heads: int, batch: int = 2, extra: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(layout.num_tokens)
    return [
        torch.randn(batch, count, layout.num_tokens + extra, 16, generator=generator).to(DEVICE)
        for count in (heads, kv_heads, kv_heads)
    ]


def oracle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: BlockGrid, rules: tuple[Rule, ...]) -> torch.Tensor:
    """Element masks carried back to the model's order; fp64."""
    assert grid.layout is not None
    out = torch.zeros_like(q)
    group, length = q.shape[1] // k.shape[1], grid.kv_len
    for batch in range(len(q)):
        for head, rule in enumerate(rules):
            keys, values = k[batch, head // group, :length], v[batch, head // group, :length]
            match rule.rest:
                case "zero":
                    continue
                case "mean_value":
                    out[batch, head, :length] = values.double().mean(0)
                    continue
            there, back = (
                rule.token_order.permutation(grid.layout, DEVICE),
                rule.token_order.inverse(grid.layout, DEVICE),
            )
            tiles = rule.select(grid, q[batch, head, :length][there] * 0.25, keys[there])
            mask = expand(tiles, grid).to(DEVICE)[back][:, back]
            out[batch, head, :length] = masked_attention(q[batch, head, :length], keys, values, mask, scale=0.25)[0]
    return out


@pytest.mark.parametrize(
    ("layout", "kv_heads", "backend"),
    [
        (video_layout(3, 5, 7), 8, "torch"),
        (video_layout(3, 5, 7), 2, "reference"),
        (video_layout(4, 8, 8, text_first=13), 2, "torch"),
        (video_layout(5, 6, 7, text_last=21), 8, "torch"),
        (video_layout(2, 4, 7, text_last=5), 2, "triton"),
    ],
)
def test_equals_the_oracle(layout: Layout, kv_heads: int, backend: Backend) -> None:
    q, k, v = tensors(layout, len(RULES), kv_heads)
    grid = grid_of(layout)
    result = attend(q, k, v, grid, RULES, scale=0.25, backend=backend)
    # fp32 sums of at most T products of unit variance; on a GPU, Triton multiplies fp32 in TF32 (10 bits)
    assert torch.allclose(
        result, oracle(q, k, v, grid, RULES), atol=2e-5 if DEVICE == "cpu" or backend != "triton" else 5e-3
    )


def test_rows_of_different_length() -> None:
    """Padded text: the first row has 5 text tokens fewer; rows past its end are 0."""
    long, short = video_layout(4, 6, 6, text_last=20), video_layout(4, 6, 6, text_last=15)
    q, k, v = tensors(long, len(RULES), 8)
    grids = [grid_of(short), grid_of(long)]
    result = attend(q, k, v, grids, RULES, scale=0.25, backend="torch")
    for row, grid in enumerate(grids):
        one = [x[row : row + 1] for x in (q, k, v)]
        assert torch.allclose(result[row : row + 1], oracle(one[0], one[1], one[2], grid, RULES), atol=2e-5)
    assert not result[0, :, short.num_tokens :].any()


def test_dynamic_tiles_are_chosen_once_and_kept() -> None:
    layout = video_layout(4, 8, 8)
    rules = (PooledTopk(keep=LengthLaw(a=32), sink=0), Dense(), RULES[0])
    q, k, v = tensors(layout, 3, 3)
    grid, memory = grid_of(layout), StepMemory(chosen={})
    first = attend(q, k, v, grid, rules, scale=0.25, backend="torch", memory=memory)
    assert torch.allclose(first, oracle(q, k, v, grid, rules), atol=2e-5)
    assert memory.chosen is not None
    assert len(memory.chosen) == 1
    other = torch.randn(q.shape, generator=torch.Generator().manual_seed(9)).to(DEVICE)
    kept = attend(other, k, v, grid, rules, scale=0.25, backend="torch", memory=memory)
    anew = attend(other, k, v, grid, rules, scale=0.25, backend="torch")
    assert torch.equal(kept[:, 1:], anew[:, 1:])
    assert not torch.allclose(kept[:, 0], anew[:, 0], atol=1e-3)


def test_counts_must_agree() -> None:
    layout = video_layout(2, 4, 4)
    q, k, v = tensors(layout, 2, 2)
    with pytest.raises(SpecError, match="a rule per head"):
        attend(q, k, v, grid_of(layout), (Dense(),), scale=1.0)


@pytest.mark.parametrize("length", [1, 63, 130])
@pytest.mark.parametrize("head_dim", [16, 24])
def test_row_copies(length: int, head_dim: int) -> None:
    from sparsesearch.kernels import triton_rows

    generator = torch.Generator().manual_seed(length)
    x = (
        torch.randn(2, length, 5, head_dim, generator=generator).to(DEVICE).transpose(1, 2)
    )  # [B, H, S, D], not contiguous
    heads, permutation = torch.tensor([4, 0, 3]).to(DEVICE), torch.randperm(length, generator=generator).to(DEVICE)
    taken = take_rows(x, heads, permutation)
    assert torch.equal(taken, x[:, heads][:, :, permutation])
    by_kernel = torch.empty_like(taken)
    triton_rows.launch(x, by_kernel, heads, permutation, rows=64, put=False)
    assert torch.equal(by_kernel, taken)
    back, back_by_kernel = torch.zeros_like(x), torch.zeros_like(x)
    put_rows(back, taken, heads, permutation)
    triton_rows.launch(back_by_kernel, taken, heads, permutation, rows=64, put=True)
    assert torch.equal(back[:, heads], x[:, heads])
    assert torch.equal(back_by_kernel, back)
    assert not back[:, [1, 2]].any()
