"""pooled_mass: per query block, the key blocks that carry a share of a pooled attention map, but never fewer than a share of the blocks."""

from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.errors import SpecError
from sparsesearch.estimators import block_means, rows_per_block
from sparsesearch.order import IDENTITY, AnyOrder, Tile
from sparsesearch.rules.base import Rule
from sparsesearch.selection import top_k, top_p
from sparsesearch.tile_cover import complete, dense_pairs, layout_of


class PooledMass(Rule):
    """A_p = softmax_j(q̄_p·k̄_j + log n_j); row p keeps its smallest set of blocks with A >= `mass`, and at least its ⌈keep·n⌉ best of n.

    n counts the blocks that the layout does not make dense; those are computed and take no part. The diagonal is always in.

    Sources: Rectified SpaAttn, arXiv:2511.19835 (public code: top-p 0.3, at least 10 to 25 % of the blocks); PISA, arXiv:2602.01077 (mass 0:
    top-k alone, 10 to 15 %). Differs: spatial neighbours and the first frame are not forced; dense text takes no part in the share.
    """

    source: ClassVar[str] = "Rectified SpaAttn, arXiv:2511.19835; PISA, arXiv:2602.01077"
    dynamic: ClassVar[bool] = True
    needs_layout: ClassVar[bool] = True
    kind: Literal["pooled_mass"] = "pooled_mass"
    keep: float = Field(gt=0, le=1, description="least share of each row's blocks")
    mass: float = Field(
        0.0, ge=0, le=1, description="share of the pooled map that is kept where more blocks are needed for it"
    )
    order: AnyOrder = IDENTITY

    def select(
        self, grid: BlockGrid, q: Float[Tensor, "*unit S D"] | None = None, k: Float[Tensor, "*unit T D"] | None = None
    ) -> Bool[Tensor, "*unit M N"]:
        """The best tiles of each row; ties go to the earlier block."""
        layout_of(grid, self.label)
        if q is None or k is None:
            raise SpecError("pooled_mass must be given this call's queries and keys; use it in prefill only.")
        free = grid.reachable(q.device) & ~dense_pairs(grid, self.order).to(q.device)
        counts = rows_per_block(grid.kv_len, grid, 0, k.device)[:, 0]
        scores = block_means(q, grid, grid.q_start) @ block_means(k, grid, 0).transpose(-1, -2) + counts.log()
        scores = scores.masked_fill(~free, -torch.inf)
        budget = (self.keep * free.sum(-1, keepdim=True) - 1e-6).ceil().long()
        tiles = top_k(scores, budget)
        if self.mass:
            tiles = top_p(scores.softmax(-1).nan_to_num(0.0), self.mass, tiles)  # rows of text have no free tile
        return complete(tiles & free, grid, self.order)

    @classmethod
    def examples(cls) -> list[Self]:
        """Top-k, top-p with a floor, another order."""
        return [cls(keep=0.1), cls(keep=0.1, mass=0.3), cls(keep=0.25, mass=0.9, order=Tile(2, 4, 4))]
