"""token_rows: blocks of tokens that nobody attends to are left out of the attention whole, as queries and as keys."""

from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from sparsesearch.block_mask import BlockGrid, blocks_of
from sparsesearch.errors import SpecError
from sparsesearch.estimators import probe_mass, rows_per_block
from sparsesearch.rules.base import Rule
from sparsesearch.selection import top_k


class TokenRows(Rule):
    """Attention among the blocks that the last queries look at; every other row outputs 0, and the residual stream carries it on.

    c[j] = mean attention of the last `probe` queries to a key of block j. Blocks are dropped from the smallest c on while those dropped hold
    less than `tail` of the attention; at least `min_tokens`, block 0 and the blocks of the last `window` tokens stay. Query block p
    computes key block j  iff  j <= p and both stay.

    Source: Jo et al. 2026, Token Sparse Attention: Efficient Long-Context Inference with Interleaved Token Selection, arXiv:2602.03216
    (released code: window 64, tail 0.005, at least 1024 tokens, in the half of the layers whose hidden states drift least). Differs: whole
    blocks instead of single tokens, and the one that crosses the tail stays; each head decides on its own tail, the code averages it over the layer's heads;
    block 0 stays; which layers take part is the search's choice.
    """

    source: ClassVar[str] = "Token Sparse Attention, arXiv:2602.03216"
    dynamic: ClassVar[bool] = True
    skips_rows: ClassVar[bool] = True
    kind: Literal["token_rows"] = "token_rows"
    tail: float = Field(
        0.005, ge=0, lt=1, description="share of the last queries' attention that dropped blocks may hold"
    )
    min_tokens: int = Field(1024, ge=1, description="tokens that stay at least")
    window: int = Field(64, ge=1, description="last tokens of the sequence that always stay")
    probe: int = Field(64, ge=1, description="last queries that vote")

    def select(
        self, grid: BlockGrid, q: Float[Tensor, "*unit S D"] | None = None, k: Float[Tensor, "*unit T D"] | None = None
    ) -> Bool[Tensor, "*unit M N"]:
        """Rows and columns of the blocks that stay."""
        if q is None or k is None:
            raise SpecError("token_rows must be given this call's queries and keys; use it in prefill only.")
        stays = self._stays(probe_mass(q, k, grid, self.probe).sum(-2), grid)
        rows = stays[..., grid.first_q_block :]
        return grid.reachable(q.device) & rows[..., :, None] & stays[..., None, :]

    def _stays(self, mass: Float[Tensor, "*unit N"], grid: BlockGrid) -> Bool[Tensor, "*unit N"]:
        blocks = torch.arange(grid.num_k_blocks, device=mass.device)
        first_of_window = max(0, grid.kv_len - self.window) // grid.block_tokens
        always = (blocks == 0) | (blocks >= first_of_window)
        per_token = mass / rows_per_block(grid.kv_len, grid, 0, mass.device).squeeze(-1)
        order = per_token.masked_fill(always, torch.inf).argsort(dim=-1, stable=True)
        dropped = mass.double().gather(-1, order).cumsum(-1) / mass.double().sum(-1, keepdim=True)
        count = grid.num_k_blocks - (dropped < self.tail).sum(-1, keepdim=True)
        count = count.clamp(min=blocks_of(self.min_tokens, grid.block_tokens))
        return top_k(per_token.masked_fill(always, torch.inf), count) | always

    @classmethod
    def examples(cls) -> list[Self]:
        """The published setting, most blocks dropped, none but the last query votes."""
        return [cls(), cls(tail=0.5, min_tokens=1), cls(tail=0.2, min_tokens=64, window=130, probe=1)]
