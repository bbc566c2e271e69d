"""Query heads that choose their key blocks anew for every decoded token of a static ragged cache.

The KV heads of such query heads keep every key, in order of position. Where a rule ranks blocks by bounds (Quest), the cache also keeps the
smallest and the largest value of each channel per block: 1 / block_tokens of its memory, and what a step reads in place of the keys. A layer
that others reuse leaves its choice in a `StepSelection`, which its later layers of the same cache read in the same step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsesearch.block_mask import BlockGrid, blocks_of
from sparsesearch.estimators import block_bounds
from sparsesearch.kernels.page_ops import pages_by_bounds
from sparsesearch.rules.base import Rule
from sparsesearch.rules.bounds_topk import BoundsTopk
from sparsesearch.runtime.binding import LayerBinding, kv_partition
from sparsesearch.runtime.static_regions import Layout
from sparsesearch.step_blocks import StepBlocks, StepSelection, page_tables, update_bounds


@dataclass(frozen=True)
class _Chooser:
    """The query heads of a layer that follow one rule which decodes.

    Attributes:
        rule: the rule.
        kv_heads: int64 [g], their KV heads.
        places: int64 [h], where they lie among all query heads of `kv_heads`.
        rows: int64 [g], where `kv_heads` lie among those that keep every key; None: they are all of these.
        bounded: int64 [g], where they lie among those whose bounds are kept.
        sources: int64 [h], for a reuse: the query heads of the source layer.
        heads: int64 [h], its query heads.
    """

    rule: Rule
    heads: Int[Tensor, " h"]
    sources: Int[Tensor, " h"]
    kv_heads: Int[Tensor, " g"]
    places: Int[Tensor, " h"]
    rows: Int[Tensor, " g"] | None
    bounded: Int[Tensor, " g"]


class Choosers:
    """All of them in one layer; made once per layer and device.

    Args:
        binding: the layer's.
        num_kv_heads: KV heads.
        device: where the tensors go.

    Attributes:
        heads: int64 [h], the query heads that choose.
        kv_heads: int64 [h], the KV head of each.
        bounded: int64, KV heads whose bounds are kept.
        some: whether there are any.
        all: whether all query heads choose, in their order.
        source_paths: path of the source layer of each reuse, in turn.
        leaves: whether a later layer reuses what is chosen here.
    """

    def __init__(self, binding: LayerBinding, num_kv_heads: int, device: torch.device) -> None:
        rules = binding.kept_by

        def placed(numbers: Sequence[int]) -> Int[Tensor, " n"]:
            return torch.tensor(numbers, dtype=torch.int64, device=device)

        size, of_rule = len(rules) // num_kv_heads, dict[Rule, list[int]]()
        for head, rule in enumerate(rules):
            if rule.decodes:
                of_rule.setdefault(rule, []).append(head)
        heads = [head for own in of_rule.values() for head in own]
        whole = kv_partition(rules, num_kv_heads).get(None, ())
        bounded = sorted({head // size for head in heads if rules[head].reads_bounds})
        self._whole, self._bounded_rows = whole, placed([whole.index(head) for head in bounded])
        self.heads, self.kv_heads = placed(heads), placed([head // size for head in heads])
        self.bounded, self.size, self.some = placed(bounded), size, bool(heads)
        self.all = heads == list(range(len(rules)))
        self.leaves = binding.leaves is not None and any(rules[head].decodes for head in binding.leaves.heads)
        self.source_paths: list[str] = []
        self._each = []
        for rule, members in of_rule.items():
            taken = [one for head in members if rule.reuses and (one := binding.takes[head]) is not None]
            self.source_paths += [taken[0][0].path] if taken else []
            own = sorted({head // size for head in members})
            places = [own.index(head // size) * size + head % size for head in members]
            rows = None if tuple(own) == whole else placed([whole.index(head) for head in own])
            bounds = [bounded.index(head) for head in own] if rule.reads_bounds else []
            of_heads = placed(members), placed([head for _, head in taken])
            self._each.append(_Chooser(rule, *of_heads, placed(own), placed(places), rows, placed(bounds)))

    @property
    def by_bounds_alone(self) -> bool:
        """Whether every head chooses by bounds, for which there are kernels."""
        return all(isinstance(one.rule, BoundsTopk) for one in self._each)

    def budgets(self, law_tokens: Int[Tensor, " B"], block_tokens: int) -> Int[Tensor, "B r"]:
        """Blocks per token of each rule that has a budget, at the prompts' lengths."""
        each = [
            one.rule.keep.blocks_at(law_tokens, block_tokens).clamp(min=1)
            for one in self._each
            if isinstance(one.rule, BoundsTopk)
        ]
        empty = law_tokens.new_zeros(len(law_tokens), 0)
        return torch.stack(each, 1).int() if each else empty.int()

    def fill(
        self,
        low: Float[Tensor, "B g N D"],
        high: Float[Tensor, "B g N D"],
        keys: Float[Tensor, "rows D"],
        layout: Layout,
        counts: Sequence[tuple[int, int]],
    ) -> None:
        """Work out the bounds of some sequences anew; `counts` are (sequence, tokens)."""
        if not self.bounded.numel():
            return
        rows, block = _rows(keys, layout).index_select(1, self._bounded_rows), layout.block_tokens
        for row, count in counts:
            if count:
                grid = BlockGrid(count, count, block)
                for bounds, found in zip((low, high), block_bounds(rows[row, :, :count], grid), strict=True):
                    bounds[row, :, : grid.num_k_blocks] = found

    def tables(
        self,
        q: Float[Tensor, "B H D"],
        keys: Float[Tensor, "rows D"],
        low: Float[Tensor, "B g N D"],
        high: Float[Tensor, "B g N D"],
        seen: Int[Tensor, " P"],
        law_tokens: Int[Tensor, " B"],
        layout: Layout,
        scale: float,
        left: StepSelection | None,
        taken: Sequence[StepSelection],
        budgets: Int[Tensor, "B r"] | None,
    ) -> tuple[Int[Tensor, "pairs N"], Int[Tensor, " pairs"]]:
        """The blocks that each of `heads` reads for the newest tokens, whose keys are there already, and how many keys they hold.

        `left` is for later layers to read, `taken` is what the layers of `source_paths` left. With `budgets`, blocks per token of each rule,
        kernels choose where they can.
        """
        if budgets is not None and left is None and self.by_bounds_alone:
            return self._by_kernels(q, keys, low, high, layout, budgets, seen)
        block, batch = layout.block_tokens, q.shape[0]
        q, position = q * scale, seen.view(batch, -1)[:, 0].long() - 1
        rows = _rows(keys, layout)
        num_blocks = -(-rows.shape[2] // block)
        if self.bounded.numel():
            start = layout.start.view(batch, -1).index_select(1, self.bounded)
            update_bounds(low, high, keys[start + position[:, None]], position, block)
        where = position[:, None, None, None], law_tokens[:, None, None, None], block, num_blocks
        grouped, chosen, given = q.unflatten(1, (-1, self.size)), [], iter(taken)
        for one in self._each:
            if one.rule.reuses:
                blocks = StepBlocks(*where)
                tiles = next(given).tiles.to(q.device).index_select(1, one.sources) | (
                    blocks.index == blocks.newest
                ).squeeze(1)
                chosen.append(tiles & blocks.there().squeeze(1))
                continue
            if one.rule.reads_bounds:
                bounds = low.index_select(1, one.bounded), high.index_select(1, one.bounded)
                blocks = StepBlocks(*where, None, *bounds)
            else:
                blocks = StepBlocks(*where, rows if one.rows is None else rows.index_select(1, one.rows))
            queries = grouped.index_select(1, one.kv_heads)
            tiles = one.rule.step_tiles(queries, blocks)
            chosen.append(tiles.flatten(1, 2).index_select(1, one.places))
            if left is not None:
                kept = one.rule.step_left(tiles, queries, blocks).flatten(1, 2).index_select(1, one.places)
                left.tiles.index_copy_(1, one.heads, kept)
        return page_tables(torch.cat(chosen, 1), position, block)

    def _by_kernels(
        self,
        q: Float[Tensor, "B H D"],
        keys: Float[Tensor, "rows D"],
        low: Float[Tensor, "B g N D"],
        high: Float[Tensor, "B g N D"],
        layout: Layout,
        budgets: Int[Tensor, "B r"],
        seen: Int[Tensor, " P"],
    ) -> tuple[Int[Tensor, "pairs N"], Int[Tensor, " pairs"]]:
        parts: list[tuple[Tensor, Tensor]] = []
        for index, one in enumerate(self._each):
            assert isinstance(one.rule, BoundsTopk)
            sink, block = blocks_of(one.rule.sink, layout.block_tokens), layout.block_tokens
            where = layout.start, seen, one.kv_heads, one.bounded, one.places, budgets[:, index].contiguous()
            parts.append(pages_by_bounds(q, keys, low, high, *where, sink, block))
        if len(parts) == 1:
            return parts[0]
        batch = q.shape[0]
        tables, lens = zip(*parts, strict=True)
        return (
            torch.cat([table.unflatten(0, (batch, -1)) for table in tables], 1).flatten(0, 1),
            torch.cat([own.unflatten(0, (batch, -1)) for own in lens], 1).flatten(),
        )


def _rows(keys: Float[Tensor, "rows D"], layout: Layout) -> Float[Tensor, "B g rows D"]:
    """Of the KV heads that keep every key."""
    return next(part for part in layout.parts if part.rule is None).view(keys)
