"""stripes: periodic bands in time and in space; bands, diagonals and stripes of the other rules are special cases."""

from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.order import IDENTITY, AnyOrder, Tile
from sparsesearch.rules.base import Rule
from sparsesearch.tile_cover import complete, cover, layout_of


class Stripes(Rule):
    """Pairs with |Δt - T_o| mod T_s <= T_w - 1  and  |Δs - S_o| mod S_s <= S_w - 1.

    Δt = difference of frames, Δs = difference of positions row·width + column, queries minus keys. With a tile order both count whole
    tiles: boxes of frames, and patches of a frame. A period of 0 means none.

    Source: Parameterized Stripe Attention (PSA-Search), arXiv:2609.37001, with tiles of 3 x 8 x 16. Differs: the own tile is always in.
    """

    source: ClassVar[str] = "Parameterized Stripe Attention, arXiv:2609.37001"
    needs_layout: ClassVar[bool] = True
    kind: Literal["stripes"] = "stripes"
    time_width: int = Field(ge=1, description="T_w")
    time_period: int = Field(0, ge=0, description="T_s; 0 for none")
    time_offset: int = Field(0, description="T_o")
    space_width: int = Field(ge=1, description="S_w")
    space_period: int = Field(0, ge=0, description="S_s; 0 for none")
    space_offset: int = Field(0, description="S_o")
    order: AnyOrder = IDENTITY

    @model_validator(mode="after")
    def _width_below_period(self) -> Self:
        for name in ("time", "space"):
            width, period = getattr(self, f"{name}_width"), getattr(self, f"{name}_period")
            if 0 < period < width:
                raise ValueError(f"{name}_width must be <= {name}_period, but got {width} and {period}")
        return self

    def select(
        self, grid: BlockGrid, q: Float[Tensor, "*unit S D"] | None = None, k: Float[Tensor, "*unit T D"] | None = None
    ) -> Bool[Tensor, "M N"]:
        """Tiles that hold such a pair."""
        frames, height, width = layout_of(grid, self.label).grid_shape
        units = self.units((frames, height, width))
        steps = -(-frames // units[0])
        patches = -(-height // units[1]) * -(-width // units[2])
        allowed = [
            stripe_mask(steps, self.time_width, self.time_period, self.time_offset),
            stripe_mask(patches, self.space_width, self.space_period, self.space_offset),
        ]
        return complete(cover(grid, self.order, allowed, units=units), grid, self.order)

    def units(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Frames, rows and columns that count as one step."""
        if not isinstance(self.order, Tile):
            return 1, 1, 1
        t, h, w = (size if side == 0 else side for side, size in zip(self.order.sides, shape, strict=True))
        return t, h, w

    @property
    def label(self) -> str:
        """Widths, and what differs from no period and no offset."""
        names = ("time_width", "time_period", "time_offset", "space_width", "space_period", "space_offset")
        parts = [f"{name}={getattr(self, name)}" for name in names if getattr(self, name)]
        return f"{self.kind}({','.join([*parts, f'order={self.order}'])})"

    @classmethod
    def examples(cls) -> list[Self]:
        """Same frame; every second frame at nearby places; an offset."""
        return [
            cls(time_width=1, space_width=10_000),
            cls(time_width=1, time_period=2, space_width=2, order=Tile(2, 4, 4)),
            cls(time_width=2, space_width=3, space_period=7, space_offset=-1, time_offset=1),
        ]


def stripe_mask(length: int, width: int, period: int, offset: int) -> Bool[Tensor, "L L"]:
    """The formula on one axis."""
    place = torch.arange(length)
    distance = (place[:, None] - place - offset).abs()
    return (distance % period if period else distance) <= width - 1
