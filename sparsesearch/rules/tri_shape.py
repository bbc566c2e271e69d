"""tri_shape: the first tokens, the nearest ones, and for the prompt's last queries everything."""

from typing import ClassVar, Literal, Self

from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from sparsesearch.block_mask import BlockGrid, blocks_of
from sparsesearch.rules.base import Law, LengthLaw, Rule


class TriShape(Rule):
    """Sink and window as in `sink_window`; the last `last` queries of the prompt, and every query after it, see all keys.

    Query block p computes key block j  iff  j <= p  and  (p - j < W  or  j < s  or  p >= ⌊(N - last)/block⌋),  N the length of the prompt.

    A prompt usually ends with what is asked of it: a head that retrieves needs the whole context there and hardly anywhere else, at
    `last`/N of the rows. Decoding is dense, so nothing is evicted.

    Sources: Li et al. 2024, SCBench, arXiv:2412.10319, section 3 (Tri-shape: A-shape and the last window of queries); He et al. 2025,
    TriangleMix, arXiv:2507.21526 (which layers may take it). Differs: whole blocks, per head, and a window that may grow with the prompt.
    """

    source: ClassVar[str] = "SCBench, arXiv:2412.10319; TriangleMix, arXiv:2507.21526"
    kind: Literal["tri_shape"] = "tri_shape"
    sink: int = Field(64, ge=0, description="tokens at the start that stay visible")
    window: Law = Field(description="nearest tokens that stay visible: a number or {a, b} for a + b·N")
    last: int = Field(128, ge=1, description="last queries of the prompt that see all keys")

    def select(
        self, grid: BlockGrid, q: Float[Tensor, "*unit S D"] | None = None, k: Float[Tensor, "*unit T D"] | None = None
    ) -> Bool[Tensor, "M N"]:
        """Sink blocks and the last W blocks of each row; whole rows at the end of the prompt."""
        distance = grid.q_blocks() - grid.k_blocks()
        near = distance.abs() < max(1, self.window.blocks(grid))
        asks = grid.q_blocks() >= max(0, grid.law_len - self.last) // grid.block_tokens
        return grid.reachable() & (near | (grid.k_blocks() < blocks_of(self.sink, grid.block_tokens)) | asks)

    @classmethod
    def examples(cls) -> list[Self]:
        """The usual last two blocks, no sink and a single last query, an elastic window."""
        return [
            cls(window=LengthLaw(a=64)),
            cls(sink=0, window=LengthLaw(a=1), last=1),
            cls(sink=130, window=LengthLaw(a=-64, b=0.25), last=100),
        ]
