"""zero: the unit contributes nothing."""

from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.rules.base import Rest, Rule


class Zero(Rule):
    """Output 0: no tile, no cache. A head that is zero everywhere can be removed from the weights.

    Source: Michel et al. 2019, Are Sixteen Heads Really Better than One?, arXiv:1905.10650, section 2.2 (head masking).
    """

    source: ClassVar[str] = "Michel et al. 2019, arXiv:1905.10650"
    rest: ClassVar[Rest] = "zero"
    kind: Literal["zero"] = "zero"

    def select(
        self, grid: BlockGrid, q: Float[Tensor, "*unit S D"] | None = None, k: Float[Tensor, "*unit T D"] | None = None
    ) -> Bool[Tensor, "M N"]:
        """No tile."""
        return torch.zeros(grid.num_q_blocks, grid.num_k_blocks, dtype=torch.bool)

    def kept_tokens(self, grid: BlockGrid) -> int:
        """Nothing is cached."""
        return 0

    @classmethod
    def examples(cls) -> list[Self]:
        """The only one."""
        return [cls()]
