"""rectified_rest: the computed tiles weigh what a pooled attention map says they weigh, and mean values stand for the others."""

from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.estimators import block_means, blocked, rows_per_block
from sparsesearch.rules.base import Rest
from sparsesearch.rules.base_rest import RestRule
from sparsesearch.tile_cover import dense_pairs


class RectifiedRest(RestRule):
    """O_i = R_p·O_S,i + Σ_{j not in S_p, worth it} A_pj·v̄_j  for the queries i of block p and the tiles S_p of the rule `of`.

    A_p is the softmax over key blocks of q̄_p·k̄_j + log n_j; blocks that the layout makes dense (text) are not pooled and weigh
    Σ_t e^{q̄_p·k_t}. R_p = Σ A over the tiles of S_p and over those not worth their mean. With `gate` a mean is worth it iff the score of the
    means exceeds what deviations from them can change,  |q̄_p·k̄_j| > Σ_d mean|q - q̄_p|_d·|k̄_j|_d + |q̄_p|_d·mean|k - k̄_j|_d;  without, always.
    The map costs 1/block² of a tile each, which is not counted.

    Source: Liu et al. 2025, Rectified SpaAttn, arXiv:2511.19835, section 3 and public code (isolated-pooled attention with unpooled text,
    gain-aware pooling). Differs: any rule chooses the tiles; the gain test of the code leaves signs open, ours bounds by absolute values.
    """

    source: ClassVar[str] = "Rectified SpaAttn, arXiv:2511.19835"
    rest: ClassVar[Rest] = "rectified"
    kind: Literal["rectified_rest"] = "rectified_rest"
    gate: bool = Field(
        True, description="use a block's mean value only where its mean score says more than the deviations from it"
    )

    def weights(
        self,
        tiles: Bool[Tensor, "*#unit M N"],
        grid: BlockGrid,
        q: Float[Tensor, "*unit S D"],
        k: Float[Tensor, "*unit T D"],
    ) -> tuple[Float[Tensor, "*unit M 1"], Float[Tensor, "*unit M N"]]:
        """R per query block, and the weight of each block's mean value (0 where the tile is computed); q carries the softmax scale."""
        queries, keys = block_means(q, grid, grid.q_start), block_means(k, grid, 0)
        counts = rows_per_block(grid.kv_len, grid, 0, k.device)[:, 0]
        scores = queries @ keys.transpose(-1, -2) + counts.log()
        for column in dense_pairs(grid, self.token_order).all(0).nonzero()[:, 0].tolist():
            text = k[..., column * grid.block_tokens : (column + 1) * grid.block_tokens, :].to(queries.dtype)
            scores[..., column] = (queries @ text.transpose(-1, -2)).logsumexp(-1)
        share = scores.masked_fill(~grid.reachable(k.device), -torch.inf).softmax(-1)
        tail = ~tiles
        if self.gate:
            away_q = _deviation(q, queries, grid, grid.q_start)
            away_k = _deviation(k, keys, grid, 0)
            gain = (queries @ keys.transpose(-1, -2)).abs()
            error = away_q @ keys.abs().transpose(-1, -2) + queries.abs() @ away_k.transpose(-1, -2)
            tail = tail & (gain > error)
        tail_share = share * tail
        return 1 - tail_share.sum(-1, keepdim=True), tail_share

    @classmethod
    def examples(cls) -> list[Self]:
        """Top tiles with and without the gate, as published; a neighbourhood."""
        from sparsesearch.rules.neighbourhood import Neighbourhood
        from sparsesearch.rules.pooled_mass import PooledMass

        top = PooledMass(keep=0.1, mass=0.3)
        return [cls(of=top), cls(of=top, gate=False), cls(of=Neighbourhood(window=(3, 3, 3)))]


def _deviation(
    x: Float[Tensor, "*unit S D"], means: Float[Tensor, "*unit M D"], grid: BlockGrid, start: int
) -> Float[Tensor, "*unit M D"]:
    """Mean absolute deviation of each block's rows from their mean."""
    rows = torch.arange(means.shape[-2] * grid.block_tokens, device=x.device).view(-1, grid.block_tokens, 1)
    first = start // grid.block_tokens * grid.block_tokens
    real = (rows + first >= start) & (rows + first < start + x.shape[-2])
    away = (blocked(x, grid, start) - means[..., None, :]).abs() * real
    return away.sum(-2) / rows_per_block(x.shape[-2], grid, start, x.device)
