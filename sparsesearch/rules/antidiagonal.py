"""antidiagonal: per query block the key blocks that hold most of the attention, estimated from sampled antidiagonals."""

from typing import ClassVar, Literal, Self

from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.errors import SpecError
from sparsesearch.estimators import antidiagonal_mass
from sparsesearch.rules.base import Rule
from sparsesearch.selection import top_p


class Antidiagonal(Rule):
    """The smallest set of key blocks per query block whose estimated attention reaches `mass`; block 0 and the diagonal are in.

    s[a, b] = (1/stride) Σ_i q[a·stride + stride - 1 - i]·k[b·stride + i];  A = softmax over b;  tile mass = Σ A over the tile's patches.
    An antidiagonal crosses every vertical and slash line of a patch, so neither kind of structure is missed.

    Source: Xu et al. 2025, XAttention, arXiv:2503.16428, sections 2.1-2.2 (blocks of 128, stride 8 or 16, threshold 0.9). Differs: its
    thresholds per head come from a dynamic programme over a table of thresholds; ours from the search, which sees all candidates.
    """

    source: ClassVar[str] = "XAttention, arXiv:2503.16428"
    dynamic: ClassVar[bool] = True
    kind: Literal["antidiagonal"] = "antidiagonal"
    mass: float = Field(gt=0, le=1, description="share of each row's estimated attention that is kept")
    stride: int = Field(16, ge=1, description="side of a patch in tokens; must divide the tile")

    def select(
        self, grid: BlockGrid, q: Float[Tensor, "*unit S D"] | None = None, k: Float[Tensor, "*unit T D"] | None = None
    ) -> Bool[Tensor, "*unit M N"]:
        """Top-p tiles per row; ties go to the earlier block."""
        if q is None or k is None:
            raise SpecError("antidiagonal must be given this call's queries and keys; use it in prefill only.")
        estimate = antidiagonal_mass(q, k, grid, self.stride)
        always = grid.diagonal(q.device) | (grid.k_blocks(q.device) == 0)
        return grid.reachable(q.device) & top_p(estimate, self.mass, always)

    @classmethod
    def examples(cls) -> list[Self]:
        """The paper's two strides, and everything."""
        return [cls(mass=0.9), cls(mass=0.5, stride=8), cls(mass=1.0, stride=4)]
