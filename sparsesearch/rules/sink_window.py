"""sink_window: the first tokens and the nearest ones, with a window that may grow with the sequence."""

from typing import ClassVar, Literal, Self

from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from sparsesearch.block_mask import BlockGrid, blocks_of
from sparsesearch.rules.base import Law, LengthLaw, Rule


class SinkWindow(Rule):
    """The first `sink` tokens and a causal window of `window(N)` tokens, in whole blocks (Λ-shape, A-shape, streaming head).

    Query block p computes key block j  iff  j <= p  and  (p - j < W  or  j < s),  W = max(1, ⌈window(N)/block⌉), s = ⌈sink/block⌉.

    Sources: Xiao et al. 2023, StreamingLLM, arXiv:2309.17453, section 3.2; the law a + b·N: Fu et al. 2024, MoA, arXiv:2406.14909,
    section 3.1. Differs: keys keep their original positions; the window counts whole blocks, so a skipped key never costs a tile.
    """

    source: ClassVar[str] = "StreamingLLM, arXiv:2309.17453; MoA, arXiv:2406.14909"
    kind: Literal["sink_window"] = "sink_window"
    sink: int = Field(64, ge=0, description="tokens at the start that stay visible")
    window: Law = Field(description="nearest tokens that stay visible: a number or {a, b} for a + b·N")

    def blocks(self, grid: BlockGrid) -> tuple[int, int]:
        """Sink and window in blocks, at the grid's law length."""
        return blocks_of(self.sink, grid.block_tokens), max(1, self.window.blocks(grid))

    def select(
        self, grid: BlockGrid, q: Float[Tensor, "*unit S D"] | None = None, k: Float[Tensor, "*unit T D"] | None = None
    ) -> Bool[Tensor, "M N"]:
        """Sink blocks and the last W blocks of each row (both sides of the diagonal when the call is not causal)."""
        sink, window = self.blocks(grid)
        chosen = grid.reachable().triu_(grid.first_q_block - window + 1).tril_(grid.first_q_block + window - 1)
        chosen[:, :sink] = grid.k_blocks()[:, :sink] <= grid.q_blocks() if grid.causal else True
        return chosen

    def kept_tokens(self, grid: BlockGrid) -> int:
        """Sink and window, never more than the sequence."""
        sink, window = self.blocks(grid)
        return min(grid.kv_len, (sink + window) * grid.block_tokens)

    @classmethod
    def examples(cls) -> list[Self]:
        """No sink, a sink longer than one block, an elastic window."""
        return [
            cls(sink=0, window=LengthLaw(a=1)),
            cls(sink=64, window=LengthLaw(a=128)),
            cls(sink=130, window=LengthLaw(a=-64, b=0.25)),
        ]
