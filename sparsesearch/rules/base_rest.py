"""The base of rules that put a term in the place of what another rule leaves out, and a rule as a field of a rule."""

from typing import Annotated, Any, ClassVar, Self

from jaxtyping import Bool, Float
from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.order import Order
from sparsesearch.rules.base import Rule, short


def _as_rule(value: Any) -> Any:
    from sparsesearch.rules import parse_rule  # the package imports this module

    return value if isinstance(value, Rule) else parse_rule(value, where="the inner rule")


Operand = Annotated[SerializeAsAny[Rule], BeforeValidator(_as_rule)]
"""A rule inside a rule."""


class RestRule(Rule):
    """Base of the rules that compute the tiles of another one, `of`, and put a term in the place of what it leaves out."""

    needs_layout: ClassVar[bool] = True
    of: Operand = Field(description="the rule whose tiles are computed")

    @model_validator(mode="after")
    def _has_a_rest(self) -> Self:
        if self.of.rest != "drop" or self.of.reuses or not self.of.needs_layout:
            raise ValueError(
                f"of must be a rule over frames that chooses tiles by itself and drops the rest, but is {self.of.label}"
            )
        if getattr(self.of, "by", None) == "cluster":
            raise ValueError(
                f"of must choose among the blocks that the rest speaks of (by: block), but is {self.of.label}"
            )
        return self

    @property
    def dynamic(self) -> bool:  # type: ignore[override]
        """Whether the inner rule is."""
        return self.of.dynamic

    @property
    def needs_calibration(self) -> bool:  # type: ignore[override]
        """Whether the inner rule does."""
        return self.of.needs_calibration

    @property
    def ready(self) -> bool:
        """Whether the inner rule is."""
        return self.of.ready

    @property
    def token_order(self) -> Order:
        """The inner rule's."""
        return self.of.token_order

    def calibrated(self, mass: Float[Tensor, "N N"], grid: BlockGrid | None = None) -> Self:
        """With the inner rule calibrated."""
        return self.model_copy(update={"of": self.of.calibrated(mass, grid)})

    def select(
        self, grid: BlockGrid, q: Float[Tensor, "*unit S D"] | None = None, k: Float[Tensor, "*unit T D"] | None = None
    ) -> Bool[Tensor, "*#unit M N"]:
        """The inner rule's tiles."""
        return self.of.select(grid, q, k)

    @property
    def label(self) -> str:
        """The inner rule's label and what differs from it."""
        own = [f"{name}={short(getattr(self, name))}" for name in type(self).model_fields if name not in ("kind", "of")]
        return f"{self.kind}({','.join([self.of.label, *own])})"
