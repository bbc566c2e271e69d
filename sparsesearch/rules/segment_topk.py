"""segment_topk: first the best segments of the past, then the best blocks in them; earlier rows may get a larger share than later ones."""

from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from sparsesearch.block_mask import BlockGrid, blocks_of
from sparsesearch.errors import SpecError
from sparsesearch.estimators import block_means, rows_per_block
from sparsesearch.rules.base import Rule
from sparsesearch.selection import top_k


class SegmentTopk(Rule):
    """Two-level top-k, with a budget that falls along the sequence while its total stays fixed.

    Segments of `segment` tokens; query block p of segment c scores segment s by mean(q)·mean(k in s) and keeps the best `segments` of them,
    beside the first, its own and the one before. Within these, it keeps its best blocks by mean(q)·mean(k in block).
    Share of row p: d_c = min(1, β·(c + 1)^-decay), β such that Σ_p (p + 1)·β·(c + 1)^-decay = keep·Σ_p (p + 1). With decay 0 every row has
    the same share; the published method leaves the first chunk dense, which a decay near 1 approaches.

    Source: Lv et al. 2026, Light Forcing, arXiv:2602.04789 (chunk-aware growth of sparsity, s_i = s_base - α_i·β with β from the budget;
    frame top-k, then block top-k, sink, recent and current frames kept). Differs: α_i is our power law, frames are segments of a causal text,
    and the published quality is after fine-tuning.
    """

    source: ClassVar[str] = "Light Forcing, arXiv:2602.04789"
    dynamic: ClassVar[bool] = True
    kind: Literal["segment_topk"] = "segment_topk"
    keep: float = Field(gt=0, le=1, description="share of all reachable tiles")
    decay: float = Field(0.5, ge=0, le=2, description="how fast the share falls along the sequence")
    segment: int = Field(512, ge=1, description="tokens per segment, rounded up to whole tiles")
    segments: int = Field(4, ge=0, description="past segments kept beside the first, the previous and the current one")

    def select(
        self, grid: BlockGrid, q: Float[Tensor, "*unit S D"] | None = None, k: Float[Tensor, "*unit T D"] | None = None
    ) -> Bool[Tensor, "*unit M N"]:
        """Best blocks of the best segments; ties go to the earlier one."""
        if q is None or k is None:
            raise SpecError("segment_topk must be given this call's queries and keys; use it in prefill only.")
        reachable, tiles = grid.reachable(q.device), blocks_of(self.segment, grid.block_tokens)
        queries, keys = block_means(q, grid, grid.q_start), block_means(k, grid, 0)
        inside = self._segments(queries, keys, grid, tiles).repeat_interleave(tiles, -1)[..., : grid.num_k_blocks]
        always = grid.diagonal(q.device) | (grid.k_blocks(q.device) == 0)
        scores = (queries @ keys.transpose(-1, -2)).masked_fill(~(inside & reachable), -torch.inf)
        scores = scores.masked_fill(always, torch.inf)
        chosen = top_k(scores, self.row_blocks(grid, q.device)) & (scores > -torch.inf)
        return reachable & (chosen | always)

    def row_blocks(self, grid: BlockGrid, device: torch.device | str) -> Int[Tensor, "M 1"]:
        """Tiles of each row under the law; of a later chunk's rows as of the whole sequence's."""
        every = torch.arange(grid.num_k_blocks, device=device)
        power = (every // blocks_of(self.segment, grid.block_tokens) + 1).double() ** -self.decay
        reach = (every + 1).double() if grid.causal else torch.full_like(power, grid.num_k_blocks)
        beta = self.keep * reach.sum() / (reach * power).sum()
        tiles = (reach * (beta * power).clamp(max=1)).floor().clamp(min=1).long()
        return tiles[grid.first_q_block :, None]

    def _segments(
        self, queries: Float[Tensor, "*unit M D"], keys: Float[Tensor, "*unit N D"], grid: BlockGrid, tiles: int
    ) -> Bool[Tensor, "*unit M n"]:
        """Segments each row keeps."""
        sizes = rows_per_block(grid.kv_len, grid, 0, keys.device)
        pad = (0, 0, 0, -grid.num_k_blocks % tiles)
        totals, tokens = (F.pad(x, pad).unflatten(-2, (-1, tiles)).sum(-2) for x in (keys * sizes, sizes))
        scores = queries @ (totals / tokens).transpose(-1, -2)
        number = torch.arange(scores.shape[-1], device=keys.device)
        own = grid.q_blocks(keys.device) // tiles
        always = (
            (number == 0) | ((number <= own) & (number >= own - 1)) if grid.causal else (number == 0) | (number == own)
        )
        past = number < own if grid.causal else torch.ones_like(always)
        return (top_k(scores.masked_fill(always | ~past, -torch.inf), self.segments) & past) | always

    @classmethod
    def examples(cls) -> list[Self]:
        """Equal shares, falling shares, forced segments only."""
        return [
            cls(keep=0.25, decay=0),
            cls(keep=0.25, decay=1, segment=128, segments=1),
            cls(keep=0.1, segment=64, segments=0),
        ]
