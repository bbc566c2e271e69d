"""Candidates by order of tokens, and one attention call as they look at it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.layout import Layout
from sparsesearch.order import Order
from sparsesearch.rules import Rule
from sparsesearch.runtime.diffusion.attention import LayerCall


@dataclass(frozen=True)
class OrderGroup:
    """Candidates that share an order of tokens."""

    order: Order
    indices: list[int]
    masks: Sequence[Tensor | Rule]
    grid: BlockGrid

    def tiles(self, q: Tensor, k: Tensor, batch: int, scale: float) -> Bool[Tensor, "U C M N"]:
        """Tiles per (sequence, head) pair; dynamic rules look at the pairs' own queries and keys."""
        found = []
        for mask in self.masks:
            if isinstance(mask, Rule):
                own = mask.select(self.grid, q.unflatten(0, (batch, -1)) * scale, k.unflatten(0, (batch, -1)))
                found.append(own.to(q.device).flatten(0, 1))
            else:
                found.append(mask.repeat(batch, 1, 1))
        return torch.stack(found, 1)


@dataclass(frozen=True)
class FlatCall:
    """Queries, keys and values of one call as (sequence, head) pairs."""

    q: Float[Tensor, "U T D"]
    k: Float[Tensor, "U T D"]
    v: Float[Tensor, "U T D"]
    layout: Layout

    @classmethod
    def of(cls, seen: LayerCall) -> "FlatCall":
        """Flatten the batch into the heads."""
        return cls(seen.q.flatten(0, 1), seen.k.flatten(0, 1), seen.v.flatten(0, 1), seen.call.layout)

    def ordered(self, order: Order) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values in another order of tokens."""
        if order.is_identity:
            return self.q, self.k, self.v
        index = order.permutation(self.layout, self.q.device)
        return self.q.index_select(1, index), self.k.index_select(1, index), self.v.index_select(1, index)


def video_grid(layout: Layout, block_tokens: int) -> BlockGrid:
    """The block grid of all tokens against all tokens."""
    tokens = layout.num_tokens
    return BlockGrid(tokens, tokens, block_tokens, causal=False, layout=layout)


@lru_cache(maxsize=4096)
def static_work(rule: Rule, layout: Layout, block_tokens: int, steps: int | None = None) -> float:
    """What a static rule computes per head and call, over a range of so many steps, as a share of dense attention's tiles."""
    grid = video_grid(layout, block_tokens)
    return float(rule.work(rule.levels(grid), grid, steps)) / float(grid.reachable().sum())
