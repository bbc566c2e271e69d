"""cluster_mass: queries and keys by k-means cluster; each query cluster keeps the key clusters that carry its share of the centres' map."""

import math
from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float, Int, Int16
from pydantic import Field
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.clustering import Clusters, k_means
from sparsesearch.errors import SpecError
from sparsesearch.order import KMeans, Order
from sparsesearch.rules.base import Rule
from sparsesearch.selection import top_k, top_p
from sparsesearch.tile_cover import dense_pairs, layout_of


class ClusterMass(Rule):
    """A_c = softmax_d(q̂_c·k̂_d + log n_d), n_d keys in cluster d; cluster c keeps its smallest set with A >= `mass`, at least ⌈keep·n⌉ of n.

    Tokens of the grid stand by cluster (`order.KMeans`), so that a pair of clusters is a rectangle; a tile is computed iff it holds a kept pair.
    `by` block: the blocks of the sorted sequence are the clusters, A is of their means, and no tile is computed for a corner. Text is neither
    clustered nor ranked: its rows and columns are dense. Clusters start from evenly spaced tokens and move `iterations` times; in a
    denoising loop later steps start from the centres of the step before and move twice.

    Source: Yang et al. 2025, Sparse VideoGen2, arXiv:2505.18875, section 4 and public code (top-p 0.9, at least 10 %, 50 iterations at first,
    2 per later step). Differs: tiles of one size cover the rectangles, where the published kernel has blocks of any size; first centres are not
    drawn.
    """

    source: ClassVar[str] = "Yang et al. 2025, Sparse VideoGen2, arXiv:2505.18875"
    dynamic: ClassVar[bool] = True
    needs_layout: ClassVar[bool] = True
    kind: Literal["cluster_mass"] = "cluster_mass"
    keep: float = Field(gt=0, le=1, description="least share of the key clusters")
    mass: float = Field(
        0.0, ge=0, le=1, description="share of the centres' map that is kept where more are needed for it"
    )
    query_clusters: int = Field(100, ge=1, description="clusters of queries")
    key_clusters: int = Field(200, ge=1, description="clusters of keys")
    iterations: int = Field(10, ge=0, description="moves of the first centres")
    by: Literal["cluster", "block"] = Field(
        "cluster", description="what is ranked: clusters, or blocks of the sorted sequence"
    )

    @property
    def token_order(self) -> Order:
        """By cluster."""
        return KMeans(self.query_clusters, self.key_clusters)

    def clusters(
        self,
        grid: BlockGrid,
        q: Float[Tensor, "*unit S D"],
        k: Float[Tensor, "*unit T D"],
        before: tuple[Clusters, Clusters] | None = None,
    ) -> tuple[Clusters, Clusters]:
        """Clusters of the grid's queries and keys, the first tokens of both; `before` are those of an earlier step."""
        layout = layout_of(grid, self.label)
        tokens = layout.segments[layout.grid_index].tokens
        moves = self.iterations if before is None else 2
        found = [
            k_means(x[..., :tokens, :], count, iterations=moves, start=None if start is None else start.centres)
            for x, count, start in (
                (q, self.query_clusters, before and before[0]),
                (k, self.key_clusters, before and before[1]),
            )
        ]
        return found[0], found[1]

    def select(
        self,
        grid: BlockGrid,
        q: Float[Tensor, "*unit S D"] | None = None,
        k: Float[Tensor, "*unit T D"] | None = None,
        clusters: tuple[Clusters, Clusters] | None = None,
    ) -> Bool[Tensor, "*unit M N"]:
        """Tiles that hold a kept pair.

        `clusters` are those by which q and k are sorted; without them the tokens are clustered and stay in the sequence they are given in.
        """
        layout_of(grid, self.label)
        if q is None or k is None:
            raise SpecError("cluster_mass must be given this call's queries and keys; use it in prefill only.")
        if grid.q_len != grid.kv_len:
            raise SpecError(
                f"cluster_mass needs all queries of the {grid.kv_len} tokens in one call, but got {grid.q_len}."
            )
        if self.by == "block":
            return self._block_tiles(grid, q, k)
        queries, keys = self.clusters(grid, q, k) if clusters is None else clusters
        of_query, of_key = (self._blocks(one, grid, in_order=clusters is not None) for one in (queries, keys))
        scores = queries.centres @ keys.centres.transpose(-1, -2)
        scores = scores + keys.sizes[..., None, :].log()  # an empty cluster weighs nothing
        kept = self._kept(scores).float()
        tiles: Tensor = of_query.transpose(-1, -2) @ kept @ of_key > 0
        return tiles | dense_pairs(grid, self.token_order).to(tiles.device)

    def levels(
        self,
        grid: BlockGrid,
        q: Float[Tensor, "*unit S D"] | None = None,
        k: Float[Tensor, "*unit T D"] | None = None,
        clusters: tuple[Clusters, Clusters] | None = None,
    ) -> Int16[Tensor, "*unit M N"]:
        """The tiles at level 1."""
        return self.select(grid, q, k, clusters).short()

    def _kept(self, scores: Float[Tensor, "*unit C K"]) -> Bool[Tensor, "*unit C K"]:
        least = top_k(scores, max(1, math.ceil(self.keep * scores.shape[-1] - 1e-9)))
        return top_p(scores.softmax(-1), self.mass, least) if self.mass else least

    def _block_tiles(self, grid: BlockGrid, q: Tensor, k: Tensor) -> Bool[Tensor, "*unit M N"]:
        from sparsesearch.rules.pooled_mass import PooledMass

        # any order with the grid first has the same text
        ranked = PooledMass.model_validate({"keep": self.keep, "mass": self.mass, "order": "axes(fhw)"})
        return ranked.select(grid, q, k)

    def _blocks(self, clusters: Clusters, grid: BlockGrid, *, in_order: bool) -> Float[Tensor, "*unit K N"]:
        """1 where a block of the grid holds a token of a cluster."""
        labels = clusters.labels.gather(-1, clusters.order) if in_order else clusters.labels
        block = torch.arange(labels.shape[-1], device=labels.device) // grid.block_tokens
        cells: Int[Tensor, "*unit S"] = labels * grid.num_k_blocks + block
        found = torch.zeros(
            *labels.shape[:-1], clusters.sizes.shape[-1] * grid.num_k_blocks, device=labels.device
        ).scatter(-1, cells, 1.0)  # ones over ones: the same bits in any order
        tiles: Tensor = found.unflatten(-1, (-1, grid.num_k_blocks))
        return tiles

    @classmethod
    def examples(cls) -> list[Self]:
        """The published share and floor, few clusters, blocks."""
        return [
            cls(keep=0.1, mass=0.9),
            cls(keep=0.25, query_clusters=4, key_clusters=8),
            cls(keep=0.2, query_clusters=8, key_clusters=8, by="block"),
        ]
