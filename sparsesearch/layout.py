"""What the tokens of a sequence are: segments of text, video, image, prompt or generation, each on its own grid.

A layout belongs to the model and the request, not to the search: hooks learn it from a forward pass. Segments follow one another without
padding, so the sequence keeps its length. Their borders need not be block borders: a tile that holds pairs of several segments obeys the
strictest policy among them (dense before rule). An order other than the identity moves the grid segment to the front, so that its first
token starts block 0 wherever the text stands in the model; then only the block at the segment's end is mixed.
"""

from functools import lru_cache
from itertools import accumulate
from math import prod
from typing import Literal, Self

import torch
from jaxtyping import Int
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from sparsesearch.errors import SpecError

SegmentKind = Literal["text", "image", "video", "prompt", "generation"]
PairPolicy = Literal["dense", "rule"]

TEXT_DENSE: tuple[tuple[SegmentKind | Literal["*"], SegmentKind | Literal["*"], PairPolicy], ...] = (
    ("text", "*", "dense"),
    ("*", "text", "dense"),
)


class Segment(BaseModel):
    """Consecutive tokens of one kind.

    `shape` is their grid, last axis fastest: (tokens,), (height, width) or (frames, height, width), in tokens.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: SegmentKind
    shape: tuple[int, ...] = Field(min_length=1, max_length=3)

    @field_validator("shape")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if min(value) < 1:
            raise ValueError(f"every axis must have at least 1 token, but got {value}")
        return value

    @property
    def tokens(self) -> int:
        """How many tokens."""
        return prod(self.shape)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Frames, height, width; axes that the shape lacks are 1."""
        frames, height, width = (1,) * (3 - len(self.shape)) + self.shape
        return frames, height, width


class Layout(BaseModel):
    """The segments of a sequence, and how pairs of them attend.

    `policy` holds (kind of the queries, kind of the keys, policy) with "*" for any kind; the first line that fits counts, and pairs that no
    line names follow the rule. The default computes every text row and every text column: Xi et al. 2025, Sparse VideoGen,
    arXiv:2502.01776 (public code); Sparse-vDiT, arXiv:2506.03065, leaves it unstated.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    segments: tuple[Segment, ...] = Field(min_length=1)
    causal: bool = Field(False, description="query i sees keys j <= i only; grids of several axes cannot be causal")
    policy: tuple[tuple[SegmentKind | Literal["*"], SegmentKind | Literal["*"], PairPolicy], ...] = TEXT_DENSE

    @model_validator(mode="after")
    def _causal_is_one_dimensional(self) -> Self:
        if self.causal and any(len(segment.shape) > 1 for segment in self.segments):
            raise ValueError("a causal layout must have segments of one axis; set causal: false for images and video")
        return self

    @property
    def num_tokens(self) -> int:
        """Length of the sequence."""
        return sum(segment.tokens for segment in self.segments)

    @property
    def starts(self) -> tuple[int, ...]:
        """First token of each segment."""
        return (0, *accumulate(segment.tokens for segment in self.segments[:-1]))

    @property
    def grid_index(self) -> int:
        """Which segment is the image or video that rules with a geometry speak of.

        Raises:
            SpecError: there is none, or more than one.
        """
        found = [i for i, segment in enumerate(self.segments) if segment.kind in ("image", "video")]
        if len(found) != 1:
            kinds = ", ".join(segment.kind for segment in self.segments)
            raise SpecError(
                f"a rule or order over frames must have one image or video segment, but the layout has {len(found)} ({kinds})."
            )
        return found[0]

    @property
    def grid_shape(self) -> tuple[int, int, int]:
        """Frames, height and width of the image or video segment, in tokens."""
        return self.segments[self.grid_index].grid

    @property
    def grid_start(self) -> int:
        """First token of the image or video segment."""
        return self.starts[self.grid_index]

    def pair_policy(self, query_kind: SegmentKind, key_kind: SegmentKind) -> PairPolicy:
        """How queries of one kind attend to keys of another."""
        for rows, columns, policy in self.policy:
            if rows in ("*", query_kind) and columns in ("*", key_kind):
                return policy
        return "rule"

    def segment_of_token(self) -> Int[Tensor, " T"]:
        """Index of the segment that holds each token, in the model's order."""
        return _segment_of_token(self)

    def coordinates(self) -> Int[Tensor, "T 3"]:
        """Frame, row and column of each token of the image or video segment, in the model's order; -1 elsewhere."""
        return _coordinates(self)


@lru_cache(maxsize=32)
def _segment_of_token(layout: Layout) -> Int[Tensor, " T"]:
    return torch.arange(len(layout.segments)).repeat_interleave(torch.tensor([s.tokens for s in layout.segments]))


@lru_cache(maxsize=32)
def _coordinates(layout: Layout) -> Int[Tensor, "T 3"]:
    out = torch.full((layout.num_tokens, 3), -1, dtype=torch.long)
    axes = torch.meshgrid(*(torch.arange(size) for size in layout.grid_shape), indexing="ij")
    start = layout.grid_start
    out[start : start + axes[0].numel()] = torch.stack([axis.flatten() for axis in axes], 1)
    return out


def video_layout(frames: int, height: int, width: int, *, text_first: int = 0, text_last: int = 0) -> Layout:
    """A video of so many tokens per axis, with text tokens before or after it: Wan has neither, CogVideoX first, HunyuanVideo last."""
    segments = [Segment(kind="video", shape=(frames, height, width))]
    if text_first:
        segments.insert(0, Segment(kind="text", shape=(text_first,)))
    if text_last:
        segments.append(Segment(kind="text", shape=(text_last,)))
    return Layout(segments=tuple(segments))
