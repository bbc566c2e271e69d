"""draft_attention: a low-resolution attention map of each frame's patches decides which tiles to compute."""

from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.errors import SpecError
from sparsesearch.estimators import block_means
from sparsesearch.order import AnyOrder, Tile
from sparsesearch.rules.base import Rule
from sparsesearch.tile_cover import complete, dense_pairs, layout_of


class DraftAttention(Rule):
    """A = softmax over blocks of mean(q in p)·mean(k in j); the head keeps the share `keep` of all its entries that are largest.

    Blocks are the patches of the order: with tile(1,8,16) and blocks of 128, mean pooling over 8 x 16 tokens of one frame. The threshold
    is one quantile of the whole head's map, so rows get different budgets; the own tile is always in, so none is empty. Blocks that the
    layout makes dense are computed and take no part in the map.

    Source: Shen et al. 2025, DraftAttention, arXiv:2505.14708, section 3 (public code: average pooling 8 x 16, quantile per head). Differs:
    frame sizes need not divide; the diagonal is kept.
    """

    source: ClassVar[str] = "Shen et al. 2025, DraftAttention, arXiv:2505.14708"
    dynamic: ClassVar[bool] = True
    needs_layout: ClassVar[bool] = True
    kind: Literal["draft_attention"] = "draft_attention"
    keep: float = Field(gt=0, le=1, description="share of the head's tiles")
    order: AnyOrder = Tile(1, 8, 16)

    def select(
        self, grid: BlockGrid, q: Float[Tensor, "*unit S D"] | None = None, k: Float[Tensor, "*unit T D"] | None = None
    ) -> Bool[Tensor, "*unit M N"]:
        """The tiles at or above the head's threshold."""
        layout_of(grid, self.label)
        if q is None or k is None:
            raise SpecError("draft_attention must be given this call's queries and keys; use it in prefill only.")
        free = ~dense_pairs(grid, self.order).to(q.device) & grid.reachable(q.device)
        scores = block_means(q, grid, grid.q_start) @ block_means(k, grid, 0).transpose(-1, -2)
        draft = (
            scores.float().masked_fill(~free, -torch.inf).softmax(-1).nan_to_num(0.0)
        )  # rows of dense tiles are empty
        entries = draft.flatten(-2).masked_fill(~free.flatten(), -1.0)
        count = max(1, round(self.keep * int(free.sum())))
        kept = torch.zeros_like(entries, dtype=torch.bool).scatter(-1, entries.topk(count, -1).indices, True)
        return complete(kept.unflatten(-1, free.shape) & free, grid, self.order)

    @classmethod
    def examples(cls) -> list[Self]:
        """The paper's 0.1 and 0.25, and small patches."""
        return [cls(keep=0.1), cls(keep=0.25), cls(keep=0.3, order=Tile(1, 4, 4))]
