"""power_lags: the nearest segments, and those at distances that are powers of two."""

from typing import ClassVar, Literal, Self

from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from sparsesearch.block_mask import BlockGrid, blocks_of
from sparsesearch.rules.base import Rule


class PowerLags(Rule):
    """Sink, local window, and segments 1, 2, 4, 8, … segments back, so that every key is reached within log2(N) layers.

    With Δ the distance of query and key in segments: computed  iff  Δ >= 0  and  (Δ < window  or  key segment < sink  or  Δ is a power of 2).

    Source: Chen et al. 2025, PowerAttention, arXiv:2503.03588, section 3.2 (block 256, window of 5 blocks, sink of 1, 2 of 7 layers dense).
    Differs: a segment may be several tiles; nothing can be forgotten while decoding, since later queries reach other segments.
    The published gains are after continued training.
    """

    source: ClassVar[str] = "PowerAttention, arXiv:2503.03588"
    kind: Literal["power_lags"] = "power_lags"
    segment: int = Field(256, ge=1, description="tokens per segment, rounded up to whole tiles")
    window: int = Field(5, ge=1, description="nearest segments, the query's own included")
    sink: int = Field(1, ge=0, description="first segments")

    def select(
        self, grid: BlockGrid, q: Float[Tensor, "*unit S D"] | None = None, k: Float[Tensor, "*unit T D"] | None = None
    ) -> Bool[Tensor, "M N"]:
        """Tiles of the chosen segments."""
        tiles = blocks_of(self.segment, grid.block_tokens)
        key = grid.k_blocks() // tiles
        lag = (grid.q_blocks() // tiles - key).abs()
        power = (lag & (lag - 1)) == 0
        return grid.reachable() & ((lag < self.window) | (key < self.sink) | power)

    @classmethod
    def examples(cls) -> list[Self]:
        """The paper's, the shortest, one tile per segment."""
        return [cls(), cls(segment=1, window=1, sink=0), cls(segment=64, window=2, sink=3)]
