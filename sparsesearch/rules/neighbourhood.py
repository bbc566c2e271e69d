"""neighbourhood: a window of frames, rows and columns around each token, sliding, strided or blocked, possibly dilated."""

from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float
from pydantic import BeforeValidator, Field, PlainSerializer, field_validator, model_validator
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.order import IDENTITY, AnyOrder, Tile
from sparsesearch.rules.base import Rule
from sparsesearch.tile_cover import complete, cover, layout_of


def _as_triple(value: Any) -> Any:
    return tuple(int(part) for part in value.split("x")) if isinstance(value, str) else value


def _as_text(value: tuple[int, int, int]) -> str:
    return "x".join(map(str, value))


Triple = Annotated[tuple[int, int, int], BeforeValidator(_as_triple), PlainSerializer(_as_text, return_type=str)]
"""Frames x rows x columns; written "3x5x5", so that a list in a search space stays an axis of its grid."""


class Neighbourhood(Rule):
    """Generalised neighbourhood attention: per axis, keys of the query's own dilation group inside a window of w around a leader.

    With x' = x // d, groups x mod d, and L the length of the query's group:
        leader = min((q' // s)·s + ⌊s/2⌋, L - 1),  centre c = clamp(leader, ⌊w/2⌋, L - 1 - (⌊w/2⌋ + w mod 2 - 1)),
        kept iff c - ⌊w/2⌋ <= k' <= c + ⌊w/2⌋ + (w mod 2) - 1;
        causal: leader = min((q' // s)·s + s - 1, L - 1), kept iff q' >= k' and leader - k' < w.
    s = 1 slides, 1 < s < w strides, s = w makes blocks; a window of 0 is the whole axis. A pair is kept iff all three axes keep it.

    Source: Hassani et al. 2025, Generalized Neighborhood Attention, arXiv:2504.16922, section 3 (NATTEN's public reference masks). Differs:
    whole tiles of the chosen order.
    """

    source: ClassVar[str] = "Hassani et al. 2025, GNA, arXiv:2504.16922"
    needs_layout: ClassVar[bool] = True
    kind: Literal["neighbourhood"] = "neighbourhood"
    window: Triple = Field(description='frames x rows x columns, such as "3x5x5"; 0 for a whole axis')
    stride: Triple = Field((1, 1, 1), description="queries that share a window, per axis")
    dilation: Triple = Field((1, 1, 1), description="step between neighbours, per axis")
    causal: Triple = Field((0, 0, 0), description="1 where a query sees no later key, per axis")
    order: AnyOrder = IDENTITY

    @field_validator("stride", "dilation")
    @classmethod
    def _positive(cls, value: tuple[int, int, int]) -> tuple[int, int, int]:
        if min(value) < 1:
            raise ValueError(f"every axis must be at least 1, but got {_as_text(value)}")
        return value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if min(self.window) < 0 or any(w and s > w for w, s in zip(self.window, self.stride, strict=True)):
            raise ValueError(
                f"window must be >= 0 and stride <= window per axis, but got {_as_text(self.window)} and {_as_text(self.stride)}"
            )
        if set(self.causal) - {0, 1}:
            raise ValueError(f"causal must be 0 or 1 per axis, but got {_as_text(self.causal)}")
        return self

    def select(
        self, grid: BlockGrid, q: Float[Tensor, "*unit S D"] | None = None, k: Float[Tensor, "*unit T D"] | None = None
    ) -> Bool[Tensor, "M N"]:
        """Tiles that hold a kept pair."""
        shape = layout_of(grid, self.label).grid_shape
        axes = [
            axis_mask(length, w, s, d, causal=bool(c))
            for length, w, s, d, c in zip(shape, self.window, self.stride, self.dilation, self.causal, strict=True)
        ]
        return complete(cover(grid, self.order, axes), grid, self.order)

    @property
    def label(self) -> str:
        """Only what differs from a plain sliding window."""
        changed = {"stride": (1, 1, 1), "dilation": (1, 1, 1), "causal": (0, 0, 0)}
        parts = [f"window={_as_text(self.window)}"]
        parts += [
            f"{name}={_as_text(getattr(self, name))}" for name, usual in changed.items() if getattr(self, name) != usual
        ]
        return f"{self.kind}({','.join([*parts, f'order={self.order}'])})"

    @classmethod
    def examples(cls) -> list[Self]:
        """Sliding, strided over tiles, dilated, causal in time, one whole axis."""
        tiles = Tile(2, 4, 4)
        return [
            cls(window=(3, 3, 3)),
            cls(window=(4, 8, 8), stride=(2, 4, 4), order=tiles),
            cls(window=(2, 3, 3), dilation=(1, 2, 2), order=tiles),
            cls(window=(2, 0, 0), causal=(1, 0, 0)),
            cls(window=(0, 2, 2), order=Tile(0, 2, 2)),
        ]


def axis_mask(length: int, window: int, stride: int, dilation: int, *, causal: bool) -> Bool[Tensor, "L L"]:
    """Which keys each query of one axis keeps."""
    place = torch.arange(length)
    group, inner = place % dilation, place // dilation
    if window == 0:
        kept = torch.ones(length, length, dtype=torch.bool)
        return kept & (place[:, None] >= place) if causal else kept
    group_length = (length - group + dilation - 1) // dilation
    q, k, last = inner[:, None], inner[None, :], (group_length - 1)[:, None]
    if causal:
        leader = (q // stride * stride + stride - 1).minimum(last)
        inside = (q >= k) & (leader - k < window)
    else:
        leader = (q // stride * stride + stride // 2).minimum(last)
        before, after = window // 2, window // 2 + window % 2 - 1
        centre = leader.maximum(torch.tensor(before)).minimum(last - after)
        inside = (centre - before <= k) & (k <= centre + after)
    return inside & (group[:, None] == group[None, :])
