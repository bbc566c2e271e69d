"""mean_value: every visible key weighs the same."""

from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.rules.base import Rest, Rule


class MeanValue(Rule):
    """Output of query i: the mean of the values it may see, v̄_i = (1/(i+1)) Σ_{j<=i} v_j. No tile; the cache is one running sum.

    The uniform-attention head: what is left of a head when its scores are ignored. Equal to one pooled key that stands for all n visible
    ones, with bias log n.

    Source: Zhang, Xiong, Su 2018, Average Attention Network, arXiv:1805.00631, equation 1 (cumulative average). Differs: training-free,
    on the values of a trained head.
    """

    source: ClassVar[str] = "Zhang et al. 2018, arXiv:1805.00631"
    rest: ClassVar[Rest] = "mean_value"
    kind: Literal["mean_value"] = "mean_value"

    def select(
        self, grid: BlockGrid, q: Float[Tensor, "*unit S D"] | None = None, k: Float[Tensor, "*unit T D"] | None = None
    ) -> Bool[Tensor, "M N"]:
        """No tile."""
        return torch.zeros(grid.num_q_blocks, grid.num_k_blocks, dtype=torch.bool)

    def kept_tokens(self, grid: BlockGrid) -> int:
        """One running sum."""
        return 1

    @classmethod
    def examples(cls) -> list[Self]:
        """The only one."""
        return [cls()]
