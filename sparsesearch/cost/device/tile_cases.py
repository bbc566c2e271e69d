"""Micro-runs of prefill attention: windows, dense rows, scattered blocks, cut tiles.

A case is its parameters: the same parameters give the same schedule on any machine, so a fit can be repeated without the device.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
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
        """What the kernel runs; on the CPU, and kept, since whoever fits the run needs it again."""
        return _schedule(self, workers, kernel, dtype_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Its parameters, from which it is made again."""
        return asdict(self)


@lru_cache(maxsize=256)
def _schedule(case: TileCase, workers: Workers, kernel: Backend, dtype_bytes: int) -> TileSchedule:
    return build_schedule(
        (Span(case.grid),),
        [case.head_tiles()],
        num_kv_heads=case.num_kv_heads,
        shape=tile_shape(kernel, case.head_dim, case.block_tokens),
        workers=workers,
        head_bytes=case.head_dim * dtype_bytes,
    )


def tile_cases(head_dim: int, block_tokens: int) -> Iterator[TileCase]:
    """Lengths 1k to 64k: one block per tile up to whole rows, in the cache and out of it. Of small blocks every other case."""
    cases = _all_cases(head_dim, block_tokens)
    return iter(cases if block_tokens >= 128 else cases[::2])


def _all_cases(head_dim: int, block_tokens: int) -> list[TileCase]:
    per_block = 128 // block_tokens if block_tokens < 128 else 1
    windows = ((4096, (1, 4, 16)), (16384, (1, 8, 32)), (32768, (2, 16)), (65536, (24,)))
    scatters = ((4096, 6), (16384, 4), (32768, 40), (65536, 12), (65536, 48))
    kinds: list[tuple[Family, int, int]] = [("window", length, size) for length, sizes in windows for size in sizes]
    kinds += [("dense", length, 1) for length in (2048, 4096, 8192, 16384, 32768)]
    kinds += [("scatter", length, size) for length, size in scatters]
    kinds += [("stream", length, 2) for length in (1024, 8192)]
    return [TileCase(family, length, head_dim, size * per_block, block_tokens) for family, length, size in kinds]


def on_device(schedule: TileSchedule, device: str) -> TileSchedule:
    """The same schedule with its tensors where the kernel reads them."""
    return replace(
        schedule,
        tiles=schedule.tiles.to(device),
        entries=schedule.entries.to(device),
        bin_ptr=schedule.bin_ptr.to(device),
        merges=schedule.merges.to(device),
    )
