"""diagonal_band: nearby places along an order of the video; frame-major it is the spatial head, token-major the temporal one."""

from typing import ClassVar, Literal, Self

from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.order import IDENTITY, TOKEN_MAJOR, AnyOrder, Tile
from sparsesearch.rules.base import Law, LengthLaw, Rule
from sparsesearch.tile_cover import complete, layout_of, path_interval


class DiagonalBand(Rule):
    """Places i and j along the order's path through the video with |i - j| < reach(n), n = tokens of the video.

    With the identity this is the diagonal (spatial) head; with axes(hwf) one band is, in the model's order, a diagonal every frame (temporal
    head). A band of reach b·n has density 1 - (1 - b)² in tokens: b = 1 - √(1 - density).

    Sources: Xi et al. 2025, Sparse VideoGen, arXiv:2502.01776, section 4.2 (spatial and temporal masks; its code takes
    b·n = ⌊F(1 - √(1 - density))·P/128⌋·128 for F frames of P tokens); Sparse-vDiT, arXiv:2506.03065, section 3 (diagonal and multi-diagonal
    modes, widths unpublished). Differs: whole tiles, so the pairs beside the band inside a chosen tile count too.
    """

    source: ClassVar[str] = "Sparse VideoGen, arXiv:2502.01776; Sparse-vDiT, arXiv:2506.03065"
    needs_layout: ClassVar[bool] = True
    kind: Literal["diagonal_band"] = "diagonal_band"
    reach: Law = Field(
        description="places on each side, 0 for the own tile only: a number or {a, b} for a + b·(video tokens)"
    )
    order: AnyOrder = IDENTITY

    def select(
        self, grid: BlockGrid, q: Float[Tensor, "*unit S D"] | None = None, k: Float[Tensor, "*unit T D"] | None = None
    ) -> Bool[Tensor, "M N"]:
        """Tiles whose nearest pair of places is closer than the reach."""
        layout = layout_of(grid, self.label)
        reach = self.reach.tokens(layout.segments[layout.grid_index].tokens)
        first, last = path_interval(grid, self.order)
        held = first <= last
        distance = (first[None, :] - last[:, None]).maximum(first[:, None] - last[None, :]).clamp(min=0)
        near = (distance < reach) & held[:, None] & held[None, :]
        return complete(near[grid.first_q_block :], grid, self.order)

    @classmethod
    def examples(cls) -> list[Self]:
        """Own tile, spatial, temporal, along boxes."""
        return [
            cls(reach=LengthLaw()),
            cls(reach=LengthLaw(b=0.15)),
            cls(reach=LengthLaw(b=0.15), order=TOKEN_MAJOR),
            cls(reach=LengthLaw(a=100), order=Tile(4, 4, 4)),
        ]
