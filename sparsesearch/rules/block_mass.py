"""block_mass: the tiles with most attention mass, measured exactly; dear, so it is refreshed at a few steps and kept in between."""

import math
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.errors import SpecError
from sparsesearch.order import IDENTITY, AnyOrder
from sparsesearch.rules.base import Rule
from sparsesearch.tile_cover import complete, dense_pairs, layout_of, segments_in_blocks

_STEP_ELEMENTS = 1 << 26


class BlockMass(Rule):
    """W[p, j] = Σ_{i in block p, m in block j} exp(q_i·k_m - LSE_i); each row keeps its ⌈keep·n⌉ heaviest tiles of n.

    n counts the blocks that the layout does not make dense. With `per_segment` the share is taken of each segment's blocks on its own, so
    that a long prompt does not crowd out the generation. Costs about one dense attention per choice: give the plan's schedule `refresh`
    steps (AdaSpa: 10 and 30 of 50).

    Sources: Xia et al. 2025, AdaSpa, arXiv:2502.21079, section 4 (exact mass from the LSE, rows share one sparsity, three sparsities per
    layer: see `head_sparsities`); Wang et al. 2025, SparseD, arXiv:2509.24014 (per segment, chosen once). Differs: the LSE is computed here
    and not kept from an earlier step.
    """

    source: ClassVar[str] = "AdaSpa, arXiv:2502.21079; SparseD, arXiv:2509.24014"
    dynamic: ClassVar[bool] = True
    needs_layout: ClassVar[bool] = True
    kind: Literal["block_mass"] = "block_mass"
    keep: float = Field(gt=0, le=1, description="share of each row's blocks")
    per_segment: bool = Field(False, description="take the share of every segment on its own")
    order: AnyOrder = IDENTITY

    def select(
        self, grid: BlockGrid, q: Float[Tensor, "*unit S D"] | None = None, k: Float[Tensor, "*unit T D"] | None = None
    ) -> Bool[Tensor, "*unit M N"]:
        """The heaviest tiles of each row."""
        layout_of(grid, self.label)
        if q is None or k is None:
            raise SpecError("block_mass must be given this call's queries and keys; use it in prefill only.")
        return self.heaviest(tile_mass(q, k, grid), grid)

    def heaviest(self, mass: Float[Tensor, "*unit M N"], grid: BlockGrid) -> Bool[Tensor, "*unit M N"]:
        """The choice from the mass of every tile, wherever that was computed."""
        layout = layout_of(grid, self.label)
        free = ~dense_pairs(grid, self.order).to(mass.device)
        present = segments_in_blocks(layout, self.order, grid.block_tokens).to(mass.device)
        owner = present.float().argmax(-1)  # a mixed block counts for its first segment
        groups = [owner == s for s in range(present.shape[1])] if self.per_segment else [owner >= 0]
        tiles = torch.zeros_like(mass, dtype=torch.bool)
        for group in groups:
            allowed = free & group & grid.reachable(mass.device)
            budget = (self.keep * allowed.sum(-1, keepdim=True) - 1e-6).ceil().clamp(min=1)
            rank = mass.masked_fill(~allowed, -1.0).argsort(dim=-1, descending=True, stable=True).argsort(-1)
            tiles |= allowed & (rank < budget)
        return complete(tiles, grid, self.order)

    @classmethod
    def examples(cls) -> list[Self]:
        """AdaSpa's 0.8, SparseD's 0.3 per segment."""
        return [cls(keep=0.2), cls(keep=0.3, per_segment=True)]


def tile_mass(
    q: Float[Tensor, "*unit S D"], k: Float[Tensor, "*unit T D"], grid: BlockGrid
) -> Float[Tensor, "*unit M N"]:
    """Attention mass per tile; q carries the scale. A row of tiles sums to the number of queries in it."""
    block, columns = grid.block_tokens, grid.num_k_blocks
    mass = q.new_zeros(*q.shape[:-2], grid.num_q_blocks, columns, dtype=torch.float32)
    step = max(1, _STEP_ELEMENTS // max(1, q.shape[:-2].numel() * k.shape[-2] * block))
    front = grid.q_start - grid.first_q_block * block
    k_pos = torch.arange(grid.kv_len, device=q.device)
    for row in range(0, grid.num_q_blocks, step):
        first, last = max(row * block - front, 0), min((row + step) * block - front, grid.q_len)
        scores = (q[..., first:last, :] @ k.transpose(-1, -2)).float()
        if grid.causal:
            q_pos = torch.arange(grid.q_start + first, grid.q_start + last, device=q.device)
            scores = scores.masked_fill(k_pos > q_pos[:, None], -torch.inf)
        share = F.pad(scores.softmax(-1), (0, columns * block - grid.kv_len)).unflatten(-1, (columns, block)).sum(-1)
        owner = (torch.arange(first, last, device=q.device) + front) // block
        mass.index_add_(-2, owner, share)
    return mass


def head_sparsities(recall: Float[Tensor, " H"], sparsity: float, *, threshold: float = 0.8) -> Float[Tensor, " H"]:
    """AdaSpa's three sparsities of the heads of one layer.

    With n heads whose recall exceeds the threshold, at most half of all: the n best recalled get (1 + s)/2, the n worst (3s - 1)/2, the
    others s, so the mean stays s.

    Raises:
        SpecError: the sparsity is below 1/3, where the lowest of the three would be negative.
    """
    if not 1 / 3 <= sparsity < 1:
        raise SpecError(f"the sparsity must lie in [1/3, 1), but is {sparsity}.")
    count = min(int((recall > threshold).sum()), math.floor(len(recall) / 2))
    order = recall.argsort(descending=True, stable=True)
    out = torch.full_like(recall, sparsity)
    out[order[:count]] = (1 + sparsity) / 2
    out[order[len(recall) - count :]] = (3 * sparsity - 1) / 2
    return out
