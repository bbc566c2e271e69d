"""dense: every key that the model itself allows."""

from typing import ClassVar, Literal, Self

from jaxtyping import Bool, Float
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.rules.base import Rule


class Dense(Rule):
    """Plain attention: all reachable tiles. A plan of nothing but this is bit-identical to the model.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1.
    """

    source: ClassVar[str] = "Vaswani et al. 2017, arXiv:1706.03762"
    kind: Literal["dense"] = "dense"

    def select(
        self, grid: BlockGrid, q: Float[Tensor, "*unit S D"] | None = None, k: Float[Tensor, "*unit T D"] | None = None
    ) -> Bool[Tensor, "M N"]:
        """All reachable tiles."""
        return grid.reachable()

    @classmethod
    def examples(cls) -> list[Self]:
        """The only one."""
        return [cls()]
