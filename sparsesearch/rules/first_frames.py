"""first_frames: every query sees the first frames, and little else."""

from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.order import IDENTITY, AnyOrder, Tile
from sparsesearch.rules.base import Rule
from sparsesearch.tile_cover import complete, cover, layout_of


class FirstFrames(Rule):
    """Columns: key (f, y, x) is kept for every query iff f < frames; the own tile always is.

    The static part of vertical stripes: image-to-video models attend to the given frame from everywhere. Join it to a band with `union`.

    Sources: Sparse-vDiT, arXiv:2506.03065, section 3 (vertical stripes; which columns is unpublished); Li et al. 2025, Radial Attention,
    arXiv:2506.19852 (first frame as a column). Text columns follow the layout's policy.
    """

    source: ClassVar[str] = "Sparse-vDiT, arXiv:2506.03065; Radial Attention, arXiv:2506.19852"
    needs_layout: ClassVar[bool] = True
    kind: Literal["first_frames"] = "first_frames"
    frames: int = Field(1, ge=1, description="frames whose tokens every query sees")
    order: AnyOrder = IDENTITY

    def select(
        self, grid: BlockGrid, q: Float[Tensor, "*unit S D"] | None = None, k: Float[Tensor, "*unit T D"] | None = None
    ) -> Bool[Tensor, "M N"]:
        """Key blocks that hold a token of those frames, and the diagonal."""
        frames, height, width = layout_of(grid, self.label).grid_shape
        first = (torch.arange(frames) < self.frames).expand(frames, frames)
        anywhere = [torch.ones(size, size, dtype=torch.bool) for size in (height, width)]
        return complete(cover(grid, self.order, [first, *anywhere]), grid, self.order)

    @classmethod
    def examples(cls) -> list[Self]:
        """One frame; two, over boxes."""
        return [cls(), cls(frames=2, order=Tile(2, 4, 4))]
