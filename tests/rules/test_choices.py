"""What is special about each rule: masks drawn as text, numbers from the papers, choices planted in the data."""

import torch

from sparsesearch.block_mask import BlockGrid, density
from sparsesearch.rules import LengthLaw
from sparsesearch.rules.fixed_blocks import FixedBlocks, decode_bitmap, encode_bitmap
from sparsesearch.rules.pooled_topk import PooledTopk, block_means
from sparsesearch.rules.sink_window import SinkWindow
from sparsesearch.rules.vertical_slash import VerticalSlash


def drawn(tiles: torch.Tensor) -> list[str]:
    return ["".join("#" if tile else "." for tile in row) for row in tiles.tolist()]


def test_sink_window_as_text() -> None:
    rule = SinkWindow(sink=64, window=LengthLaw(a=128))
    assert drawn(rule.select(BlockGrid(320, 320, 64))) == ["#....", "##...", "###..", "#.##.", "#..##"]


def test_streaming_head_density_of_the_paper_setting() -> None:
    """DuoAttention deploys 64 sink and 256 recent tokens; at 32k that is 1 + 4 of 512 blocks per row."""
    grid = BlockGrid(32768, 32768, 64)
    share = density(SinkWindow(sink=64, window=LengthLaw(a=256)).select(grid), grid)
    rows = torch.arange(1, 513)
    assert abs(share - (rows.clamp(max=5).sum() / rows.sum()).item()) < 1e-9


def test_elastic_window_grows_with_the_sequence() -> None:
    rule = SinkWindow(sink=0, window=LengthLaw(a=-64, b=0.25))
    assert [rule.blocks(BlockGrid(n, n, 64))[1] for n in (64, 512, 1024, 4096)] == [1, 1, 3, 15]


def test_pooled_topk_finds_the_planted_block() -> None:
    q, k = torch.zeros(1, 256, 8), torch.zeros(1, 256, 8)
    k[0, 64:128, 0] = 1.0
    q[0, 192:, 0] = 1.0
    tiles = PooledTopk(keep=LengthLaw(a=192), sink=64).select(BlockGrid(256, 256, 64), q, k)
    assert drawn(tiles[0])[3] == "##.#"


def test_block_means_of_a_ragged_block() -> None:
    x = torch.arange(5.0)[:, None]
    assert torch.equal(block_means(x, BlockGrid(5, 5, 4), 0)[:, 0], torch.tensor([1.5, 4.0]))
    assert torch.equal(block_means(x[2:], BlockGrid(3, 5, 4), 2)[:, 0], torch.tensor([2.5, 4.0]))


def test_vertical_slash_finds_the_planted_column_and_diagonal() -> None:
    length, block = 512, 64
    q, k = torch.zeros(2, length, 8), torch.zeros(2, length, 8)
    q[:, -64:, 0] = 4.0
    k[0, 130:140, 0] = 8.0  # head 0: a column in block 2
    k[1, 256:320, 0] = 8.0  # head 1: block 4, seen from block 7: diagonal 3
    rule = VerticalSlash(vertical=LengthLaw(a=128), slash=LengthLaw(a=64))
    tiles = rule.select(BlockGrid(length, length, block), q, k)
    assert drawn(tiles[0])[7] == "#.#....#"
    slash = VerticalSlash(vertical=LengthLaw(a=64), slash=LengthLaw(a=128)).select(
        BlockGrid(length, length, block), q, k
    )
    assert drawn(slash[1])[7] == "#...#..#"
    assert drawn(slash[1])[5] == "#.#..#.."


def test_fixed_blocks_keeps_the_heaviest_tiles() -> None:
    mass = torch.zeros(4, 4)
    mass[3, 1] = 5.0
    rule = FixedBlocks(keep=0.75).calibrated(mass)
    assert drawn(rule.select(BlockGrid(256, 256, 64))) == ["#...", "##..", "###.", "##.#"]


def test_fixed_blocks_stretches_to_other_lengths() -> None:
    rule = FixedBlocks(keep=0.5).calibrated(torch.rand(8, 8, generator=torch.Generator().manual_seed(0)))
    long, same = BlockGrid(1024, 1024, 64), BlockGrid(512, 512, 64)
    stretched, bits = rule.select(long), rule.select(same)
    assert torch.equal(stretched[1::2, ::2] & same.reachable(), bits)


def test_bitmap_text_round_trip() -> None:
    bits = torch.rand(37, 37, generator=torch.Generator().manual_seed(1)) < 0.3
    assert torch.equal(decode_bitmap(encode_bitmap(bits)), bits)
