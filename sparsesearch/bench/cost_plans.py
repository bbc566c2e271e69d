"""Held-out layers for cost models: every head draws one of eight families, none of which calibration uses, with its own parameters.

Dense heads are the one thing both have. Parameters give the same choice on any machine.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.kernels.dispatch import Backend, tile_shape
from sparsesearch.kernels.schedule import HeadTiles, Span, TileSchedule, Workers, build_schedule

Choice = Bool[Tensor, "M N"]
Family = Callable[[BlockGrid, np.random.Generator], Choice]


def dense(grid: BlockGrid, rng: np.random.Generator) -> Choice:
    """Everything below the diagonal."""
    return grid.reachable()


def vertical_slash(grid: BlockGrid, rng: np.random.Generator) -> Choice:
    """Columns and diagonals at random places (MInference)."""
    count = grid.num_k_blocks
    columns = torch.from_numpy(rng.random(count) < rng.uniform(0.0, 0.15))[None, :]
    diagonals = torch.from_numpy(rng.random(count) < rng.uniform(0.0, 0.2))
    return columns | diagonals[(grid.q_blocks() - grid.k_blocks()).clamp(min=0)]


def clustered_topk(grid: BlockGrid, rng: np.random.Generator) -> Choice:
    """The best share of each row under a smooth random field, as pooled scores give it."""
    size = grid.num_k_blocks
    coarse = torch.from_numpy(rng.normal(size=(max(2, size // 6), max(2, size // 6))))
    field = torch.nn.functional.interpolate(coarse[None, None], size=(size, size), mode="bilinear")[0, 0]
    field = field + 0.3 * torch.from_numpy(rng.normal(size=(size, size)))
    seen = field.masked_fill(~grid.reachable(), -torch.inf)
    rank = seen.argsort(-1, descending=True).argsort(-1)
    keep = float(rng.uniform(0.03, 0.4)) * (grid.q_blocks() + 1) + int(rng.integers(0, 6))
    return torch.lt(rank, keep)


def dilated(grid: BlockGrid, rng: np.random.Generator) -> Choice:
    """A local band, and every n-th distance beyond it (Longformer, S2-attention)."""
    distance = grid.q_blocks() - grid.k_blocks()
    step, phase = int(rng.integers(2, 20)), int(rng.integers(0, 16))
    return (distance < int(rng.integers(1, 10))) | ((distance + phase) % step == 0)


def powers(grid: BlockGrid, rng: np.random.Generator) -> Choice:
    """Distances that are powers of two, thickened (PowerAttention)."""
    distance = (grid.q_blocks() - grid.k_blocks()).clamp(min=0)
    width = int(rng.integers(1, 4))
    near = [((distance >= 1 << e) & (distance < (1 << e) + width)) for e in range(int(grid.num_k_blocks).bit_length())]
    return torch.stack([distance < width, *near]).any(0)


def stretched_bitmap(grid: BlockGrid, rng: np.random.Generator) -> Choice:
    """A coarse random bitmap (fixed blocks of a shorter calibration)."""
    side = int(rng.integers(6, 24))
    bits = torch.from_numpy(rng.random((side, side)) < rng.uniform(0.05, 0.5))
    size = grid.num_k_blocks
    return bits[grid.q_blocks() * side // size, grid.k_blocks() * side // size]


def growing_window(grid: BlockGrid, rng: np.random.Generator) -> Choice:
    """A window that grows along the rows, beside a thick sink."""
    width = int(rng.integers(1, 8)) + float(rng.uniform(0.0, 0.3)) * grid.q_blocks()
    return (grid.q_blocks() - grid.k_blocks() < width) | (grid.k_blocks() < int(rng.integers(0, 6)))


def documents(grid: BlockGrid, rng: np.random.Generator) -> Choice:
    """Packed documents: triangles along the diagonal."""
    cuts = torch.from_numpy(np.sort(rng.integers(0, grid.num_k_blocks, int(rng.integers(2, 9)))))
    return torch.searchsorted(cuts, grid.q_blocks()) == torch.searchsorted(cuts, grid.k_blocks())


FAMILIES: tuple[Family, ...] = (
    vertical_slash,
    clustered_topk,
    dilated,
    powers,
    stretched_bitmap,
    growing_window,
    documents,
)


@dataclass(frozen=True)
class HeldOutPlan:
    """One layer: `kinds` different choices dealt to the KV groups or to single heads.

    Attributes:
        length: tokens.
        head_dim: elements per head.
        seed: draws the rest; a negative one means dense.
        num_heads: query heads.
        num_kv_heads: KV heads.
    """

    length: int
    head_dim: int
    seed: int
    num_heads: int = 32
    num_kv_heads: int = 8

    @property
    def grid(self) -> BlockGrid:
        """Tiles of 128."""
        return BlockGrid(self.length, self.length, 128)

    def head_tiles(self) -> HeadTiles:
        """Three to eight choices, perhaps one of them dense; heads of a group agree in half of the plans."""
        if self.seed < 0:
            return HeadTiles(self.grid.reachable()[None], (0,) * self.num_heads)
        rng = np.random.default_rng([self.seed, self.length, self.head_dim])
        chosen = [FAMILIES[rng.integers(len(FAMILIES))] for _ in range(int(rng.integers(3, 9)))]
        if rng.random() < 0.4:
            chosen.append(dense)
        always = self.grid.diagonal()
        choices = torch.stack([(family(self.grid, rng) | always) & self.grid.reachable() for family in chosen])
        per_group = self.num_heads // self.num_kv_heads
        if rng.random() < 0.5:
            of_head = np.repeat(rng.integers(len(chosen), size=self.num_kv_heads), per_group)
        else:
            of_head = rng.integers(len(chosen), size=self.num_heads)
        return HeadTiles(choices, tuple(int(index) for index in of_head))

    def schedule(self, workers: Workers, kernel: Backend, dtype_bytes: int = 2) -> TileSchedule:
        """What the kernel runs; on the CPU."""
        return build_schedule(
            (Span(self.grid),),
            [self.head_tiles()],
            num_kv_heads=self.num_kv_heads,
            shape=tile_shape(kernel, self.head_dim, 128),
            workers=workers,
            head_bytes=self.head_dim * dtype_bytes,
        )

    def to_dict(self) -> dict[str, Any]:
        """Its parameters, from which it is made again."""
        return asdict(self)


def held_out_plans(
    lengths: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536, 131072),
    head_dims: tuple[int, ...] = (128, 64),
    per_shape: int = 5,
) -> Iterator[HeldOutPlan]:
    """`per_shape` plans for every length and head size."""
    for head_dim in head_dims:
        for length in lengths:
            for seed in range(per_shape):
                yield HeldOutPlan(length, head_dim, seed)
