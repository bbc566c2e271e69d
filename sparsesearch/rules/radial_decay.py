"""radial_decay: the further apart two frames, the narrower the band of positions between them, and at last only every n-th frame."""

from typing import Any, ClassVar, Literal, Self

import numpy as np
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.order import IDENTITY, AnyOrder
from sparsesearch.rules.base import Rule
from sparsesearch.tile_cover import boxes_of, complete, layout_of, tiles_of_pairs


class RadialDecay(Rule):
    """Frames at distance Δ see positions s with |s_q - s_k| <= width(Δ).

    P = tokens of a frame, u(Δ) = 2^(bits(P) - bits(Δ)), bits = length in binary digits:
        Δ <= 1: everything;  else width(Δ) = max(decay·u(Δ), floor), and Δ counts only if u(Δ) >= floor or Δ mod ⌊floor/u(Δ)⌋ = 0.
    With `first_frame`, every query also sees frame 0.

    Source: Li et al. 2025, Radial Attention, arXiv:2506.19852, section 4.2 (public mask code; floor 128; decay 0.95 for HunyuanVideo, 0.2 for
    Wan 2.1, whose frame 0 is a full column). Differs: tiles that hold any kept pair; the code drops thinly filled ones and with them, at
    frame sizes that are no multiple of 128, whole query rows.
    """

    source: ClassVar[str] = "Li et al. 2025, Radial Attention, arXiv:2506.19852"
    needs_layout: ClassVar[bool] = True
    kind: Literal["radial_decay"] = "radial_decay"
    decay: float = Field(gt=0, description="factor on the width")
    floor: int = Field(
        128, ge=1, description="tokens below which a band is thinned out over frames instead of narrowed"
    )
    first_frame: bool = Field(False, description="frame 0 is a full column")
    order: AnyOrder = IDENTITY

    def select(
        self, grid: BlockGrid, q: Float[Tensor, "*unit S D"] | None = None, k: Float[Tensor, "*unit T D"] | None = None
    ) -> Bool[Tensor, "M N"]:
        """Tiles that hold a kept pair."""
        layout = layout_of(grid, self.label)
        frames, height, width = layout.grid_shape
        boxes = boxes_of(layout, self.order, grid.block_tokens, (1, 1, 1))
        reach = [self.width(distance, height * width) for distance in range(frames)]

        def pairs(rows: slice) -> Any:
            apart = _gap(boxes.lo[rows, 1], boxes.hi[rows, 1], boxes.lo[:, 1], boxes.hi[:, 1])
            nearest = _gap(boxes.lo[rows, 0], boxes.hi[rows, 0], boxes.lo[:, 0], boxes.hi[:, 0])
            farthest = np.maximum(boxes.hi[:, 0] - boxes.lo[rows, None, 0], boxes.hi[rows, None, 0] - boxes.lo[:, 0])
            kept = np.zeros(apart.shape, bool)
            for distance, allowed in enumerate(reach):
                kept |= (nearest <= distance) & (distance <= farthest) & (apart <= allowed)
            return kept | (boxes.lo[:, 0] == 0) if self.first_frame else kept

        return complete(tiles_of_pairs(grid, boxes, pairs), grid, self.order)

    def width(self, distance: int, frame_tokens: int) -> float:
        """Widest difference of positions that frames at this distance keep; -1 if they see nothing of each other."""
        if distance <= 1:
            return float(frame_tokens)
        unit = 2.0 ** (frame_tokens.bit_length() - distance.bit_length())
        if unit < self.floor and distance % int(self.floor / unit):
            return -1.0
        return max(self.decay * unit, float(self.floor))

    @classmethod
    def examples(cls) -> list[Self]:
        """HunyuanVideo's and Wan's settings; a low floor for small videos."""
        return [cls(decay=0.95), cls(decay=0.2, first_frame=True), cls(decay=0.5, floor=8)]


def _gap(lo_q: Any, hi_q: Any, lo_k: Any, hi_k: Any) -> Any:
    """Smallest difference between a member of one interval and one of another."""
    return np.maximum(np.maximum(lo_k - hi_q[:, None], lo_q[:, None] - hi_k), 0)
