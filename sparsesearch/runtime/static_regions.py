"""Where the keys of a static ragged cache lie.

A layout is made once per shape of prompt and lies on the device; caches of that shape share it. A region of it holds what the KV heads of one rule keep. Per sequence: the blocks of the sink, a ring of full blocks, and the block being filled.
What a new token may see is then always the first rows, so decoding needs neither table nor mask, and every size is fixed once the prompt's
length is known. Blocks count from the sequence's first real token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.kernels.cache_ops import KEEP_ALL
from sparsesearch.rules.base import Rule
from sparsesearch.rules.mean_value import MeanValue
from sparsesearch.rules.sink_window import SinkWindow
from sparsesearch.rules.zero import Zero
from sparsesearch.runtime.binding import kv_partition


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


@dataclass(frozen=True)
class Part:
    """Where the KV heads of one rule keep their rows.

    Attributes:
        rule: a sink_window rule, or None where everything is kept.
        kv_heads: its KV heads.
        rings: per sequence.
        rows: rows of each sequence and head.
        first: first row of all, in the layer.
    """

    rule: Rule | None
    kv_heads: tuple[int, ...]
    rings: tuple[Ring, ...]
    rows: int
    first: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Sequences, heads, rows."""
        return len(self.rings), len(self.kv_heads), self.rows

    def view(self, x: Float[Tensor, "rows D"]) -> Float[Tensor, "B g rows D"]:
        """This part of a layer's rows."""
        batch, heads, rows = self.shape
        return x[self.first : self.first + batch * heads * rows].view(batch, heads, rows, x.shape[1])


@dataclass(frozen=True)
class Layout:
    """Where every KV head of a layer keeps its rows.

    Attributes:
        parts: by rule.
        batch: sequences.
        num_kv_heads: KV heads of the layer.
        block_tokens: side of a tile.
        device: where the tensors go.
    """

    parts: tuple[Part, ...]
    batch: int
    num_kv_heads: int
    block_tokens: int
    device: torch.device

    @classmethod
    def of(
        cls,
        kept_by: tuple[Rule, ...],
        num_kv_heads: int,
        block_tokens: int,
        law_tokens: Sequence[int],
        max_tokens: int,
        device: torch.device,
    ) -> "Layout":
        """Room for sequences whose prompts have `law_tokens` tokens, `max_tokens` at the end."""
        parts: list[Part] = []
        for rule, heads in kv_partition(kept_by, num_kv_heads).items():
            if not isinstance(rule, Zero | MeanValue):
                rings = tuple(Ring.of(rule, block_tokens, law) for law in law_tokens)
                rows = max(ring.rows(max_tokens) for ring in rings)
                parts.append(Part(rule, heads, rings, rows, _end(parts)))
        return cls(tuple(parts), len(law_tokens), num_kv_heads, block_tokens, device)

    def chosen(self, index: Sequence[int]) -> "Layout":
        """The layout where row i is what row index[i] is here; itself if no row changes its sizes."""
        parts: list[Part] = []
        for part in self.parts:
            parts.append(replace(part, rings=tuple(part.rings[row] for row in index), first=_end(parts)))
        same = tuple(parts) == self.parts and len(index) == self.batch
        return self if same else replace(self, parts=tuple(parts), batch=len(index))

    @property
    def num_rows(self) -> int:
        """Rows of all parts."""
        return _end(self.parts)

    @cached_property
    def start(self) -> Int[Tensor, " P"]:
        """int64, first row of each pair of sequence and KV head."""
        start = torch.zeros(self.batch, self.num_kv_heads, dtype=torch.int64)
        for part in self.parts:
            batch, heads, rows = part.shape
            start[:, part.kv_heads] = (part.first + rows * torch.arange(batch * heads)).view(batch, heads)
        return self._on_device(start)

    @cached_property
    def limits(self) -> tuple[Int[Tensor, " P"], Int[Tensor, " P"], Int[Tensor, " P"]]:
        """int32, per pair: its rows, blocks of its sink, blocks of its window (0 keeps nothing)."""
        room, sinks, windows = (torch.zeros(self.batch, self.num_kv_heads, dtype=torch.int32) for _ in range(3))
        for part in self.parts:
            room[:, part.kv_heads] = part.rows
            for row, ring in enumerate(part.rings):
                sinks[row, part.kv_heads], windows[row, part.kv_heads] = ring.sink, ring.window
        return self._on_device(room), self._on_device(sinks), self._on_device(windows)

    def _on_device(self, x: Tensor) -> Tensor:
        with torch.inference_mode(False):  # kept for later calls, which may be outside it
            return x.flatten().to(self.device)

    def regions(self, keys: Float[Tensor, "rows D"], values: Float[Tensor, "rows D"]) -> "list[Region]":
        """Views of a layer's rows."""
        return [Region(part.rule, part.kv_heads, part.rings, part.view(keys), part.view(values)) for part in self.parts]


def _end(parts: Sequence[Part]) -> int:
    """First row behind the parts."""
    if not parts:
        return 0
    batch, heads, rows = parts[-1].shape
    return parts[-1].first + batch * heads * rows


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
