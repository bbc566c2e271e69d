"""Pages chosen by bounds, in Triton's interpreter or on a GPU: those of the rule, on bounds that grow token by token."""

import pytest
import torch

from sparsesearch.block_mask import BlockGrid
from sparsesearch.estimators import block_bounds
from sparsesearch.kernels.page_ops import pages_by_bounds
from sparsesearch.rules import LengthLaw
from sparsesearch.rules.bounds_topk import BoundsTopk
from sparsesearch.step_blocks import page_tables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOM, BLOCK, SIZE, G = 150, 16, 3, 2


@pytest.mark.parametrize("head_dim", [16, 24])
@pytest.mark.parametrize("seen", [(1, 2), (16, 17), (150, 33), (96, 150)], ids=str)
@pytest.mark.parametrize(("keep", "sink"), [(1, 0), (48, 16), (64, 40), (10_000, 0)])
def test_pages_are_those_of_the_rule(seen: tuple[int, int], head_dim: int, keep: int, sink: int) -> None:
    """Two sequences; the KV heads choose in reverse order, the second query head of the first one does not choose."""
    generator = torch.Generator().manual_seed(sum(seen) + keep)
    rule = BoundsTopk(keep=LengthLaw(a=keep), sink=sink)
    q = torch.randn(2, SIZE * G, head_dim, generator=generator).bfloat16()
    keys = torch.randn(2, G, ROOM, head_dim, generator=generator).bfloat16()
    low, high = torch.full((2, 2, G, -(-ROOM // BLOCK), head_dim), 77.0).bfloat16().unbind(0)  # absent blocks: anything
    kv_heads, bounded, places = [1, 0], [1, 0], [0, 1, 2, 3, 5]
    expected = []
    for row, count in enumerate(seen):
        if count > 1:
            known = BlockGrid(count - 1, count - 1, BLOCK)
            for bounds, found in zip((low, high), block_bounds(keys[row, :, : count - 1], known), strict=True):
                bounds[row, :, : known.num_k_blocks] = found
        grid = BlockGrid(1, count, BLOCK)
        for place in places:
            kv_head = kv_heads[place // SIZE]
            own = q[row, kv_head * SIZE + place % SIZE]
            tiles = rule.select(grid, own[None], keys[row, kv_head, :count])[0]
            padded = torch.nn.functional.pad(tiles, (0, low.shape[2] - grid.num_k_blocks))
            expected.append((padded, count))
    start = torch.arange(2 * G) * ROOM
    pairs = torch.tensor(seen, dtype=torch.int32).repeat_interleave(G)
    numbers = [torch.tensor(x, dtype=torch.int64) for x in (kv_heads, bounded, places)]
    budget = torch.full((2,), max(1, -(-keep // BLOCK)), dtype=torch.int32)
    low, high = low.contiguous().to(DEVICE), high.contiguous().to(DEVICE)
    inputs = [x.to(DEVICE) for x in (q, keys.flatten(0, 2))]
    table, lens = pages_by_bounds(
        *inputs, low, high, *(x.to(DEVICE) for x in (start, pairs, *numbers, budget)), -(-sink // BLOCK), BLOCK
    )
    for pair, (tiles, count) in enumerate(expected):
        pages, total = page_tables(tiles[None, None], torch.tensor([count - 1]), BLOCK)
        used = int(tiles.sum())
        assert table[pair, :used].tolist() == pages[0, :used].tolist(), pair
        assert not table[pair, used:].any()
        assert int(lens[pair]) == int(total)
    for row, count in enumerate(seen):
        grid = BlockGrid(count, count, BLOCK)
        for bounds, found in zip((low, high), block_bounds(keys[row, :, :count], grid), strict=True):
            assert torch.equal(bounds[row, :, : grid.num_k_blocks].float().cpu(), found)
