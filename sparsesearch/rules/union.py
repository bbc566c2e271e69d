"""union: what either of two rules computes."""

from typing import ClassVar, Literal, Self

from jaxtyping import Bool, Float
from pydantic import model_validator
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.order import Order
from sparsesearch.rules.base import Rule
from sparsesearch.rules.base_rest import Operand


class Union(Rule):
    """Tiles of `left` or `right`, which must share one order; nest it for more.

    Source: the union of patterns in BigBird, Zaheer et al. 2020, arXiv:2007.14062, section 2 (window ∪ global ∪ random).
    """

    source: ClassVar[str] = "Zaheer et al. 2020, BigBird, arXiv:2007.14062"
    needs_layout: ClassVar[bool] = True
    kind: Literal["union"] = "union"
    left: Operand
    right: Operand

    @model_validator(mode="after")
    def _compatible(self) -> Self:
        if self.left.token_order != self.right.token_order:
            raise ValueError(
                f"both rules must have one order, but have {self.left.token_order} and {self.right.token_order}"
            )
        for rule in (self.left, self.right):
            if not rule.needs_layout or rule.dynamic or rule.rest != "drop" or not rule.ready:
                raise ValueError(
                    f"both rules must be static rules over frames that need no calibration any more, but one is {rule.label}"
                )
        return self

    @property
    def token_order(self) -> Order:
        """The order of both."""
        return self.left.token_order

    def select(
        self, grid: BlockGrid, q: Float[Tensor, "*unit S D"] | None = None, k: Float[Tensor, "*unit T D"] | None = None
    ) -> Bool[Tensor, "M N"]:
        """Either."""
        return self.left.select(grid) | self.right.select(grid)

    @property
    def label(self) -> str:
        """Both labels."""
        return f"union({self.left.label},{self.right.label})"

    @classmethod
    def examples(cls) -> list[Self]:
        """The first frame and the own frame; a third on top."""
        from sparsesearch.rules.first_frames import FirstFrames
        from sparsesearch.rules.neighbourhood import Neighbourhood

        pair = cls(left=FirstFrames(), right=Neighbourhood(window=(1, 0, 0)))
        return [pair, cls(left=pair, right=Neighbourhood(window=(0, 1, 1)))]
