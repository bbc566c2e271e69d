"""Attention layers of published video transformers, and static rules for their heads at a wanted density."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from sparsesearch.block_mask import BlockGrid, density
from sparsesearch.layout import Layout, video_layout
from sparsesearch.order import TOKEN_MAJOR, Tile
from sparsesearch.rules.base import LengthLaw, Rule
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.diagonal_band import DiagonalBand
from sparsesearch.rules.first_frames import FirstFrames
from sparsesearch.rules.neighbourhood import Neighbourhood
from sparsesearch.rules.zero import Zero

BLOCK_TOKENS = 128
DENSITIES = (0.25, 0.35, 0.45)
"""Timed besides each model's published one."""
Mix = Literal["spatial", "temporal", "bands", "modes"]


@dataclass(frozen=True)
class VideoModel:
    """One attention layer of a published model, and what Sparse-vDiT reports of the whole.

    Attributes:
        share: attention's part of the dense model's operations (4·N²·d·layers·passes over the stated total).
        density: implied by the reported operations.
        published_speedup: end to end, Sparse-vDiT.
    """

    name: str
    layout: Layout
    num_heads: int
    head_dim: int
    share: float
    density: float
    published_speedup: float


MODELS = (
    VideoModel("CogVideoX1.5-5B", video_layout(11, 48, 85, text_first=226), 48, 64, 0.71, 0.265, 1.76),
    VideoModel("Wan2.1-14B", video_layout(21, 45, 80), 40, 128, 0.71, 0.438, 1.58),
    VideoModel("HunyuanVideo", video_layout(33, 45, 80, text_last=256), 24, 128, 0.85, 0.320, 1.85),
)


def grid_of(layout: Layout) -> BlockGrid:
    """The whole sequence against itself."""
    return BlockGrid(layout.num_tokens, layout.num_tokens, BLOCK_TOKENS, causal=False, layout=layout)


@lru_cache(maxsize=64)
def mixed_rules(layout: Layout, num_heads: int, mix: Mix, target: float) -> tuple[Rule, ...]:
    """Rules of one layer whose density is as close to `target` as the band's reach allows.

    spatial: frame-major bands, no copies. temporal: token-major bands, every head copied. bands: half of each. modes: of every 12 heads one
    is dense, one zero, one sees the first frame, the others are spatial and temporal bands and one neighbourhood of boxes in turn.
    """
    low, high = 0.0, 1.0
    for _ in range(16):
        middle = (low + high) / 2
        if layer_density(layout, rules_of(num_heads, mix, middle)) < target:
            low = middle
        else:
            high = middle
    return rules_of(num_heads, mix, high)


def rules_of(num_heads: int, mix: Mix, reach: float) -> tuple[Rule, ...]:
    """A mix whose bands reach over this share of the tokens."""
    spatial = DiagonalBand(reach=LengthLaw(b=reach))
    temporal = DiagonalBand(reach=LengthLaw(b=reach), order=TOKEN_MAJOR)
    boxes = Neighbourhood(window=(0, 13, 25), order=Tile(4, 4, 8))
    cycle: tuple[Rule, ...]
    match mix:
        case "spatial":
            cycle = (spatial,)
        case "temporal":
            cycle = (temporal,)
        case "bands":
            cycle = (spatial, temporal)
        case "modes":
            cycle = (
                Dense(),
                spatial,
                temporal,
                FirstFrames(),
                temporal,
                spatial,
                Zero(),
                temporal,
                spatial,
                boxes,
                spatial,
                temporal,
            )
    return tuple(cycle[head % len(cycle)] for head in range(num_heads))


def layer_density(layout: Layout, rules: Sequence[Rule]) -> float:
    """Mean density of the heads."""
    grid = grid_of(layout)
    return sum(_rule_density(rule, grid) for rule in rules) / len(rules)


@lru_cache(maxsize=256)
def _rule_density(rule: Rule, grid: BlockGrid) -> float:
    return density(rule.select(grid), grid)
