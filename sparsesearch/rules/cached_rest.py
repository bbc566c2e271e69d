"""cached_rest: what the computed tiles miss is measured at some steps and added at the steps in between."""

from typing import ClassVar, Literal, Self

from jaxtyping import Float, Int16
from pydantic import Field, model_validator
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.rules.base import LengthLaw, Rest
from sparsesearch.rules.base_rest import RestRule


class CachedRest(RestRule):
    """At a refresh step dense attention, which leaves ρ = Σ_S e / Σ e per query and head, and Δ = O - ρ·O_S;  a steps later O = ρ_a·O_S + Δ.

    ρ_a = min(ρ + a·drift, 1): in the published runs the computed tiles' share of the softmax grows from step to step. The first step of a
    range, then every `every`-th one refreshes. Keeps T x (head_dim + 1) numbers per head between steps: `bytes_per_head`. Several calls of one step
    (guidance) must share a batch or carry names, as in diffusers' cache contexts: a residual is kept per name.

    Source: Chen et al. 2025, Re-ttention, arXiv:2505.22918, section 4 and public code (every 5th of the steps dense, drift 0.04 per step, the
    window's ratio and residual kept). Differs: any static rule instead of the window; the sum is clipped at 1; the share is kept in fp32.
    """

    source: ClassVar[str] = "Re-ttention, arXiv:2505.22918"
    rest: ClassVar[Rest] = "cached"
    kind: Literal["cached_rest"] = "cached_rest"
    every: int = Field(5, ge=2, description="steps from one dense step to the next")
    drift: float = Field(0.0, ge=0, le=1, description="what the computed share grows by, per step")

    @model_validator(mode="after")
    def _is_static(self) -> Self:
        if self.of.dynamic:
            raise ValueError(f"of must be a static rule, so that the residual fits its tiles, but is {self.of.label}")
        return self

    def work(
        self, levels: Int16[Tensor, "*unit M N"], grid: BlockGrid, steps: int | None = None
    ) -> Float[Tensor, "*unit"]:
        """The tiles at every step, and dense attention at the refresh steps."""
        return super().work(levels, grid) + float(grid.reachable().sum()) * self.dense_share(steps)

    def dense_share(self, steps: int | None = None) -> float:
        """Share of the steps of a range that refresh; of a long one by default."""
        return 1 / self.every if steps is None else -(-steps // self.every) / steps

    @staticmethod
    def bytes_per_head(tokens: int, head_dim: int, dtype_bytes: int = 2) -> int:
        """Of ρ (fp32) and Δ (as the output) for one head of one sequence."""
        return tokens * (head_dim * dtype_bytes + 4)

    @classmethod
    def examples(cls) -> list[Self]:
        """The published period and drift, and a shorter one over a neighbourhood."""
        from sparsesearch.rules.diagonal_band import DiagonalBand
        from sparsesearch.rules.neighbourhood import Neighbourhood

        return [
            cls(of=DiagonalBand(reach=LengthLaw(b=0.03125)), drift=0.04),
            cls(of=Neighbourhood(window=(3, 3, 3)), every=3),
        ]
