"""strided_shards: the nearest blocks, and every stride-th block before them; heads that take other offsets see other shards."""

from typing import ClassVar, Literal, Self

from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.rules.base import Law, LengthLaw, Rule


class StridedShards(Rule):
    """A local window and one shard of the far keys, the same for every query.

    Query block p computes key block j  iff  j <= p  and  (p - j < L  or  (j + offset) mod stride == 0),  L = max(1, ⌈local(N)/block⌉).

    The shard does not move with the query, so a key that has left the window and the shard is never needed again and can be forgotten.

    Source: Lin et al. 2024, S2-Attention, arXiv:2407.17678, section 3 (heterogeneous context sharding); the DKernel code gives head h of H
    the offset h·max(1, ⌊stride/H⌋) and leaves some heads dense. Differs: offsets are candidates, so the search deals the shards to heads. The
    published gains are for models trained with the pattern.
    """

    source: ClassVar[str] = "S2-Attention, arXiv:2407.17678"
    kind: Literal["strided_shards"] = "strided_shards"
    local: Law = Field(description="nearest tokens that stay visible: a number or {a, b} for a + b·N")
    stride: int = Field(ge=1, description="blocks per period")
    offset: int = Field(
        0, ge=0, description="blocks by which the shard is shifted; the paper's differs from head to head"
    )

    def select(
        self, grid: BlockGrid, q: Float[Tensor, "*unit S D"] | None = None, k: Float[Tensor, "*unit T D"] | None = None
    ) -> Bool[Tensor, "M N"]:
        """The window and the shard."""
        distance = grid.q_blocks() - grid.k_blocks()
        near = distance.abs() < max(1, self.local.blocks(grid))
        return grid.reachable() & (near | ((grid.k_blocks() + self.offset) % self.stride == 0))

    def kept_tokens(self, grid: BlockGrid) -> int:
        """The window and one block per period."""
        shard = (grid.num_k_blocks + self.offset % self.stride) // self.stride + 1
        return min(grid.kv_len, (max(1, self.local.blocks(grid)) + shard) * grid.block_tokens)

    @classmethod
    def examples(cls) -> list[Self]:
        """The setting of DKernel's tests (16 local blocks, stride 16), a shifted shard, everything."""
        return [
            cls(local=LengthLaw(a=1024), stride=16),
            cls(local=LengthLaw(a=64), stride=4, offset=3),
            cls(local=LengthLaw(b=0.25), stride=1),
        ]


def paper_offset(head: int, num_heads: int, stride: int) -> int:
    """The offset of DKernel for one head: h·step, step = max(1, ⌊stride/H⌋), reduced to one period."""
    return head * max(1, stride // num_heads) % stride
