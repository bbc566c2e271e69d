"""tree_topk: a tree over the keys, descended level by level to the best blocks of each query block."""

from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from sparsesearch.block_mask import BlockGrid, blocks_of
from sparsesearch.errors import SpecError
from sparsesearch.estimators import rows_per_block
from sparsesearch.rules.base import Law, LengthLaw, Rule
from sparsesearch.selection import top_k


class TreeTopk(Rule):
    """Hierarchical top-k: halve the kept key ranges, keep the best halves, until ranges are tiles.

    Level 0 cuts the keys into ranges of `root` tokens. At each level a range is scored by its middle key, s = max over `queries` evenly spaced
    queries of the block of q·k_middle; the best ranges that together hold keep(n_p) tokens stay, the rest is dropped for good, and each
    survivor is halved. Ranges that hold sink or window blocks stay at every level, beside the budget.

    Source: Lee et al. 2024, HiP Attention, arXiv:2406.09827, section 3 (tree search with representative keys), and its published setting
    (sink 256, window 1024, 2048 kept keys). Differs: the tree ends at tiles, not single keys, and the scores of a level come from one product
    with all its middle keys, masked by the parents, which selects what the descent selects; the budget follows each row's own length.
    """

    source: ClassVar[str] = "HiP Attention, arXiv:2406.09827"
    dynamic: ClassVar[bool] = True
    kind: Literal["tree_topk"] = "tree_topk"
    keep: Law = Field(
        description="keys kept by the tree per query: a number, or {a, b} for a + b·(keys the row can see)"
    )
    root: int = Field(1024, ge=1, description="tokens of a range at the top, rounded up to a power of two of tiles")
    sink: int = Field(64, ge=0, description="tokens at the start that are always in")
    window: int = Field(64, ge=1, description="nearest tokens that are always in")
    queries: int = Field(4, ge=1, description="queries of a block that vote")

    def select(
        self, grid: BlockGrid, q: Float[Tensor, "*unit S D"] | None = None, k: Float[Tensor, "*unit T D"] | None = None
    ) -> Bool[Tensor, "*unit M N"]:
        """Tiles the descent ends at, with sink and window; ties go to the earlier range."""
        if q is None or k is None:
            raise SpecError("tree_topk must be given this call's queries and keys; use it in prefill only.")
        reachable, budget = grid.reachable(q.device), self.keep.row_blocks(grid, q.device)
        distance = grid.q_blocks(q.device) - grid.k_blocks(q.device)
        always = (distance.abs() < blocks_of(self.window, grid.block_tokens)) & reachable
        always = always | (reachable & (grid.k_blocks(q.device) < blocks_of(self.sink, grid.block_tokens)))
        voters = evenly_spaced(q, grid, self.queries)
        tiles = 1 << (blocks_of(self.root, grid.block_tokens) - 1).bit_length()
        alive: Bool[Tensor, "*unit M n"] | None = None
        while tiles >= 1:
            scores, forced = self._level(voters, k, grid, tiles, reachable, always)
            if alive is not None:
                scores = scores.masked_fill(~alive.repeat_interleave(2, -1)[..., : scores.shape[-1]], -torch.inf)
            scores = scores.masked_fill(forced, -torch.inf)
            kept = top_k(scores, (budget + tiles - 1) // tiles) & (scores > -torch.inf)
            alive = kept | forced
            tiles //= 2
        assert alive is not None
        return reachable & alive

    def _level(
        self,
        voters: Float[Tensor, "*unit R M D"],
        k: Float[Tensor, "*unit T D"],
        grid: BlockGrid,
        tiles: int,
        reachable: Bool[Tensor, "M N"],
        always: Bool[Tensor, "M N"],
    ) -> tuple[Float[Tensor, "*unit M n"], Bool[Tensor, "M n"]]:
        """Scores of the ranges of `tiles` tiles, -inf where a row reaches none of a range; and ranges that hold tiles that are always in."""
        size = tiles * grid.block_tokens
        middle = torch.arange(size // 2, grid.kv_len + size // 2, size, device=k.device)[: -(-grid.kv_len // size)]
        keys = k.index_select(-2, middle.clamp(max=grid.kv_len - 1)).float()
        scores = (voters.float() @ keys.unsqueeze(-3).transpose(-1, -2)).amax(-3)
        pad = -grid.num_k_blocks % tiles
        seen, forced = (
            torch.nn.functional.pad(mask, (0, pad)).unflatten(-1, (-1, tiles)).any(-1) for mask in (reachable, always)
        )
        return scores.masked_fill(~seen, -torch.inf), forced

    @classmethod
    def examples(cls) -> list[Self]:
        """The published budget, one tile, a share of the row with one voter."""
        return [
            cls(keep=LengthLaw(a=2048), sink=256, window=1024),
            cls(keep=LengthLaw(a=1), root=256, sink=0),
            cls(keep=LengthLaw(b=0.2), root=64, queries=1),
        ]


def evenly_spaced(x: Float[Tensor, "*unit S D"], grid: BlockGrid, count: int) -> Float[Tensor, "*unit R M D"]:
    """`count` rows of each query block, evenly spaced over the rows it has."""
    rows = rows_per_block(x.shape[-2], grid, grid.q_start, x.device)
    first = grid.q_blocks(x.device) * grid.block_tokens
    first = (first - grid.q_start).clamp(min=0)
    place = first + (2 * torch.arange(count, device=x.device) + 1) * rows // (2 * count)
    chosen: Tensor = x.index_select(-2, place.T.flatten()).unflatten(-2, (count, -1))
    return chosen
