"""Query heads that choose their key blocks anew for every decoded token of a static ragged cache.

The KV heads of such query heads keep every key, in order of position. Where a rule ranks blocks by bounds (Quest), the cache also keeps the
smallest and the largest value of each channel per block: 1 / block_tokens of its memory, and what a step reads in place of the keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.estimators import block_bounds
from sparsesearch.rules.base import Rule
from sparsesearch.runtime.binding import kv_partition
from sparsesearch.runtime.static_regions import Layout
from sparsesearch.step_blocks import StepBlocks, page_tables, update_bounds


@dataclass(frozen=True)
class _Chooser:
    """The query heads of a layer that follow one rule which decodes.

    Attributes:
        rule: the rule.
        kv_heads: int64 [g], their KV heads.
        places: int64 [h], where they lie among all query heads of `kv_heads`.
        rows: int64 [g], where `kv_heads` lie among those that keep every key; None: they are all of these.
        bounded: int64 [g], where they lie among those whose bounds are kept.
    """

    rule: Rule
    kv_heads: Int[Tensor, " g"]
    places: Int[Tensor, " h"]
    rows: Int[Tensor, " g"] | None
    bounded: Int[Tensor, " g"]


class Choosers:
    """All of them in one layer; made once per layer and device.

    Args:
        rules: of decoding, one per query head.
        num_kv_heads: KV heads.
        device: where the tensors go.

    Attributes:
        heads: int64 [h], the query heads that choose.
        kv_heads: int64 [h], the KV head of each.
        bounded: int64, KV heads whose bounds are kept.
    """

    def __init__(self, rules: tuple[Rule, ...], num_kv_heads: int, device: torch.device) -> None:
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
        self._each = []
        for rule, members in of_rule.items():
            own = sorted({head // size for head in members})
            places = [own.index(head // size) * size + head % size for head in members]
            rows = None if tuple(own) == whole else placed([whole.index(head) for head in own])
            bounds = [bounded.index(head) for head in own] if rule.reads_bounds else []
            self._each.append(_Chooser(rule, placed(own), placed(places), rows, placed(bounds)))

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
        position: Int[Tensor, " B"],
        law_tokens: Int[Tensor, " B"],
        layout: Layout,
    ) -> tuple[Int[Tensor, "pairs N"], Int[Tensor, " pairs"]]:
        """The blocks that each of `heads` reads for the token at `position`, whose key is there already, and how many keys they hold.

        `q` carries the softmax scale.
        """
        block, batch = layout.block_tokens, q.shape[0]
        rows = _rows(keys, layout)
        num_blocks = -(-rows.shape[2] // block)
        if self.bounded.numel():
            start = layout.start.view(batch, -1).index_select(1, self.bounded)
            update_bounds(low, high, keys[start + position[:, None]], position, block)
        where = position[:, None, None, None], law_tokens[:, None, None, None], block, num_blocks
        grouped, chosen = q.unflatten(1, (-1, self.size)), []
        for one in self._each:
            if one.rule.reads_bounds:
                bounds = low.index_select(1, one.bounded), high.index_select(1, one.bounded)
                blocks = StepBlocks(*where, None, *bounds)
            else:
                blocks = StepBlocks(*where, rows if one.rows is None else rows.index_select(1, one.rows))
            tiles = one.rule.step_tiles(grouped.index_select(1, one.kv_heads), blocks)
            chosen.append(tiles.flatten(1, 2).index_select(1, one.places))
        return page_tables(torch.cat(chosen, 1), position, block)


def _rows(keys: Float[Tensor, "rows D"], layout: Layout) -> Float[Tensor, "B g rows D"]:
    """Of the KV heads that keep every key."""
    return next(part for part in layout.parts if part.rule is None).view(keys)
