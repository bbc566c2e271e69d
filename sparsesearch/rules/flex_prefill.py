"""flex_prefill: each head decides at run time whether pooled scores or columns and diagonals describe it, and takes what holds most mass."""

from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from sparsesearch.block_mask import BlockGrid, blocks_of
from sparsesearch.errors import SpecError
from sparsesearch.estimators import block_means, diagonal_sums, probe_mass, tail_grid
from sparsesearch.rules.base import Rule
from sparsesearch.selection import top_k, top_p


class FlexPrefill(Rule):
    """Query-aware where pooled scores agree with the true block attention of the last queries, else vertical-slash; cumulative mass γ.

    ā = softmax(mean(q_last)·mean(k block));  â = mean over q_last of softmax(q·kᵀ) summed per key block;  D = √JSD(ā ‖ â).
    D < τ: of the pooled map, softmax per row, the smallest set of tiles of the whole head that holds γ of its mass.
    D >= τ: the smallest sets of block columns and of block diagonals that each hold γ of the last queries' attention.
    At least `min_budget` tokens per row, or per set; column 0 and the diagonal are always in.

    Source: Lai et al. 2025, FlexPrefill, arXiv:2502.20766, algorithms 1-4 (blocks of 128, γ 0.9 or 0.95, τ 0.1, the last block as probe,
    at least 512 or 1024 tokens). Differs: columns and diagonals are whole tiles, the published code gathers single ones.
    """

    source: ClassVar[str] = "FlexPrefill, arXiv:2502.20766"
    dynamic: ClassVar[bool] = True
    kind: Literal["flex_prefill"] = "flex_prefill"
    gamma: float = Field(0.95, gt=0, le=1, description="share of the estimated attention that is kept")
    tau: float = Field(
        0.1, ge=0, le=1, description="largest Jensen-Shannon distance at which pooled scores are trusted"
    )
    min_budget: int = Field(512, ge=0, description="tokens kept at least")
    probe: int = Field(128, ge=1, description="last queries that are looked at")

    def select(
        self, grid: BlockGrid, q: Float[Tensor, "*unit S D"] | None = None, k: Float[Tensor, "*unit T D"] | None = None
    ) -> Bool[Tensor, "*unit M N"]:
        """The tiles of whichever description each head trusts."""
        if q is None or k is None:
            raise SpecError("flex_prefill must be given this call's queries and keys; use it in prefill only.")
        mass = probe_mass(q, k, grid, self.probe)
        pooled_k = block_means(k, grid, 0)
        last = q[..., -min(self.probe, grid.q_len) :, :].mean(-2, keepdim=True, dtype=torch.float32)
        pooled = (last @ pooled_k.transpose(-1, -2)).softmax(-1).squeeze(-2)
        columns = mass.sum(-2)
        trusted = jensen_shannon_distance(pooled, columns / columns.sum(-1, keepdim=True)) < self.tau
        lines = self._vertical_slash(columns, diagonal_sums(mass, tail_grid(grid, self.probe)), grid)
        return torch.where(trusted[..., None, None], self._query_aware(q, pooled_k, grid), lines)

    def _query_aware(
        self, q: Float[Tensor, "*unit S D"], pooled_k: Float[Tensor, "*unit N D"], grid: BlockGrid
    ) -> Bool[Tensor, "*unit M N"]:
        """γ of the pooled map's mass, shared over all rows of the head."""
        reachable = grid.reachable(q.device)
        scores = block_means(q, grid, grid.q_start) @ pooled_k.transpose(-1, -2)
        weights = scores.masked_fill(~reachable, -torch.inf).softmax(-1)
        floor = top_k(weights, blocks_of(self.min_budget, grid.block_tokens))
        always = floor | grid.diagonal(q.device) | (grid.k_blocks(q.device) == 0)
        chosen = top_p(weights.flatten(-2), self.gamma, always.flatten(-2))
        return reachable & chosen.view(weights.shape)

    def _vertical_slash(
        self, columns: Float[Tensor, "*unit N"], diagonals: Float[Tensor, "*unit N"], grid: BlockGrid
    ) -> Bool[Tensor, "*unit M N"]:
        """γ of the probes' mass in columns, and γ in diagonals."""
        device = columns.device
        distance = (grid.q_blocks(device) - grid.k_blocks(device)).clamp(min=0)
        column, diagonal = (self._most(scores, grid) for scores in (columns, diagonals))
        return grid.reachable(device) & (column[..., None, :] | diagonal[..., distance])

    def _most(self, scores: Float[Tensor, "*unit N"], grid: BlockGrid) -> Bool[Tensor, "*unit N"]:
        first = torch.arange(scores.shape[-1], device=scores.device) == 0
        floor = top_k(scores, blocks_of(self.min_budget, grid.block_tokens))
        return top_p(scores, self.gamma, floor | first)

    @classmethod
    def examples(cls) -> list[Self]:
        """The paper's, one that always trusts pooled scores, one that never does."""
        return [cls(), cls(gamma=0.6, tau=1.0, min_budget=0), cls(gamma=0.6, tau=0.0, min_budget=64, probe=1)]


def jensen_shannon_distance(p: Float[Tensor, "*unit N"], q: Float[Tensor, "*unit N"]) -> Float[Tensor, "*unit"]:
    """√(½ KL(p ‖ m) + ½ KL(q ‖ m)), m = (p + q)/2, in nats; at most √(ln 2)."""
    middle = (p + q) / 2
    terms = [torch.where(x > 0, x * (x.clamp(min=1e-30) / middle.clamp(min=1e-30)).log(), 0.0).sum(-1) for x in (p, q)]
    return ((terms[0] + terms[1]) / 2).clamp(min=0).sqrt()
