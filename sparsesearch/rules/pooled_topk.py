"""pooled_topk: per query block, the key blocks whose mean key scores highest against the mean query."""

from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from sparsesearch.block_mask import BlockGrid, blocks_of
from sparsesearch.errors import SpecError
from sparsesearch.estimators import block_means
from sparsesearch.rules.base import Law, LengthLaw, Rule
from sparsesearch.selection import top_k


class PooledTopk(Rule):
    """Top-k key blocks per query block by pooled scores; the first blocks and the diagonal are always in.

    score[p, j] = mean(q in block p) · mean(k in block j);  row p keeps its k_p best reachable blocks, k_p = max(1, ⌈keep(n_p)/block⌉), where
    n_p is the number of keys row p can see. The sink blocks and the diagonal count towards k_p.

    Source: Jiang et al. 2024, MInference, arXiv:2407.02490, section 3.3 (block-sparse heads: mean pooling over 64, top-k). Differs: the
    budget follows each row's own length; MInference keeps 100 blocks at every length.
    """

    source: ClassVar[str] = "MInference, arXiv:2407.02490"
    dynamic: ClassVar[bool] = True
    kind: Literal["pooled_topk"] = "pooled_topk"
    keep: Law = Field(description="keys kept per query: a number, or {a, b} for a + b·(keys the row can see)")
    sink: int = Field(64, ge=0, description="tokens at the start that are always in")

    def select(
        self, grid: BlockGrid, q: Float[Tensor, "*unit S D"] | None = None, k: Float[Tensor, "*unit T D"] | None = None
    ) -> Bool[Tensor, "*unit M N"]:
        """Top-k tiles per row; ties go to the earlier block."""
        if q is None or k is None:
            raise SpecError("pooled_topk must be given this call's queries and keys; use it in prefill only.")
        return self.chosen(grid, *self.votes(grid, q, k))

    @property
    def ballot(self) -> int:
        """How many first tokens are always in."""
        return self.sink

    def votes(
        self, grid: BlockGrid, q: Float[Tensor, "*unit S D"], k: Float[Tensor, "*unit T D"]
    ) -> tuple[Float[Tensor, "*unit M N"], Bool[Tensor, "M N"]]:
        """Pooled scores, infinite where a tile is always in or never, and the tiles that always are."""
        scores = block_means(q, grid, grid.q_start) @ block_means(k, grid, 0).transpose(-1, -2)
        always = grid.diagonal(q.device) | (grid.k_blocks(q.device) < blocks_of(self.sink, grid.block_tokens))
        return scores.masked_fill(always, torch.inf).masked_fill(~grid.reachable(q.device), -torch.inf), always

    def chosen(self, grid: BlockGrid, *votes: Tensor) -> Bool[Tensor, "*unit M N"]:
        """Each row's best tiles, as many as its budget has."""
        scores, always = votes
        best = top_k(scores, self.keep.row_blocks(grid, scores.device))
        return grid.reachable(scores.device) & (best | always)

    def keeps_all(self, grid: BlockGrid) -> bool:
        """Where every row's budget is all that it can reach: a budget grows no faster than the keys, so the last row decides."""
        return max(1, blocks_of(self.keep.tokens(grid.kv_len), grid.block_tokens)) >= grid.num_k_blocks

    @classmethod
    def examples(cls) -> list[Self]:
        """One block, a share of the row, no sink."""
        return [cls(keep=LengthLaw(a=1)), cls(keep=LengthLaw(b=0.25)), cls(keep=LengthLaw(a=128, b=0.1), sink=0)]
