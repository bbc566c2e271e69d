"""reuse: the tiles that an earlier layer chose in the same forward pass."""

from typing import ClassVar, Literal, Self

from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.errors import SpecError
from sparsesearch.rules.base import Rule


class Reuse(Rule):
    """Query head h computes the tiles that head `heads[h]` of attention module `layer` left behind, and its own diagonal.

    Nothing is estimated, so nothing is paid for choosing. `layer` counts the plan's modules and must lie before the layer that reuses; the
    source must be a rule that chooses by itself (dynamic, and no reuse). In decoding it is dense, or with `decode`, where the source chooses
    for every token, computes what that left for the token.

    Sources: HyLRA, arXiv:2602.00777, algorithm 2 (REUSE layers); Yang et al. 2024, TidalDecode, arXiv:2410.05076, section 3. Differs: blocks
    instead of tokens, in prefill too, and each head may name its own source head (HyLRA: one index set for all heads).
    """

    source: ClassVar[str] = "HyLRA, arXiv:2602.00777; TidalDecode, arXiv:2410.05076"
    dynamic: ClassVar[bool] = True
    reuses: ClassVar[bool] = True
    kind: Literal["reuse"] = "reuse"
    layer: int = Field(ge=0, description="index of the attention module whose selection is reused")
    heads: tuple[int, ...] | None = Field(
        None, description="source head of each query head of this layer; None: the head of the same index"
    )
    decode: bool = Field(False, description="whether decoded tokens reuse too; the source must choose for them")

    @property
    def decodes(self) -> bool:  # type: ignore[override]
        """Whether decoded tokens reuse."""
        return self.decode

    def source_head(self, head: int) -> tuple[int, int]:
        """Layer and head whose selection query head `head` runs."""
        if self.heads is None:
            return self.layer, head
        if head >= len(self.heads):
            raise SpecError(f"reuse.heads must name a source for query head {head}, but has {len(self.heads)} entries.")
        return self.layer, self.heads[head]

    def select(
        self,
        grid: BlockGrid,
        q: Float[Tensor, "*unit S D"] | None = None,
        k: Float[Tensor, "*unit T D"] | None = None,
        *,
        left: Bool[Tensor, "*unit M N"] | None = None,
    ) -> Bool[Tensor, "*unit M N"]:
        """What the sources left (`left`, one choice per head), and the diagonal."""
        if left is None:
            raise SpecError(
                "reuse must be given the selection of its source layer; it runs inside a plan only. Search such a plan with "
                "`sparsesearch search-reuse`."
            )
        if left.shape[-2:] != (grid.num_q_blocks, grid.num_k_blocks):
            raise SpecError(
                f"a reused selection must be of the same call, {grid.num_q_blocks} x {grid.num_k_blocks} tiles, but is "
                f"{left.shape[-2]} x {left.shape[-1]}."
            )
        return (left | grid.diagonal(left.device)) & grid.reachable(left.device)

    @property
    def label(self) -> str:
        """`reuse(layer=3)`, and what differs from the plain form."""
        more = [] if self.heads is None else [f"heads={self.heads}"]
        return f"reuse({','.join([f'layer={self.layer}', *more, *(['decode=True'] if self.decode else [])])})"

    @classmethod
    def examples(cls) -> list[Self]:
        """The same heads, a mapping, decoded tokens too."""
        return [cls(layer=0), cls(layer=2, heads=(1, 0, 1)), cls(layer=0, decode=True)]
