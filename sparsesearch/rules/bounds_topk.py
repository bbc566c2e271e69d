"""bounds_topk: the key blocks whose bounds allow the highest score, chosen anew for every decoded token."""

from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from sparsesearch.block_mask import BlockGrid, blocks_of
from sparsesearch.errors import SpecError
from sparsesearch.estimators import block_bounds, block_means
from sparsesearch.rules.base import Law, LengthLaw, Rule
from sparsesearch.selection import top_k
from sparsesearch.step_blocks import StepBlocks


class BoundsTopk(Rule):
    """Top-k key blocks by an upper bound of q·k over the block; the first blocks and the newest one are always in.

    u[j] = Σ_d max(q_d·min_{i in j} k_{i,d}, q_d·max_{i in j} k_{i,d}) >= max_{i in j} q·k_i. A decoded token keeps the ⌈keep(N)/block⌉ best
    blocks, N its prompt's length. The cache stays whole; what falls is what a step reads. A search prices the choice and the blocks of every query
    head (`cost.step_work`), and knows the loss from what the late queries of a profile would choose (`profiling.step_outputs`).

    Source: Tang et al. 2024, Quest, arXiv:2406.10774, section 3.3 and algorithm 1 (pages of 16 tokens, token budgets of 256 to 4096, the
    first two layers dense, the prompt dense). Differs: a page is a tile; with `prefill` the mean query of a block chooses for its block, at
    the budget of the keys its row can see, which the paper does not do.
    """

    source: ClassVar[str] = "Quest, arXiv:2406.10774"
    dynamic: ClassVar[bool] = True
    decodes: ClassVar[bool] = True
    reads_bounds: ClassVar[bool] = True
    kind: Literal["bounds_topk"] = "bounds_topk"
    keep: Law = Field(description="keys kept per query: a number or {a, b} for a + b·N")
    sink: int = Field(64, ge=0, description="tokens at the start that are always in")
    prefill: bool = Field(False, description="whether the prompt is sparse too, by the mean query of each block")

    def select(
        self, grid: BlockGrid, q: Float[Tensor, "*unit S D"] | None = None, k: Float[Tensor, "*unit T D"] | None = None
    ) -> Bool[Tensor, "*#unit M N"]:
        """Top-k blocks by their bounds; ties go to the earlier block. Everything in a prompt unless `prefill`."""
        if q is None or k is None:
            raise SpecError("bounds_topk must be given this call's queries and keys.")
        reachable = grid.reachable(q.device)
        if grid.q_len > 1 and not self.prefill:
            return reachable
        low, high = (bound.transpose(-1, -2) for bound in block_bounds(k, grid))
        query = block_means(q, grid, grid.q_start)
        scores = query.clamp(min=0) @ high + query.clamp(max=0) @ low
        always = grid.diagonal(q.device) | (grid.k_blocks(q.device) < blocks_of(self.sink, grid.block_tokens))
        scores = scores.masked_fill(always, torch.inf).masked_fill(~reachable, -torch.inf)
        decoding = grid.q_len == 1
        count = max(1, self.keep.blocks(grid)) if decoding else self.keep.row_blocks(grid, q.device)
        return reachable & (top_k(scores, count) | always)

    def step_tiles(self, q: Float[Tensor, "B g size D"], blocks: StepBlocks) -> Bool[Tensor, "B g size N"]:
        """Top-k blocks by the bounds that the cache keeps."""
        there = blocks.there()
        always = (blocks.index == blocks.newest) | (blocks.index < blocks_of(self.sink, blocks.block_tokens))
        scores = blocks.upper_bounds(q).masked_fill(always, torch.inf).masked_fill(~there, -torch.inf)
        count = self.keep.blocks_at(blocks.law_tokens, blocks.block_tokens).clamp(min=1)
        return there & (top_k(scores, count) | always)

    def step_tokens(self, grid: BlockGrid) -> int:
        """The budget in whole blocks, or the blocks that are always in if these are more; the newest block may be partly filled."""
        first = blocks_of(self.sink, grid.block_tokens)
        always = min(first + 1, grid.num_k_blocks)
        count = min(max(1, self.keep.blocks(grid), always), grid.num_k_blocks)
        return (count - grid.num_k_blocks) * grid.block_tokens + grid.kv_len

    def keeps_all(self, grid: BlockGrid) -> bool:
        """A prompt, unless it is chosen for."""
        return grid.q_len > 1 and not self.prefill

    @classmethod
    def examples(cls) -> list[Self]:
        """One block, a middle budget of the paper, a sparse prompt."""
        return [cls(keep=LengthLaw(a=1), sink=0), cls(keep=LengthLaw(a=256)), cls(keep=LengthLaw(b=0.25), prefill=True)]
