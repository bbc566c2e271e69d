"""partition_gate: chunks of keys on a grid of one, two or three axes; the pairs of query block and chunk that are most alike are computed."""

from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from sparsesearch.block_mask import BlockGrid, blocks_of
from sparsesearch.errors import SpecError
from sparsesearch.estimators import block_means, rows_per_block
from sparsesearch.order import IDENTITY, AnyOrder, Tile
from sparsesearch.rules.base import Rule
from sparsesearch.selection import top_p
from sparsesearch.tile_cover import complete, dense_pairs, layout_of


class PartitionGate(Rule):
    """g[p, c] = mean(q in p)·mean(k in chunk c), scaled to [0, 1] over the head; the largest pairs are kept until Σ g reaches `share` of its total.

    Chunks are `chunk` consecutive tokens of the order: with identity, whole frames (1-D, over time); with tile(0,h,w), patches through all
    frames (2-D); with tile(t,h,w), boxes (3-D). `scope` head: one threshold for all queries of the head, so that some keep more than others; row:
    one per query block. The own chunk is always kept and counts first. The published model takes the three partitions in turn, layer by layer: see
    `plan.cyclic_plan`, or give all three to the search.

    Source: Wu et al. 2025, VMoBA, arXiv:2506.23858, section 3 and public code (chunk means, 1-D/2-D/3-D in turn, threshold .25 of the summed
    similarity over a head). Differs: one gate per query block instead of per query, and whole tiles.
    """

    source: ClassVar[str] = "Wu et al. 2025, VMoBA, arXiv:2506.23858"
    dynamic: ClassVar[bool] = True
    needs_layout: ClassVar[bool] = True
    kind: Literal["partition_gate"] = "partition_gate"
    share: float = Field(gt=0, le=1, description="of the summed similarity")
    chunk: int = Field(256, ge=1, description="tokens per chunk, rounded up to whole tiles")
    scope: Literal["head", "row"] = Field("head", description="what one threshold is for")
    order: AnyOrder = IDENTITY

    def select(
        self, grid: BlockGrid, q: Float[Tensor, "*unit S D"] | None = None, k: Float[Tensor, "*unit T D"] | None = None
    ) -> Bool[Tensor, "*unit M N"]:
        """Tiles of the kept chunks; ties go to the earlier query block, then to the earlier chunk."""
        layout_of(grid, self.label)
        if q is None or k is None:
            raise SpecError("partition_gate must be given this call's queries and keys; use it in prefill only.")
        tiles = blocks_of(self.chunk, grid.block_tokens)
        dense = dense_pairs(grid, self.order).to(q.device)
        free_rows, free_columns = ~dense.all(-1, keepdim=True), ~dense.all(0)
        sizes = rows_per_block(grid.kv_len, grid, 0, k.device) * free_columns[:, None]
        pad = (0, 0, 0, -grid.num_k_blocks % tiles)
        totals, tokens = (
            F.pad(x, pad).unflatten(-2, (-1, tiles)).sum(-2) for x in (block_means(k, grid, 0) * sizes, sizes)
        )
        gate = block_means(q, grid, grid.q_start) @ (totals / tokens.clamp(min=1)).transpose(-1, -2)
        number = torch.arange(gate.shape[-1], device=q.device)
        own = (number == grid.q_blocks(q.device) // tiles) & free_rows
        open_pairs = free_rows & (tokens[:, 0] > 0)
        if grid.causal:
            open_pairs = open_pairs & (number <= grid.q_blocks(q.device) // tiles)
        kept = self._kept(gate, own, open_pairs) & open_pairs
        return complete(kept.repeat_interleave(tiles, -1)[..., : grid.num_k_blocks], grid, self.order)

    def _kept(
        self, gate: Float[Tensor, "*unit M C"], own: Bool[Tensor, "M C"], open_pairs: Bool[Tensor, "M C"]
    ) -> Bool[Tensor, "*unit M C"]:
        low = gate.masked_fill(~open_pairs, torch.inf).amin((-1, -2), keepdim=True)
        high = gate.masked_fill(~open_pairs, -torch.inf).amax((-1, -2), keepdim=True)
        scaled = ((gate - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).nan_to_num(0.0) * open_pairs
        if self.scope == "row":
            return top_p(scaled, self.share, own)
        kept: Tensor = top_p(scaled.flatten(-2), self.share, own.flatten()).unflatten(-1, gate.shape[-2:])
        return kept

    @classmethod
    def examples(cls) -> list[Self]:
        """The published threshold over the three partitions."""
        return [
            cls(share=0.25),
            cls(share=0.25, chunk=128, order=Tile(0, 4, 4)),
            cls(share=0.5, chunk=64, order=Tile(4, 4, 4), scope="row"),
        ]
