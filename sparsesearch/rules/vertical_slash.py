"""vertical_slash: key columns and diagonals that the last queries attend to."""

from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.errors import SpecError
from sparsesearch.rules.base import Law, LengthLaw, Rule


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
        return self.chosen(grid, *self._votes(grid, q, k))

    def chosen(
        self, grid: BlockGrid, columns: Float[Tensor, "*unit N"], diagonals: Float[Tensor, "*unit N"]
    ) -> Bool[Tensor, "*unit M N"]:
        """The tiles that these votes per key block and per distance in blocks lead to."""
        column = _top(columns, max(1, self.vertical.blocks(grid)), always=0)
        diagonal = _top(diagonals, max(1, self.slash.blocks(grid)), always=0)
        device = columns.device
        distance = (grid.q_blocks(device) - grid.k_blocks(device)).clamp(min=0)
        return grid.reachable(device) & (column[..., None, :] | diagonal[..., distance])

    def _votes(
        self, grid: BlockGrid, q: Float[Tensor, "*unit S D"], k: Float[Tensor, "*unit T D"]
    ) -> tuple[Float[Tensor, "*unit N"], Float[Tensor, "*unit N"]]:
        """Attention of the last queries per key block, and per distance in blocks."""
        last = q[..., -min(self.probe, grid.q_len) :, :]
        q_pos = torch.arange(grid.kv_len - last.shape[-2], grid.kv_len, device=q.device)[:, None]
        k_pos = torch.arange(grid.kv_len, device=q.device)[None, :]
        scores = (last @ k.transpose(-1, -2)).float()
        mass = scores.masked_fill(k_pos > q_pos, -torch.inf).softmax(-1)
        blocks = torch.arange(grid.kv_len, device=q.device) // grid.block_tokens
        empty = mass.new_zeros(*mass.shape[:-2], grid.num_k_blocks)
        columns = empty.index_add(-1, blocks, mass.sum(-2))
        distance = (q_pos // grid.block_tokens - k_pos // grid.block_tokens).clamp(min=0)
        diagonals = empty.index_add(-1, distance.flatten(), mass.flatten(-2))
        return columns, diagonals

    @classmethod
    def examples(cls) -> list[Self]:
        """Smallest, MInference-like, elastic."""
        return [
            cls(vertical=LengthLaw(a=1), slash=LengthLaw(a=1), probe=1),
            cls(vertical=LengthLaw(a=100), slash=LengthLaw(a=128)),
            cls(vertical=LengthLaw(b=0.1), slash=LengthLaw(b=0.2)),
        ]


def _top(scores: Float[Tensor, "*unit N"], count: int, *, always: int) -> Bool[Tensor, "*unit N"]:
    """The `count` best entries, entry `always` among them; ties go to the earlier entry."""
    scores = scores.clone()
    scores[..., always] = torch.inf
    return scores.argsort(dim=-1, descending=True, stable=True).argsort(-1) < count
