"""What a cost model is asked, and what it must answer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args, runtime_checkable

from jaxtyping import Float
from numpy import ndarray

from sparsesearch.errors import SpecError

WorkKind = Literal["dense", "tiles", "zero", "mean_value"]


@dataclass(frozen=True)
class UnitWork:
    """What one unit computes in one causal attention call.

    Attributes:
        kind: how: plain attention, chosen tiles, nothing, or the running mean of the values.
        q_len: queries of the call.
        kv_len: keys, the queries' own included.
        head_dim: elements per head.
        query_heads: query heads in the unit; they share one KV head.
        tiles: computed tiles, summed over the unit's query heads; a mean over sequences for dynamic rules. Used by
            `tiles` alone.
        query_blocks: rows of tiles per query head.
        block_tokens: side of a tile.
        estimator: kind of the dynamic rule that must choose the tiles first; None for static rules.
        batch: sequences that are chosen for in the same call; the seconds are of one.
        dtype_bytes: bytes per element; None means the model's own: what was measured, or 2 for a datasheet.
    """

    kind: WorkKind
    q_len: int
    kv_len: int
    head_dim: int
    query_heads: int = 1
    tiles: float = 0.0
    query_blocks: int = 0
    block_tokens: int = 64
    estimator: str | None = None
    batch: int = 1
    dtype_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(WorkKind):
            raise SpecError(f"kind must be one of {', '.join(get_args(WorkKind))}, but got {self.kind!r}.")
        if not 1 <= self.q_len <= self.kv_len:
            raise SpecError(f"1 <= q_len <= kv_len must hold, but got q_len={self.q_len}, kv_len={self.kv_len}.")
        if min(self.head_dim, self.query_heads, self.block_tokens, self.dtype_bytes or 1) < 1 or self.tiles < 0:
            raise SpecError(f"sizes must be positive and tiles not negative, but got {self}.")

    @property
    def pairs(self) -> float:
        """Query-key pairs that a causal mask lets one head see."""
        return self.q_len * (self.kv_len - self.q_len) + self.q_len * (self.q_len + 1) / 2


@dataclass(frozen=True)
class StepChoice:
    """That query heads choose for every decoded token which cached blocks they read.

    Attributes:
        kind: of the rule by which they choose.
        cached_tokens: keys that are there to choose among, per sequence.
        block_tokens: keys per block.
    """

    kind: str
    cached_tokens: float
    block_tokens: int

    def __post_init__(self) -> None:
        if self.cached_tokens < 0 or self.block_tokens < 1:
            raise SpecError(f"cached_tokens must not be negative and block_tokens at least 1, but got {self}.")

    @property
    def num_blocks(self) -> int:
        """Blocks to choose among."""
        return math.ceil(self.cached_tokens / self.block_tokens)


@dataclass(frozen=True)
class DecodeWork:
    """What one KV head computes to decode one token in every sequence of a batch.

    Attributes:
        kv_tokens: cached keys that are read, per sequence; with a `choice`, by every query head for itself.
        head_dim: elements per head.
        query_heads: query heads that share the KV head.
        batch: sequences decoded together.
        dtype_bytes: bytes per cached element.
        choice: how the query heads choose what they read; None: they share one pass over the same keys.
    """

    kv_tokens: float
    head_dim: int
    query_heads: int = 1
    batch: int = 1
    dtype_bytes: int = 2
    choice: StepChoice | None = None

    def __post_init__(self) -> None:
        if min(self.head_dim, self.query_heads, self.batch, self.dtype_bytes) < 1 or self.kv_tokens < 0:
            raise SpecError(f"sizes must be positive and kv_tokens not negative, but got {self}.")

    @property
    def passes(self) -> int:
        """Times that keys are read: once for all query heads, or by each that chooses."""
        return 1 if self.choice is None else self.query_heads

    @property
    def kv_bytes(self) -> float:
        """Bytes of keys and values that are read."""
        return 2.0 * self.kv_tokens * self.head_dim * self.batch * self.dtype_bytes * self.passes

    @property
    def bounds_bytes(self) -> float:
        """Bytes that tell blocks apart: the smallest and the largest value of each channel, as Quest keeps them; 0 without a choice."""
        blocks = 0 if self.choice is None else self.choice.num_blocks
        return 2.0 * blocks * self.head_dim * self.batch * self.dtype_bytes

    @property
    def reading_all(self) -> "DecodeWork":
        """The same where the choice is not known to save anything: every cached key is read, once."""
        return self if self.choice is None else replace(self, kv_tokens=self.choice.cached_tokens, choice=None)


class OfDevice(Protocol):
    """What costs belong to."""

    @property
    def name(self) -> str:
        """What it is loaded by."""

    @property
    def device(self) -> str:
        """The device it speaks of."""

    @property
    def measured(self) -> bool:
        """False for a model made from a datasheet; shown wherever its numbers are."""

    @property
    def step_choices(self) -> frozenset[str]:
        """Kinds of rules whose choice for a decoded token has a price; works that choose otherwise are priced as reading every key."""


@runtime_checkable
class CostModel(OfDevice, Protocol):
    """Seconds of attention on a device.

    Answers are per unit and are summed over the units of a layer and over layers. That is exact for a device that works
    on one unit at a time and an approximation elsewhere (units share launches, caches and the last wave), so
    predictions are always shown beside measurements. A model of whole tile lists may add a method for a layer; the
    search needs only this one.

    Contract: more tiles, more cached keys or a longer sequence never cost less, and `zero` costs no more than anything
    else.
    """

    def unit_latency_s(self, work: UnitWork) -> float:
        """Seconds that one unit adds to its attention call."""

    def latency_s(self, works: Sequence[UnitWork]) -> Float[ndarray, " works"]:
        """The same for many units."""

    @property
    def decode_call_s(self) -> float:
        """Seconds that decoding attention takes per layer and step before it reads a key, whatever the plan."""

    def decode_latency_s(self, works: Sequence[DecodeWork]) -> Float[ndarray, " works"]:
        """Seconds that each KV head adds to its layer's decoding attention in one step, `decode_call_s` not included."""
