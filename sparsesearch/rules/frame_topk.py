"""frame_topk: first the best frames for each query block, then the best blocks in them."""

from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.errors import SpecError
from sparsesearch.estimators import block_means
from sparsesearch.layout import Layout
from sparsesearch.order import IDENTITY, Order
from sparsesearch.rules.base import Rule
from sparsesearch.selection import top_k
from sparsesearch.tile_cover import complete, dense_pairs, layout_of


class FrameTopk(Rule):
    """Query block p keeps the best `frames` by mean(q in p)·mean(k in frame), beside the first, its own and the one before it.

    Inside these it keeps its ⌈keep·n⌉ best blocks by mean(q)·mean(k), of the n that the layout does not make dense. Blocks are counted in the model's own order; one that holds tokens of several frames belongs to all of them. The diagonal is always in.

    Source: Lv et al. 2026, Light Forcing, arXiv:2602.04789 (frame top-k beside sink, recent and current frames, refined by block top-k; the share
    falls from chunk to chunk: `step_schedule.chunk_densities`). Differs: one forced recent frame; the published quality is after fine-tuning.
    """

    source: ClassVar[str] = "Lv et al. 2026, Light Forcing, arXiv:2602.04789"
    dynamic: ClassVar[bool] = True
    needs_layout: ClassVar[bool] = True
    kind: Literal["frame_topk"] = "frame_topk"
    keep: float = Field(gt=0, le=1, description="share of each row's blocks")
    frames: int = Field(4, ge=0, description="frames kept beside the first, the own and the one before")

    @property
    def token_order(self) -> Order:
        """Frames are runs of tokens in the model's own order only."""
        return IDENTITY

    def select(
        self, grid: BlockGrid, q: Float[Tensor, "*unit S D"] | None = None, k: Float[Tensor, "*unit T D"] | None = None
    ) -> Bool[Tensor, "*unit M N"]:
        """Best blocks of the best frames; ties go to the earlier one."""
        layout = layout_of(grid, self.label)
        if q is None or k is None:
            raise SpecError("frame_topk must be given this call's queries and keys; use it in prefill only.")
        free = grid.reachable(q.device) & ~dense_pairs(grid, IDENTITY).to(q.device)
        queries, keys = block_means(q, grid, grid.q_start), block_means(k, grid, 0)
        holds = frames_of_blocks(layout, grid.block_tokens).to(q.device)
        kept = self._frames(queries, k, layout, holds[grid.first_q_block :])
        inside = (kept.float() @ holds.float().T > 0) & free
        always = grid.diagonal(q.device) & free
        scores = (queries @ keys.transpose(-1, -2)).masked_fill(~inside, -torch.inf).masked_fill(always, torch.inf)
        budget = (self.keep * free.sum(-1, keepdim=True) - 1e-6).ceil().long()
        return complete(top_k(scores, budget) & (inside | always), grid, IDENTITY)

    def _frames(
        self, queries: Float[Tensor, "*unit M D"], k: Tensor, layout: Layout, own: Bool[Tensor, "M F"]
    ) -> Bool[Tensor, "*unit M F"]:
        start, (count, height, width) = layout.grid_start, layout.grid_shape
        video = k[..., start : start + count * height * width, :].unflatten(-2, (count, -1))
        scores = queries @ video.mean(-2, dtype=torch.float32).transpose(-1, -2)
        before = torch.cat([own[:, 1:], torch.zeros_like(own[:, :1])], 1)
        always = own | before
        always[:, 0] = True
        best = top_k(scores.masked_fill(always, -torch.inf), self.frames) & ~always
        return best | always

    @classmethod
    def examples(cls) -> list[Self]:
        """A narrow and a wide share, forced frames only."""
        return [cls(keep=0.1, frames=2), cls(keep=0.5), cls(keep=0.25, frames=0)]


def frames_of_blocks(layout: Layout, block_tokens: int) -> Bool[Tensor, "N F"]:
    """Which frames each block of the model's own order holds tokens of."""
    frame = layout.coordinates()[:, 0]
    block = torch.arange(layout.num_tokens) // block_tokens
    found = torch.zeros(int(block[-1]) + 1, layout.grid_shape[0], dtype=torch.bool)
    found[block[frame >= 0], frame[frame >= 0]] = True
    return found
