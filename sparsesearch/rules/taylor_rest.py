"""taylor_rest: every key block that is not computed stands in the softmax by its mean key, its mean value and its number of keys."""

from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float, Int16
from pydantic import Field
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.rules.base import LengthLaw, Rest
from sparsesearch.rules.base_rest import RestRule


class TaylorRest(RestRule):
    """Exact tiles S of the rule `of`; of each other block j of n_j keys a Taylor expansion of exp(q·k) around its mean key k̄_j.

        O = (Σ_{i in S} e^{q·k_i} v_i + Σ_{j not in S} n_j e^{q·k̄_j} v̄_j + w·qᵀH/T) / (Σ_{i in S} e^{q·k_i} + w),
        w = Σ_{j not in S} n_j e^{q·k̄_j},   H = Σ_j Σ_{i in j} (k_i - k̄_j) v_iᵀ over all blocks; q carries the softmax scale.

    With terms 0 the part with H is left out: a mean key is then an extra key with a bias of log n_j, and if the keys of every block are equal
    the result is dense attention, exactly. Means are 1/block of their tile's work; H is counted as half a tile per row.

    Source: Li et al. 2026, PISA, arXiv:2602.01077, section 3 (block 64, density 0.1 to 0.15, one H of all blocks). Differs: any rule chooses
    the exact tiles; the public kernel's running sum of H, which is not rescaled, is not imitated.
    """

    source: ClassVar[str] = "PISA, arXiv:2602.01077"
    rest: ClassVar[Rest] = "taylor"
    kind: Literal["taylor_rest"] = "taylor_rest"
    terms: Literal[0, 1] = Field(1, description="0: mean keys alone; 1: and the first-order term")

    def levels_of(self, tiles: Bool[Tensor, "*unit M N"], grid: BlockGrid) -> Int16[Tensor, "*unit M N"]:
        """The tiles at 1, all others at one mean per block."""
        pooled = grid.reachable(tiles.device) & ~tiles
        return tiles.short() + pooled.short() * grid.block_tokens

    def work(
        self, levels: Int16[Tensor, "*unit M N"], grid: BlockGrid, steps: int | None = None
    ) -> Float[Tensor, "*unit"]:
        """Tiles, means, and q·H (a head_dim of a block is assumed)."""
        return super().work(levels, grid) + 0.5 * self.terms * grid.num_q_blocks

    @classmethod
    def examples(cls) -> list[Self]:
        """Both orders, over a band, a bitmap and top-k tiles."""
        from sparsesearch.rules.calibrated_tiles import CalibratedTiles
        from sparsesearch.rules.diagonal_band import DiagonalBand
        from sparsesearch.rules.pooled_mass import PooledMass

        mass = (torch.arange(49.0).view(7, 7) * 11) % 17
        return [
            cls(of=DiagonalBand(reach=LengthLaw(b=0.1))),
            cls(of=CalibratedTiles(keep=0.3).calibrated(mass), terms=0),
            cls(of=PooledMass(keep=0.125)),
        ]
