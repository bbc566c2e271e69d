"""vertical_slash: key columns and diagonals that the last queries attend to."""

from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.errors import SpecError
from sparsesearch.estimators import diagonal_sums, probe_mass, tail_grid
from sparsesearch.rules.base import Law, LengthLaw, Rule
from sparsesearch.selection import top_k


class VerticalSlash(Rule):
    """Block columns and block diagonals chosen by the attention of the last `probe` queries.

    A = softmax(q_last · kᵀ) (causal);  column score c[j] = Σ A over key block j;  diagonal score d[δ] = Σ A over pairs whose query block
    minus key block is δ. Kept: the ⌈vertical(N)/block⌉ best columns, the ⌈slash(N)/block⌉ best diagonals, block 0, and the diagonal δ = 0.

    Source: Jiang et al. 2024, MInference, arXiv:2407.02490, algorithm 2 (estimation by the last 64 queries). Differs: columns and diagonals
    are whole blocks, so that one tile kernel runs them; MInference gathers single columns.
    """

    source: ClassVar[str] = "MInference, arXiv:2407.02490"
    dynamic: ClassVar[bool] = True
    kind: Literal["vertical_slash"] = "vertical_slash"
    vertical: Law = Field(description="tokens in kept columns: a number or {a, b} for a + b·N")
    slash: Law = Field(description="tokens in kept diagonals: a number or {a, b} for a + b·N")
    probe: int = Field(64, ge=1, description="last queries that vote")

    def select(
        self, grid: BlockGrid, q: Float[Tensor, "*unit S D"] | None = None, k: Float[Tensor, "*unit T D"] | None = None
    ) -> Bool[Tensor, "*unit M N"]:
        """Chosen columns and diagonals, below the diagonal."""
        if q is None or k is None:
            raise SpecError("vertical_slash must be given this call's queries and keys; use it in prefill only.")
        return self.chosen(grid, *self.votes(grid, q, k))

    @property
    def ballot(self) -> int:
        """Which queries vote."""
        return self.probe

    def chosen(self, grid: BlockGrid, *votes: Float[Tensor, "*unit N"]) -> Bool[Tensor, "*unit M N"]:
        """The tiles that these votes per key block and per distance in blocks lead to."""
        columns, diagonals = votes
        column = best_with_first(columns, max(1, self.vertical.blocks(grid)))
        diagonal = best_with_first(diagonals, max(1, self.slash.blocks(grid)))
        device = columns.device
        distance = (grid.q_blocks(device) - grid.k_blocks(device)).clamp(min=0)
        return grid.reachable(device) & (column[..., None, :] | diagonal[..., distance])

    def votes(
        self, grid: BlockGrid, q: Float[Tensor, "*unit S D"], k: Float[Tensor, "*unit T D"]
    ) -> tuple[Float[Tensor, "*unit N"], Float[Tensor, "*unit N"]]:
        """Attention of the last queries per key block, and per distance in blocks."""
        mass = probe_mass(q, k, grid, self.probe)
        return mass.sum(-2), diagonal_sums(mass, tail_grid(grid, self.probe))

    def keeps_all(self, grid: BlockGrid) -> bool:
        """Where columns or diagonals alone cover the grid."""
        return max(self.vertical.blocks(grid), self.slash.blocks(grid)) >= grid.num_k_blocks

    @classmethod
    def examples(cls) -> list[Self]:
        """Smallest, MInference-like, elastic."""
        return [
            cls(vertical=LengthLaw(a=1), slash=LengthLaw(a=1), probe=1),
            cls(vertical=LengthLaw(a=100), slash=LengthLaw(a=128)),
            cls(vertical=LengthLaw(b=0.1), slash=LengthLaw(b=0.2)),
        ]


def best_with_first(scores: Float[Tensor, "*unit N"], count: int) -> Bool[Tensor, "*unit N"]:
    """The `count` best entries, entry 0 among them; ties go to the earlier entry."""
    first = torch.arange(scores.shape[-1], device=scores.device) == 0
    return top_k(scores.masked_fill(first, torch.inf), count)
