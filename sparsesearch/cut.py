"""A cut: which query heads and FFN channels of which layers a plan removes for good."""

from collections.abc import Iterable
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LayerCut(_Frozen):
    """What one layer had, and what is removed from it.

    Query heads that share a KV head must stay equally many in every KV group that is left; a group without query heads is gone with its
    keys and values.
    """

    num_heads: int = Field(ge=0, description="query heads before the cut")
    num_kv_heads: int = Field(ge=0, description="KV heads before the cut")
    num_channels: int = Field(ge=0, description="FFN channels before the cut")
    removed_heads: tuple[int, ...] = ()
    removed_channels: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, removed, count in (
            ("removed_heads", self.removed_heads, self.num_heads),
            ("removed_channels", self.removed_channels, self.num_channels),
        ):
            if list(removed) != sorted(set(removed)) or any(not 0 <= index < count for index in removed):
                raise ValueError(f"{name} must be ascending, distinct and below {count}")
        if len(set(self._heads_per_group())) > 1:
            raise ValueError("every KV group that is left must keep the same number of query heads")
        return self

    def _heads_per_group(self) -> list[int]:
        size = self.num_heads // max(self.num_kv_heads, 1)
        removed = set(self.removed_heads)
        kept = [
            sum(head not in removed for head in range(group * size, (group + 1) * size))
            for group in range(self.num_kv_heads)
        ]
        return [count for count in kept if count]

    @property
    def kept_heads(self) -> tuple[int, ...]:
        """Query heads that stay, ascending."""
        return _rest(self.removed_heads, self.num_heads)

    @property
    def kept_groups(self) -> tuple[int, ...]:
        """KV heads that stay, ascending."""
        size = self.num_heads // max(self.num_kv_heads, 1)
        return tuple(sorted({head // size for head in self.kept_heads}))

    @property
    def kept_channels(self) -> tuple[int, ...]:
        """FFN channels that stay, ascending."""
        return _rest(self.removed_channels, self.num_channels)


class Cut(_Frozen):
    """Layers by their place in the model's stack; a layer that is not named stays whole.

    Attributes:
        layers: layer index -> what goes.
        compensation: how the projections behind what is removed are fitted anew: calibration spec, length, count, seed, and whether they
            gain a bias; None leaves the surviving weights as they are.
        scoring: how the choice was scored, for people.
    """

    layers: dict[int, LayerCut]
    compensation: "Compensation | None" = None
    scoring: dict[str, Any] = Field(default_factory=dict)


class Compensation(_Frozen):
    """Least-squares reconstruction of the output projections, and the data it is fitted on."""

    data: str = Field(description="calibration spec, as `sparsesearch profile --data` takes it")
    length_tokens: int = Field(ge=1)
    num_samples: int = Field(ge=1)
    seed: int = Field(ge=0)
    bias: bool = Field(description="whether a projection may gain a bias that the stock architecture lacks")


Cut.model_rebuild()


def _rest(removed: Iterable[int], count: int) -> tuple[int, ...]:
    gone = set(removed)
    return tuple(index for index in range(count) if index not in gone)
