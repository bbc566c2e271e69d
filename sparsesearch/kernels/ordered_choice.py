"""What dynamic rules choose for heads over one order of tokens: tiles, levels of their rest, and in an order by content the places."""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from jaxtyping import Float, Int, Int16
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.clustering import Clusters
from sparsesearch.kernels.dispatch import Backend, Prefill, choose_backend, prefill
from sparsesearch.kernels.schedule import HeadTiles, Span
from sparsesearch.order import Order
from sparsesearch.rules.base import Rule
from sparsesearch.rules.base_rest import RestRule
from sparsesearch.rules.block_mass import BlockMass
from sparsesearch.rules.cluster_mass import ClusterMass
from sparsesearch.rules.dense import Dense

ClusterMemory = dict[tuple[int, Order, int], tuple[Clusters, Clusters]]
"""Clusters of queries and of keys, by first batch row, order and head."""


@dataclass(frozen=True)
class OrderedHeads:
    """Heads over one order of tokens; q, k and v are in it, one rule per query head."""

    q: Float[Tensor, "B H S D"]
    k: Float[Tensor, "B G S D"]
    v: Float[Tensor, "B G S D"]
    spans: tuple[Span, ...]
    rules: list[Rule]
    scale: float
    backend: Backend

    @property
    def grid(self) -> BlockGrid:
        """Of every batch row."""
        return self.spans[0].grid

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.q.shape[1] // self.k.shape[1]

    def prefill(
        self, q: Tensor, k: Tensor, v: Tensor, choice: tuple[Rule, ...] | list[HeadTiles], *, need_lse: bool
    ) -> Prefill:
        """Attention of these or some of these heads over a choice of tiles."""
        return prefill(q, k, v, self.spans, choice, scale=self.scale, backend=self.backend, need_lse=need_lse)


@dataclass(frozen=True)
class Chosen:
    """What dynamic rules chose: the tiles of every sequence, the levels of heads whose rest needs them, and in an order by content the places."""

    tiles: list[HeadTiles]
    levels: dict[int, Int16[Tensor, "B M N"]]
    q_places: Int[Tensor, "B H S"] | None = None
    k_places: Int[Tensor, "B H S"] | None = None

    def all_levels(self) -> Int16[Tensor, "B H M N"]:
        """The levels of every head; those whose rest needs none are at 1 where they are computed."""
        found = torch.stack([one.choices for one in self.tiles]).short()
        for head, levels in self.levels.items():
            found[:, head] = levels
        return found


def choose(heads: OrderedHeads, clusters: ClusterMemory, key: tuple[int, Order]) -> Chosen:
    """The tiles of every head.

    Args:
        heads: heads of which some follow a dynamic rule.
        clusters: those found before, in an order by content: new ones start from them and replace them.
        key: first batch row and order, which name them.
    """
    grid = heads.grid
    levels, places = [], []
    kernel = choose_backend(heads.q, heads.k, heads.v, heads.spans, backend=heads.backend) in ("gluon", "triton")
    masses = _masses(heads) if kernel else {}
    for head, rule in enumerate(heads.rules):
        if head in masses:
            levels.append(masses[head])
        elif not rule.dynamic:
            levels.append(static_levels(rule, grid, str(heads.q.device)))
        else:
            q, k = heads.q[:, head, : grid.kv_len] * heads.scale, heads.k[:, head // heads.group, : grid.kv_len]
            inner = _chooser(rule)
            if isinstance(inner, ClusterMass):
                found = clusters[*key, head] = inner.clusters(grid, q, k, clusters.get((*key, head)))
                places.append([whole(one.order, grid.kv_len) for one in found])
                q, k = gather(q, places[-1][0]), gather(k, places[-1][1])
            if isinstance(rule, ClusterMass):
                levels.append(rule.levels(grid, q, k, clusters[*key, head]))
            else:
                levels.append(rule.levels(grid, q, k))
    shape = (len(heads.spans), grid.num_q_blocks, grid.num_k_blocks)
    every = torch.stack([one.expand(shape) for one in levels], 1) == 1
    tiles = [HeadTiles(every[row], tuple(range(len(heads.rules)))) for row in range(len(heads.spans))]
    wanted = {head: levels[head].expand(shape) for head, rule in enumerate(heads.rules) if rule.adds_rest}
    chosen = Chosen(tiles, wanted)
    if not places:
        return chosen
    q_places, k_places = (torch.stack(own, 1) for own in zip(*places, strict=True))  # all heads of the order have them
    return replace(chosen, q_places=q_places, k_places=k_places)


def _masses(heads: OrderedHeads) -> dict[int, Int16[Tensor, "B M N"]]:
    """Levels of the heads that choose by exact mass: one dense launch for their log-sum-exp, and a kernel that sums tiles."""
    from sparsesearch.kernels.triton_index import block_mass

    own = [head for head, rule in enumerate(heads.rules) if isinstance(_chooser(rule), BlockMass)]
    if not own:
        return {}
    grid, groups = heads.grid, [head // heads.group for head in own]
    q, k, v = picked(heads.q, own), picked(heads.k, groups), picked(heads.v, groups)
    lse = heads.prefill(q, k, v, (Dense(),) * len(own), need_lse=True).lse
    assert lse is not None
    real = slice(grid.kv_len)
    mass = torch.stack(
        [block_mass(q[b, :, real] * heads.scale, k[b, :, real], lse[b, :, real], grid) for b in range(len(q))]
    )
    found = {}
    for place, head in enumerate(own):
        rule = heads.rules[head]
        chooser = _chooser(rule)
        assert isinstance(chooser, BlockMass)
        found[head] = rule.levels_of(chooser.heaviest(mass[:, place], grid), grid)
    return found


def _chooser(rule: Rule) -> Rule:
    """The rule that chooses the tiles: a rest term's inner one."""
    return rule.of if isinstance(rule, RestRule) else rule


@lru_cache(maxsize=256)
def static_levels(rule: Rule, grid: BlockGrid, device: str) -> Int16[Tensor, "M N"]:
    """Levels of a rule that does not look at the input."""
    with torch.inference_mode(False):  # kept for later calls, which may be outside it
        return rule.levels(grid).to(device)


@lru_cache(maxsize=1024)
def head_indices(heads: tuple[int, ...], device: str) -> Int[Tensor, " h"]:
    """Cached: a copy to the device would not fit into a captured graph."""
    return torch.tensor(heads, device=device)


def picked(x: Float[Tensor, "B H S D"], heads: list[int]) -> Float[Tensor, "B h S D"]:
    """Some heads; all of them in a row are the tensor itself."""
    return x if heads == list(range(x.shape[1])) else x[:, head_indices(tuple(heads), str(x.device))]


def whole(places: Int[Tensor, "*unit n"], length: int) -> Int[Tensor, "*unit S"]:
    """Places of the first tokens, and the others where they are."""
    rest = torch.arange(places.shape[-1], length, device=places.device)
    return torch.cat([places, rest.expand(*places.shape[:-1], -1)], -1)


def gather(x: Float[Tensor, "*unit S D"], places: Int[Tensor, "*unit n"]) -> Float[Tensor, "*unit S D"]:
    """Rows of x at the places of the first tokens, the others where they are."""
    rows = whole(places, x.shape[-2])
    return x.gather(-2, rows[..., None].expand(*rows.shape, x.shape[-1]))
