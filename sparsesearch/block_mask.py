"""The block grid of one attention call: which tiles exist, which a rule computes, and what that costs.

A rule decides on tiles of `block_tokens` x `block_tokens`. Inside a chosen tile only causality and padding mask single elements, so one
kernel family runs every rule. Blocks are counted from the sequence's first real token: the result of a rule does not depend on how a
prompt was cut into chunks or padded.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparsesearch.errors import SpecError
from sparsesearch.layout import Layout


@dataclass(frozen=True)
class BlockGrid:
    """Queries `kv_len - q_len … kv_len - 1` against keys `0 … kv_len - 1` of one unpadded sequence.

    Attributes:
        q_len: queries in this call (1 in decoding, fewer than kv_len in chunked prefill).
        kv_len: keys, the queries' own included.
        block_tokens: side of a tile.
        law_len: the length N at which laws a + b·N are evaluated: the prompt length, fixed at prefill. Defaults to kv_len.
        causal: whether query i sees only keys j <= i.
        layout: what the tokens are, for rules that speak of text and frames. The grid's blocks are counted over the tokens in the rule's own
            order (`Rule.token_order`); the layout itself stays in the model's order.
    """

    q_len: int
    kv_len: int
    block_tokens: int
    law_len: int = 0
    causal: bool = True
    layout: Layout | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.q_len <= self.kv_len:
            raise SpecError(f"1 <= q_len <= kv_len must hold, but got q_len={self.q_len}, kv_len={self.kv_len}.")
        if self.block_tokens < 1:
            raise SpecError(f"block_tokens >= 1 must hold, but got {self.block_tokens}.")
        if self.layout is not None and (self.layout.num_tokens != self.kv_len or self.layout.causal != self.causal):
            raise SpecError(
                f"a layout must cover the {self.kv_len} keys with causal={self.causal}, but has {self.layout.num_tokens} tokens and "
                f"causal={self.layout.causal}."
            )
        if self.law_len == 0:
            object.__setattr__(self, "law_len", self.kv_len)

    @property
    def q_start(self) -> int:
        """Position of the first query."""
        return self.kv_len - self.q_len

    @property
    def first_q_block(self) -> int:
        """Block that holds the first query."""
        return self.q_start // self.block_tokens

    @property
    def num_k_blocks(self) -> int:
        """N: key blocks, the last one possibly ragged."""
        return -(-self.kv_len // self.block_tokens)

    @property
    def num_q_blocks(self) -> int:
        """M: query blocks that hold at least one query of this call."""
        return self.num_k_blocks - self.first_q_block

    def q_blocks(self, device: torch.device | str = "cpu") -> Int[Tensor, "M 1"]:
        """Absolute index of each query block, as a column."""
        return torch.arange(self.first_q_block, self.num_k_blocks, device=device)[:, None]

    def k_blocks(self, device: torch.device | str = "cpu") -> Int[Tensor, "1 N"]:
        """Index of each key block, as a row."""
        return torch.arange(self.num_k_blocks, device=device)[None, :]

    def reachable(self, device: torch.device | str = "cpu") -> Bool[Tensor, "M N"]:
        """Tiles that dense attention computes: all of them, or those on and below the diagonal."""
        every = torch.ones(self.num_q_blocks, self.num_k_blocks, dtype=torch.bool, device=device)
        return every.tril_(self.first_q_block) if self.causal else every  # a tenth of the time of comparing positions

    def diagonal(self, device: torch.device | str = "cpu") -> Bool[Tensor, "M N"]:
        """The tile of each query block that holds its own keys."""
        return self.k_blocks(device) == self.q_blocks(device)


def blocks_of(tokens: float, block_tokens: int) -> int:
    """Blocks that hold `tokens` tokens, rounded up."""
    return int(-(-tokens // block_tokens))


def density(mask: Bool[Tensor, "*unit M N"], grid: BlockGrid) -> float:
    """Computed tiles / tiles that dense attention would compute in the same call, in [0, 1]."""
    reachable = grid.reachable(mask.device)
    return int((mask & reachable).sum()) / (int(reachable.sum()) * (mask.numel() // reachable.numel()))


def expand(mask: Bool[Tensor, "*unit M N"], grid: BlockGrid) -> Bool[Tensor, "*unit S T"]:
    """Element mask of a tile choice: chosen tiles, cut by causality. The oracle's view of a rule."""
    device = mask.device
    q_pos = torch.arange(grid.q_start, grid.kv_len, device=device)
    k_pos = torch.arange(grid.kv_len, device=device)
    chosen = mask[..., (q_pos // grid.block_tokens - grid.first_q_block)[:, None], k_pos // grid.block_tokens]
    return chosen & (k_pos <= q_pos[:, None]) if grid.causal else chosen
