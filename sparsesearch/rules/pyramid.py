"""pyramid: heavy tiles key by key, lighter ones through means of 2, 4 and 8 neighbouring keys, the lightest not at all."""

from typing import Annotated, Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int16
from pydantic import BeforeValidator, Field, PlainSerializer, model_validator
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.errors import SpecError
from sparsesearch.order import IDENTITY, AnyOrder, Gilbert
from sparsesearch.rules.base import Rest, Rule
from sparsesearch.tile_cover import complete, dense_pairs, layout_of

LEVELS = (1, 2, 4, 8)


def _as_shares(value: Any) -> Any:
    return tuple(float(part) for part in value.split("/")) if isinstance(value, str) else value


def _as_text(value: tuple[float, ...]) -> str:
    return "/".join(f"{share:g}" for share in value)


Shares = Annotated[
    tuple[float, float, float, float], BeforeValidator(_as_shares), PlainSerializer(_as_text, return_type=str)
]


class Pyramid(Rule):
    """Each tile is seen at level 1, 2, 4, 8 or not at all, by its importance among its row's tiles.

    At level n the keys of a block are the means of n neighbours each, with a bias of log n (of the true number, where a block ends early), and
    the values their means. Importance of tile (p, j): the largest weight of a sampled query of p on a sampled key of j, softmax over the sampled
    keys; every 4th token is sampled. `by` rank: the shares count tiles, in order of importance; mass: they count importance, as cumulative
    bands. Tiles that the layout makes dense and the diagonal are at level 1, on top.

    Source: Li et al. 2025, Pyramid Sparse Attention, arXiv:2512.04025, section 3 (levels 1, 2, 4, 8; quotas, or bands .4/.5/.6/.8 of the
    mass). Differs: samples are evenly spaced, not drawn; the optional test of the keys' cosine similarity is left out.
    """

    source: ClassVar[str] = "Pyramid Sparse Attention, arXiv:2512.04025"
    dynamic: ClassVar[bool] = True
    needs_layout: ClassVar[bool] = True
    rest: ClassVar[Rest] = "pooled"
    kind: Literal["pyramid"] = "pyramid"
    shares: Shares = Field(description='of tiles at levels 1, 2, 4 and 8, such as "0.1/0.1/0.1/0.2"')
    by: Literal["rank", "mass"] = Field("rank", description="whether shares are of tiles or of importance")
    order: AnyOrder = IDENTITY

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if min(self.shares) < 0 or sum(self.shares) > 1 + 1e-9:
            raise ValueError(f"shares must be >= 0 and sum to at most 1, but are {_as_text(self.shares)}")
        return self

    def select(
        self, grid: BlockGrid, q: Float[Tensor, "*unit S D"] | None = None, k: Float[Tensor, "*unit T D"] | None = None
    ) -> Bool[Tensor, "*unit M N"]:
        """Tiles at level 1."""
        return self.levels(grid, q, k) == 1

    def levels(
        self, grid: BlockGrid, q: Float[Tensor, "*unit S D"] | None = None, k: Float[Tensor, "*unit T D"] | None = None
    ) -> Int16[Tensor, "*unit M N"]:
        """Level of every tile; ties go to the earlier block."""
        layout_of(grid, self.label)
        if q is None or k is None:
            raise SpecError("pyramid must be given this call's queries and keys; use it in prefill only.")
        if grid.block_tokens % LEVELS[-1]:
            raise SpecError(
                f"pyramid needs blocks of a multiple of {LEVELS[-1]} tokens, but they have {grid.block_tokens}."
            )
        free = grid.reachable(q.device) & ~dense_pairs(grid, self.order).to(q.device)
        importance = sampled_importance(q, k, grid).masked_fill(~free, 0.0)
        order = importance.masked_fill(~free, -1.0).argsort(dim=-1, descending=True, stable=True)
        if self.by == "rank":
            place = torch.arange(grid.num_k_blocks, device=q.device).expand_as(order).double()
            reached = (place + 0.5) / free.sum(-1, keepdim=True).clamp(min=1)
        else:
            ordered = importance.gather(-1, order).double()
            reached = (ordered.cumsum(-1) - 0.5 * ordered) / ordered.sum(-1, keepdim=True).clamp(min=1e-30)
        sorted_levels = torch.zeros_like(order, dtype=torch.int16)
        first = 0.0
        for level, share in zip(LEVELS, self.shares, strict=True):
            sorted_levels[(reached >= first - 1e-9) & (reached < first + share - 1e-9)] = level
            first += share
        levels = torch.zeros_like(sorted_levels).scatter(-1, order, sorted_levels) * free
        exact = complete(levels == 1, grid, self.order)
        return torch.where(exact, torch.ones_like(levels), levels)

    @property
    def coarse_levels(self) -> list[int]:
        """Levels above 1 that have a share."""
        return [level for level, share in zip(LEVELS, self.shares, strict=True) if level > 1 and share > 0]

    @property
    def label(self) -> str:
        """Shares, how they are counted, and the order."""
        return f"{self.kind}(shares={_as_text(self.shares)},by={self.by},order={self.order})"

    @classmethod
    def examples(cls) -> list[Self]:
        """Quotas, the published bands of mass, a curve."""
        return [
            cls(shares=(0.1, 0.1, 0.1, 0.2)),
            cls(shares=(0.4, 0.1, 0.1, 0.2), by="mass"),
            cls(shares=(0.25, 0, 0, 0.75), order=Gilbert()),
        ]


_SAMPLE_EVERY = 4
_STRIP_ELEMENTS = 1 << 26


def sampled_importance(
    q: Float[Tensor, "*unit S D"], k: Float[Tensor, "*unit T D"], grid: BlockGrid
) -> Float[Tensor, "*unit M N"]:
    """Largest weight of a sampled query on a sampled key, per tile; q carries the scale. Samples are at multiples of 4 of the sequence."""
    cells = grid.block_tokens // _SAMPLE_EVERY
    keys = k[..., ::_SAMPLE_EVERY, :]
    skip = -grid.q_start % _SAMPLE_EVERY
    queries = q[..., skip::_SAMPLE_EVERY, :]
    first = (grid.q_start + skip) // _SAMPLE_EVERY  # in samples
    front = first % cells
    queries = F.pad(queries, (0, 0, front, -(front + queries.shape[-2]) % cells))
    width = grid.num_k_blocks * cells
    real = torch.arange(queries.shape[-2], device=q.device)
    hidden_rows = (real < front) | (real + first - front >= -(-grid.kv_len // _SAMPLE_EVERY))
    per_strip = max(1, _STRIP_ELEMENTS // max(1, q.shape[:-2].numel() * keys.shape[-2] * cells))
    strips = []
    for low in range(0, queries.shape[-2] // cells, per_strip):
        rows = slice(low * cells, (low + per_strip) * cells)
        scores = (queries[..., rows, :] @ keys.transpose(-1, -2)).float()
        if grid.causal:
            q_pos = (real[rows] + first - front)[:, None]
            scores = scores.masked_fill(torch.arange(keys.shape[-2], device=q.device) > q_pos, -torch.inf)
        weights = F.pad(scores.softmax(-1), (0, width - keys.shape[-2]))
        weights = weights.nan_to_num(0.0) * ~hidden_rows[rows, None]
        tiles = weights.unflatten(-1, (-1, cells)).unflatten(-3, (-1, cells))
        strips.append(tiles.amax((-1, -3)))
    found = torch.cat(strips, -2)
    return (
        found if found.shape[-2] == grid.num_q_blocks else F.pad(found, (0, 0, 0, grid.num_q_blocks - found.shape[-2]))
    )
