"""Micro-runs of prefill attention: windows, dense rows, scattered blocks, cut tiles.

A case is its parameters: the same parameters give the same schedule on any machine, so a fit can be repeated without the device.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.kernels.dispatch import Backend, tile_shape
from sparsesearch.kernels.schedule import HeadTiles, Span, TileSchedule, Workers, build_schedule

Family = Literal["dense", "window", "scatter", "stream"]


@dataclass(frozen=True)
class TileCase:
    """One layer's attention call of one sequence.

    Attributes:
        family: dense; a window and a sink in every head; blocks drawn evenly from each row; one dense head among windows.
        length: tokens.
        head_dim: elements per head.
        size: blocks per row: the window, or how many are drawn.
        block_tokens: side of a tile of the choice.
        num_heads: query heads.
        num_kv_heads: KV heads.
    """

    family: Family
    length: int
    head_dim: int
    size: int = 1
    block_tokens: int = 128
    num_heads: int = 32
    num_kv_heads: int = 8

    @cached_property
    def grid(self) -> BlockGrid:
        """Its blocks; causal."""
        return BlockGrid(self.length, self.length, self.block_tokens)

    def head_tiles(self) -> HeadTiles:
        """The choice of each head."""
        window, heads = self._window(), (0,) * self.num_heads
        match self.family:
            case "dense":
                return HeadTiles(self.grid.reachable()[None], heads)
            case "window":
                return HeadTiles(window[None], heads)
            case "scatter":
                return HeadTiles(
                    torch.stack([self._scatter(seed) for seed in range(4)]), tuple(h % 4 for h in range(self.num_heads))
                )
            case "stream":
                return HeadTiles(torch.stack([self.grid.reachable(), window]), (0, *(1,) * (self.num_heads - 1)))

    def _window(self) -> Bool[Tensor, "M N"]:
        near = self.grid.q_blocks() - self.grid.k_blocks() < self.size
        return self.grid.reachable() & (near | (self.grid.k_blocks() == 0))

    def _scatter(self, seed: int) -> Bool[Tensor, "M N"]:
        generator = torch.Generator().manual_seed(seed)
        grid = self.grid
        score = torch.rand(grid.num_q_blocks, grid.num_k_blocks, generator=generator).masked_fill(
            ~grid.reachable(), -1.0
        )
        best = score.argsort(-1, descending=True)[:, : self.size]
        chosen = torch.zeros_like(grid.reachable()).scatter_(-1, best, True)
        return grid.reachable() & (chosen | grid.diagonal())

    def schedule(self, workers: Workers, kernel: Backend, dtype_bytes: int = 2) -> TileSchedule:
        """What the kernel runs; on the CPU."""
        return build_schedule(
            (Span(self.grid),),
            [self.head_tiles()],
            num_kv_heads=self.num_kv_heads,
            shape=tile_shape(kernel, self.head_dim, self.block_tokens),
            workers=workers,
            head_bytes=self.head_dim * dtype_bytes,
        )

    def to_dict(self) -> dict[str, Any]:
        """Its parameters, from which it is made again."""
        return asdict(self)


def tile_cases(head_dim: int, block_tokens: int) -> Iterator[TileCase]:
    """Lengths 1k to 64k: one block per tile up to whole rows, in the cache and out of it."""
    base = TileCase("window", 4096, head_dim, block_tokens=block_tokens)
    per_block = 128 // block_tokens if block_tokens < 128 else 1
    for length, sizes in ((4096, (1, 2, 4, 8, 16)), (16384, (1, 3, 8, 32)), (32768, (2, 16)), (65536, (4, 24))):
        for size in sizes:
            yield replace(base, length=length, size=size * per_block)
    for length in (2048, 4096, 8192, 16384, 32768):
        yield replace(base, family="dense", length=length)
    for length, size in ((4096, 6), (8192, 12), (16384, 4), (32768, 6), (32768, 40), (65536, 12), (65536, 48)):
        yield replace(base, family="scatter", length=length, size=size * per_block)
    for length in (1024, 2048, 8192):
        yield replace(base, family="stream", length=length, size=2 * per_block)


def on_device(schedule: TileSchedule, device: str) -> TileSchedule:
    """The same schedule with its tensors where the kernel reads them."""
    return replace(
        schedule,
        tiles=schedule.tiles.to(device),
        entries=schedule.entries.to(device),
        bin_ptr=schedule.bin_ptr.to(device),
        merges=schedule.merges.to(device),
    )
