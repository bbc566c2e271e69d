"""union: what either of two rules computes."""

from typing import Annotated, Any, ClassVar, Literal, Self

from jaxtyping import Bool, Float
from pydantic import BeforeValidator, SerializeAsAny, model_validator
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.order import Order
from sparsesearch.rules.base import LengthLaw, Rule


def _as_rule(value: Any) -> Any:
    from sparsesearch.rules import parse_rule  # the package imports this module

    return value if isinstance(value, Rule) else parse_rule(value, where="union")


Operand = Annotated[SerializeAsAny[Rule], BeforeValidator(_as_rule)]


class Union(Rule):
    """Tiles of `left` or `right`, which must share one order; nest it for more.

    Source: the union of patterns in BigBird, Zaheer et al. 2020, arXiv:2007.14062, section 2 (window ∪ global ∪ random).
    """

    source: ClassVar[str] = "Zaheer et al. 2020, BigBird, arXiv:2007.14062"
    kind: Literal["union"] = "union"
    left: Operand
    right: Operand

    @model_validator(mode="after")
    def _compatible(self) -> Self:
        if self.left.token_order != self.right.token_order:
            raise ValueError(
                f"both rules must have one order, but have {self.left.token_order} and {self.right.token_order}"
            )
        if self.left.rest != "drop" or self.right.rest != "drop":
            raise ValueError(
                "both rules must drop what they do not compute; zero and mean_value replace the whole output"
            )
        if self.left.dynamic or self.right.dynamic or self.left.needs_calibration or self.right.needs_calibration:
            raise ValueError("both rules must be static and need no calibration")
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
        """Two windows."""
        from sparsesearch.rules.sink_window import SinkWindow

        return [
            cls(left=SinkWindow(sink=64, window=LengthLaw(a=64)), right=SinkWindow(sink=0, window=LengthLaw(b=0.1)))
        ]
