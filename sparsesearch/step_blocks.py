"""The key blocks that a decoded token chooses among, where its position lies on the device: sizes stay, and the host is not asked.

A choice made here may be captured in a CUDA graph: what it depends on are tensors, and no shape follows from them.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class StepBlocks:
    """Blocks of caches that keep all keys and have room for N blocks; B sequences, g KV heads.

    Attributes:
        position: of the newest token; keys behind it are not there yet.
        law_tokens: the prompts' lengths.
        block_tokens: tokens per block.
        num_blocks: N.
        keys: all rows, T <= N · block_tokens; None for a rule that `reads_bounds`.
        low: for such a rule, the smallest value of each channel in each block, 0 where there is none.
        high: likewise, the largest.
    """

    position: Int[Tensor, "B 1 1 1"]
    law_tokens: Int[Tensor, "B 1 1 1"]
    block_tokens: int
    num_blocks: int
    keys: Float[Tensor, "B g T D"] | None = None
    low: Float[Tensor, "B g N D"] | None = None
    high: Float[Tensor, "B g N D"] | None = None

    @property
    def newest(self) -> Int[Tensor, "B 1 1 1"]:
        """The block that holds the newest token."""
        return self.position // self.block_tokens

    @property
    def index(self) -> Int[Tensor, " N"]:
        """Numbers of the blocks."""
        return torch.arange(self.num_blocks, device=self.position.device)

    def there(self) -> Bool[Tensor, "B 1 1 N"]:
        """Blocks that hold keys."""
        return self.index <= self.newest

    def upper_bounds(self, q: Float[Tensor, "B g size D"]) -> Float[Tensor, "B g size N"]:
        """Σ_d max(q_d · low_d, q_d · high_d), which no q·k of the block exceeds."""
        assert self.low is not None
        assert self.high is not None
        queries, low, high = (x.float() for x in (q, self.low, self.high))
        return queries.clamp(min=0) @ high.transpose(-1, -2) + queries.clamp(max=0) @ low.transpose(-1, -2)

    def maxima(self, q: Float[Tensor, "B g size D"]) -> Float[Tensor, "B g size N"]:
        """Largest q·k in each block, -inf where there is none; reads every key."""
        return self._blocked(self._scores(q), -torch.inf).amax(-1)

    def mass(self, q: Float[Tensor, "B g size D"]) -> Float[Tensor, "B g size N"]:
        """Attention to each block; reads every key."""
        return self._blocked(self._scores(q).softmax(-1), 0.0).sum(-1)

    def _scores(self, q: Float[Tensor, "B g size D"]) -> Float[Tensor, "B g size T"]:
        assert self.keys is not None
        scores = (q @ self.keys.transpose(-1, -2)).float()
        place = torch.arange(scores.shape[-1], device=scores.device)
        return scores.masked_fill(place > self.position, -torch.inf)

    def _blocked(self, x: Float[Tensor, "B g size T"], fill: float) -> Float[Tensor, "B g size N block"]:
        padded = F.pad(x, (0, self.num_blocks * self.block_tokens - x.shape[-1]), value=fill)
        blocks: Tensor = padded.unflatten(-1, (-1, self.block_tokens))
        return blocks


class StepSelection:
    """What the query heads of one layer chose for the newest tokens of a cache, for later layers to reuse.

    Attributes:
        tiles: [B, H, N]; rows of heads that leave nothing mean nothing.
    """

    def __init__(self, batch: int, num_heads: int, num_blocks: int, device: torch.device) -> None:
        self.tiles = torch.zeros(batch, num_heads, num_blocks, dtype=torch.bool, device=device)


def update_bounds(
    low: Float[Tensor, "B g N D"],
    high: Float[Tensor, "B g N D"],
    key: Float[Tensor, "B g D"],
    position: Int[Tensor, " B"],
    block_tokens: int,
) -> None:
    """Let the bounds of the block that `position` lies in speak of the new key too, in place."""
    block = (position // block_tokens)[:, None, None, None].expand(*key.shape[:2], 1, key.shape[2])
    begins, new = (position % block_tokens == 0)[:, None, None, None], key[:, :, None]
    for bounds, wider in ((low, torch.minimum), (high, torch.maximum)):
        before = bounds.gather(2, block)
        bounds.scatter_(2, block, torch.where(begins, new, wider(before, new)))


def page_tables(
    tiles: Bool[Tensor, "B h N"], position: Int[Tensor, " B"], block_tokens: int
) -> tuple[Int[Tensor, "pairs N"], Int[Tensor, " pairs"]]:
    """The chosen blocks of each head, ascending, and the keys in them; the newest block is among them. As `ragged_decode` takes them."""
    last = tiles.shape[-1] - 1
    index = torch.arange(last + 1, device=tiles.device, dtype=torch.int32)
    table = torch.where(tiles, index, last).sort(-1).values
    full = (tiles.sum(-1) - 1) * block_tokens
    lens = full + (position % block_tokens + 1)[:, None]
    return table.flatten(0, 1), lens.flatten().int()
