"""Where the keys of a static ragged cache lie.

A region holds what the KV heads of one rule keep. Per sequence: the blocks of the sink, a ring of full blocks, and the block being filled.
What a new token may see is then always the first rows, so decoding needs neither table nor mask, and every size is fixed once the prompt's
length is known. Blocks count from the sequence's first real token.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.kernels.cache_ops import KEEP_ALL
from sparsesearch.rules.base import Rule
from sparsesearch.rules.sink_window import SinkWindow


@dataclass(frozen=True)
class Ring:
    """What one sequence keeps: `sink` blocks and the last `window` ones, the one being filled included."""

    sink: int
    window: int
    block_tokens: int

    @classmethod
    def of(cls, rule: Rule | None, block_tokens: int, law_tokens: int) -> "Ring":
        """What a sink_window rule can still reach after a prompt of `law_tokens`; everything for None."""
        if isinstance(rule, SinkWindow):
            return cls(*rule.blocks(BlockGrid(1, 1, block_tokens, max(law_tokens, 1))), block_tokens)
        return cls(0, KEEP_ALL, block_tokens)

    def rows(self, max_tokens: int) -> int:
        """Rows that `max_tokens` tokens need."""
        return min(max_tokens, (self.sink + self.window) * self.block_tokens)

    def parts(self, count: int) -> list[tuple[int, int, int]]:
        """Where the kept ones of `count` tokens lie, in order of position: (first row, first position, number of tokens)."""
        block = self.block_tokens
        last, slots = (count - 1) // block, self.sink + self.window - 1  # of full blocks
        if last < slots or count == 0:
            return [(0, 0, count)] if count else []
        oldest = last - self.window + 1
        turn = (oldest - self.sink) % max(self.window - 1, 1)
        ring = self.window - 1
        parts = [
            (0, 0, self.sink * block),
            ((self.sink + turn) * block, oldest * block, (ring - turn) * block),
            (self.sink * block, (oldest + ring - turn) * block, turn * block),
            (slots * block, last * block, count - last * block),
        ]
        return [part for part in parts if part[2]]

    def dropped(self, count: int) -> int:
        """Tokens between the sink and the rest that are no longer kept."""
        return count - sum(size for _, _, size in self.parts(count))


@dataclass
class Region:
    """The keys and values of the KV heads that follow one rule.

    Attributes:
        rule: a sink_window rule, or None where everything is kept.
        kv_heads: its KV heads.
        rings: per sequence.
        keys: [B, g, rows, D], a view of the layer's rows.
        values: likewise.
    """

    rule: Rule | None
    kv_heads: tuple[int, ...]
    rings: tuple[Ring, ...]
    keys: Float[Tensor, "B g rows D"]
    values: Float[Tensor, "B g rows D"]

    def fill(self, row: int, count: int, k: Float[Tensor, "g T D"], v: Float[Tensor, "g T D"], *, missing: int) -> None:
        """Write what is kept of the first `count` tokens of one sequence.

        Args:
            row: the sequence.
            count: its tokens so far.
            k: its keys in order of position, without the `missing` ones behind the sink; not a view of this region.
            v: its values, likewise.
            missing: tokens that had been dropped before.
        """
        ring = self.rings[row]
        for first, position, size in ring.parts(count):
            source = position - (missing if position >= ring.sink * ring.block_tokens else 0)
            for target, new in ((self.keys, k), (self.values, v)):
                target[row, :, first : first + size] = new[:, source : source + size]

    def ordered(self, row: int, count: int) -> tuple[Float[Tensor, "g t D"], Float[Tensor, "g t D"]]:
        """Keys and values that one sequence of `count` tokens keeps, in order of position."""
        parts = self.rings[row].parts(count)
        slices = [slice(first, first + size) for first, _, size in parts] or [slice(0, 0)]
        keys, values = (torch.cat([x[row, :, part] for part in slices], 1) for x in (self.keys, self.values))
        return keys, values
