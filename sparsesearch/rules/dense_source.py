"""dense_source: dense attention that leaves its heaviest tiles for later layers to reuse."""

from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from sparsesearch.block_mask import BlockGrid, blocks_of
from sparsesearch.errors import SpecError
from sparsesearch.rules.base import Law, LengthLaw, Rule
from sparsesearch.selection import top_k
from sparsesearch.step_blocks import StepBlocks


class DenseSource(Rule):
    """All tiles are computed; behind stay, per query block, the key blocks of largest exact attention mass.

    mass[p, j] = Σ_{i in p} Σ_{t in j} softmax(q_i · k)_t;  row p leaves its k_p heaviest reachable blocks, k_p = max(1, ⌈keep(n_p)/block⌉), n_p
    the keys row p can see. The sink blocks and the diagonal are always among them.

    Source: HyLRA, arXiv:2602.00777, algorithm 2 (FULL layers). Differs: a choice per query block and head; the budget may grow with the row.
    """

    source: ClassVar[str] = "HyLRA, arXiv:2602.00777"
    dynamic: ClassVar[bool] = True
    kind: Literal["dense_source"] = "dense_source"
    keep: Law = Field(description="keys left per query: a number, or {a, b} for a + b·(keys the row can see)")
    sink: int = Field(64, ge=0, description="tokens at the start that are always left")
    decode: bool = Field(False, description="whether a selection is left for every decoded token too")

    @property
    def decodes(self) -> bool:  # type: ignore[override]
        """Whether decoded tokens leave a selection."""
        return self.decode

    def select(
        self, grid: BlockGrid, q: Float[Tensor, "*unit S D"] | None = None, k: Float[Tensor, "*unit T D"] | None = None
    ) -> Bool[Tensor, "*unit M N"]:
        """All reachable tiles."""
        if q is None:
            raise SpecError("dense_source must be given this call's queries and keys; use it in prefill only.")
        return grid.reachable(q.device).expand(*q.shape[:-2], grid.num_q_blocks, grid.num_k_blocks)

    def left_behind(
        self,
        tiles: Bool[Tensor, "*unit M N"],
        grid: BlockGrid,
        q: Float[Tensor, "*unit S D"],
        k: Float[Tensor, "*unit T D"],
    ) -> Bool[Tensor, "*unit M N"]:
        """The heaviest tiles of each row; ties go to the earlier block."""
        always = grid.diagonal(q.device) | (grid.k_blocks(q.device) < blocks_of(self.sink, grid.block_tokens))
        mass = block_mass(q, k, grid).masked_fill(always, torch.inf).masked_fill(~tiles, -torch.inf)
        rank = mass.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        seen = [min(grid.kv_len, (row + 1) * grid.block_tokens) for row in range(grid.first_q_block, grid.num_k_blocks)]
        if not grid.causal:
            seen = [grid.kv_len] * grid.num_q_blocks
        budget = [max(1, blocks_of(self.keep.tokens(count), grid.block_tokens)) for count in seen]
        return tiles & ((rank < torch.tensor(budget, device=q.device)[:, None]) | always)

    def step_tiles(self, q: Float[Tensor, "B g size D"], blocks: StepBlocks) -> Bool[Tensor, "B g size N"]:
        """All that are there."""
        return blocks.there().expand(*q.shape[:3], -1)

    def step_left(
        self, tiles: Bool[Tensor, "B g size N"], q: Float[Tensor, "B g size D"], blocks: StepBlocks
    ) -> Bool[Tensor, "B g size N"]:
        """The heaviest blocks, as many as the newest token's row of keys allows; every key is read to know them."""
        always = (blocks.index == blocks.newest) | (blocks.index < blocks_of(self.sink, blocks.block_tokens))
        mass = blocks.mass(q).masked_fill(always, torch.inf).masked_fill(~tiles, -torch.inf)
        count = self.keep.blocks_at(blocks.position + 1, blocks.block_tokens).clamp(min=1)
        return tiles & (top_k(mass, count) | always)

    @property
    def label(self) -> str:
        """Without `decode` where it is off."""
        return super().label.replace(",decode=False", "")

    @classmethod
    def examples(cls) -> list[Self]:
        """One block, HyLRA's 2,048 tokens, a share of the row without a sink."""
        return [cls(keep=LengthLaw(a=1)), cls(keep=LengthLaw(a=2048)), cls(keep=LengthLaw(b=0.2), sink=0, decode=True)]


def block_mass(
    q: Float[Tensor, "*unit S D"], k: Float[Tensor, "*unit T D"], grid: BlockGrid
) -> Float[Tensor, "*unit M N"]:
    """Attention mass per tile, one row of tiles at a time: no more than block_tokens x T scores are held per unit."""
    block, rows = grid.block_tokens, []
    for row in range(grid.first_q_block, grid.num_k_blocks):
        first, end = max(row * block, grid.q_start), min((row + 1) * block, grid.kv_len)
        seen = end if grid.causal else grid.kv_len
        scores = (q[..., first - grid.q_start : end - grid.q_start, :] @ k[..., :seen, :].transpose(-1, -2)).float()
        if grid.causal:
            future = torch.arange(seen, device=q.device) > torch.arange(first, end, device=q.device)[:, None]
            scores = scores.masked_fill(future, -torch.inf)
        summed = scores.softmax(-1).sum(-2)
        padded = torch.nn.functional.pad(summed, (0, grid.num_k_blocks * block - seen))
        rows.append(padded.unflatten(-1, (grid.num_k_blocks, block)).sum(-1))
    return torch.stack(rows, -2)
