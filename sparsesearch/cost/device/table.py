"""What was measured on an accelerator: `cost_models/<device>.json`, as `sparsesearch calibrate --device cuda` writes it."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np
from pydantic import Field, model_validator

from sparsesearch.cost.stored import Frozen, StoredModel
from sparsesearch.errors import SpecError

FORMAT = "sparsesearch.device_cost_model"
SCHEMA_VERSION = "2.1"


class Peaks(Frozen):
    """Rates that the device sustains, and the time of an empty kernel in a CUDA graph."""

    matmul_flop_per_s: float = Field(gt=0)
    copy_bytes_per_s: float = Field(gt=0, description="read and written bytes together")
    read_bytes_per_s: float = Field(gt=0)
    launch_s: float = Field(ge=0)


class TileKernelCost(Frozen):
    """The tile kernel in one configuration.

    seconds = launch_s + longest(busy, power, memory) + (merge_s + pieces·piece_s if tiles were cut)
    busy    = max over workers of  tiles·tile_s + blocks·block_s + partial·partial_s
    power   = (Σ tiles·tile_power_s + Σ blocks·block_power_s) / workers
    memory  = bytes of keys and values that miss the cache / read_bytes_per_s
    longest(a, b, c) = (a⁸ + b⁸ + c⁸)^(1/8), a maximum with a soft corner

    busy is the schedule replayed at the clock of a cool device, power the time in which the device may spend the energy of all tiles. At a
    clock that is known, busy · cool clock / clock stands for both.
    """

    head_dim: int = Field(ge=1)
    tile_rows: int = Field(ge=1)
    tile_keys: int = Field(ge=1)
    launch_s: float = Field(ge=0)
    tile_s: float = Field(ge=0, description="prologue and epilogue of one tile")
    block_s: float = Field(gt=0, description="one key block")
    partial_s: float = Field(ge=0, description="what masking adds to a block")
    tile_power_s: float = Field(ge=0)
    block_power_s: float = Field(ge=0)
    merge_s: float = Field(ge=0, description="once, if any tile was cut")
    piece_s: float = Field(ge=0, description="per piece")


class Points(Frozen):
    """Seconds at rising amounts (bytes, elements, tokens); a straight line between two in log-log."""

    amounts: tuple[float, ...] = Field(min_length=1)
    seconds: tuple[float, ...]

    @model_validator(mode="after")
    def _monotone(self) -> Self:
        rising = all(a < b for a, b in zip(self.amounts, self.amounts[1:], strict=False))
        steady = all(0 < a <= b for a, b in zip(self.seconds, self.seconds[1:], strict=False))
        if len(self.amounts) != len(self.seconds) or not rising or not steady:
            raise ValueError("amounts must rise and seconds must be positive and never fall, one per amount")
        return self

    def at(self, amount: float) -> float:
        """Constant below the first amount, proportional beyond the last."""
        if amount <= self.amounts[0]:
            return self.seconds[0]
        if amount >= self.amounts[-1]:
            return self.seconds[-1] * amount / self.amounts[-1]
        right = bisect_right(self.amounts, amount)
        (a, b), (s, t) = self.amounts[right - 1 : right + 1], self.seconds[right - 1 : right + 1]
        return float(s * (t / s) ** (math.log(amount / a) / math.log(b / a)))

    def affine_at(self, amount: float) -> float:
        """The same with a straight line in the amount itself: of what takes so long to start and so long per amount."""
        if not self.amounts[0] < amount < self.amounts[-1]:
            return self.at(amount)
        return float(np.interp(amount, self.amounts, self.seconds))


class Correction(Frozen):
    """A number over rising amounts, straight between two in the logarithm of the amount and constant beyond the ends."""

    amounts: tuple[float, ...] = Field(min_length=1)
    values: tuple[float, ...]

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if len(self.amounts) != len(self.values) or any(
            a >= b for a, b in zip(self.amounts, self.amounts[1:], strict=False)
        ):
            raise ValueError("amounts must rise, one value each")
        return self

    def at(self, amount: float) -> float:
        """The value there."""
        return float(np.interp(math.log(max(amount, 1e-9)), np.log(self.amounts), self.values))


class PairPoints(Frozen):
    """Decoding of so many (sequence, KV head) pairs."""

    pairs: int = Field(ge=1)
    points: Points = Field(description="bytes of keys and values -> seconds")


class DecodeCost(Frozen):
    """Ragged decoding of one layer: curves over its bytes of keys and values, one per number of pairs, and a plane through the same points."""

    head_dim: int = Field(ge=1)
    curves: tuple[PairPoints, ...] = Field(min_length=1, description="pairs rise")
    pair_s: float = Field(ge=0, description="per (sequence, KV head)")
    call_s: float = Field(ge=0)
    byte_s: float = Field(gt=0)

    def at(self, nbytes: float, pairs: float) -> float:
        """Seconds; straight in the bytes, and in log-log between two numbers of pairs, constant beyond the fewest and the most."""
        seconds = [math.log(curve.points.affine_at(nbytes)) for curve in self.curves]
        return math.exp(float(np.interp(math.log(pairs), [math.log(curve.pairs) for curve in self.curves], seconds)))


class DenseCost(Frozen):
    """Dense causal attention by the kernel that PyTorch picks: query-key pairs of all heads and sequences -> seconds of a layer."""

    head_dim: int = Field(ge=1)
    points: Points


class LinearCost(Frozen):
    """A linear layer of one size: rows of the input -> seconds."""

    outputs: int = Field(ge=1)
    inputs: int = Field(ge=1)
    points: Points


class SkinnyCost(Frozen):
    """A product of the fused step, cut in one way, for up to `rows` rows.

    seconds = launch_s + longest(inner columns·column_s, bytes of weights·byte_s)

    The first is one program's walk along its lines of weights, which few programs cannot hide; `longest` is that of `TileKernelCost`.
    """

    rows: int = Field(ge=1)
    columns: int = Field(ge=1, description="lines of weights per program")
    step_columns: int = Field(ge=1, description="inner columns per step; a row's last step counts as a whole one")
    launch_s: float = Field(ge=0)
    column_s: float = Field(ge=0)
    byte_s: float = Field(gt=0)


class ShortLayers(Frozen):
    """Fused layers of a small model beside those of a large one; between the two, straight in the logarithm of a layer's weights.

    Attributes:
        seconds: rows -> seconds that a small one takes beyond its products and its attention.
    """

    weight_bytes: float = Field(gt=0, description="of a small layer's products")
    long_weight_bytes: float = Field(gt=0, description="of a large layer's, from which on products hide the launches")
    seconds: Correction

    def share(self, weight_bytes: float) -> float:
        """How much a layer is like the small one: 1 up to its size, 0 from the large one's on."""
        ends = math.log(self.weight_bytes), math.log(self.long_weight_bytes)
        return float(np.interp(math.log(max(weight_bytes, 1.0)), ends, (1.0, 0.0)))


class EstimatorCost(Frozen):
    """Choosing the tiles of one dynamic rule and building their schedule: tokens -> seconds of a call of `heads` query heads.

    Launches dominate, so fewer heads take as long. More take longer along the line through `many_heads` where that was measured, else in
    proportion.
    """

    kind: str
    heads: int = Field(ge=1)
    points: Points
    many_heads: int | None = None
    many_points: Points | None = None

    def seconds(self, tokens: float, query_heads: float) -> float:
        """One call for so many heads, whatever sequences of a batch they are of."""
        few = self.points.at(tokens)
        if query_heads <= self.heads:
            return few
        if self.many_heads is None or self.many_points is None:
            return few * query_heads / self.heads
        per_head = max(0.0, self.many_points.at(tokens) - few) / (self.many_heads - self.heads)
        return few + per_head * (query_heads - self.heads)


class StepChoiceCost(EstimatorCost):
    """Choosing the blocks that one token reads, in all sequences: blocks per head -> seconds of a call of `heads` query heads.

    The heads of all sequences count; how many of them share a KV head's bounds is not asked.
    """


class DeviceTable(StoredModel):
    """Everything that was measured."""

    format: ClassVar[str] = FORMAT
    schema_version: ClassVar[str] = SCHEMA_VERSION

    name: str
    device: str
    backend: str = Field(description="which kernel runs the tiles, dense heads included")
    dtype_bytes: int
    num_workers: int = Field(ge=1, description="blocks of the persistent grid")
    l2_bytes: float = Field(gt=0)
    cache_bytes: float = Field(gt=0, description="of these, what a schedule can count on")
    memory_bytes: float = Field(gt=0, description="of the device")
    boost_hz: float | None = Field(None, gt=0, description="clock of a cool device, at which tiles are `busy`")
    peaks: Peaks
    tiles: tuple[TileKernelCost, ...] = Field(min_length=1)
    dense: tuple[DenseCost, ...] = Field(
        (), description="layers without a plan; the tile kernel stands for them if empty"
    )
    decode: tuple[DecodeCost, ...] = Field(min_length=1)
    step_choices: tuple[StepChoiceCost, ...] = Field(
        (),
        description="rules that choose what a decoded token reads; one that is missing is priced as reading every key",
    )
    paged_decode: tuple[DecodeCost, ...] = Field(
        (),
        description="decoding of query heads that each read pages of their own: pairs are of sequence and query head",
    )
    step_joining_s: Correction | None = Field(
        None,
        description="batch -> seconds that a layer takes beyond its parts where some of its heads choose what a decoded token reads",
    )
    linear: tuple[LinearCost, ...] = Field(min_length=1)
    pointwise: dict[str, Points] = Field(description="norm, rotation, gate, residual, transpose: elements -> seconds")
    estimators: tuple[EstimatorCost, ...]
    prefill_relief: Correction = Field(
        description="rows -> share of the pointwise time that comes back because it lets the device draw less than its power limit"
    )
    decode_glue_s: Correction = Field(
        description="batch -> seconds that a whole layer takes beyond its parts: writing the cache, gaps"
    )
    decode_glue_evicting_s: Correction | None = Field(
        None,
        description="the same where a layer's largest weight exceeds the cache, so that every kernel starts from memory",
    )
    decode_step_s: Correction | None = Field(
        None, description="batch -> seconds that a decoding step takes beyond its layers and the output layer"
    )
    decode_turn_s: Correction | None = Field(
        None, description="batch -> seconds between two steps: the tokens chosen and handed on, the next graph started"
    )
    skinny: tuple[SkinnyCost, ...] = Field((), description="products of the fused decoding step")
    fused_layer_s: Correction | None = Field(
        None, description="rows -> seconds that a fused layer takes beyond its products and its attention"
    )
    fused_short: ShortLayers | None = Field(
        None, description="the same where products are too short to hide the launches between them"
    )
    fused_start_s: Correction | None = Field(
        None, description="rows -> seconds that fused layers take to start, once per step"
    )
    permutation: Points = Field(description="bytes of a tensor whose tokens are gathered in another order -> seconds")
    fit: dict[str, float] = Field(
        description="errors on the micro-runs and, left out in turn, on ones the fit had not seen"
    )
    provenance: dict[str, Any]

    def tile_kernel(self, head_dim: int, tile_keys: int) -> TileKernelCost:
        """The configuration that was measured.

        Raises:
            SpecError: there is none.
        """
        for kernel in self.tiles:
            if (kernel.head_dim, kernel.tile_keys) == (head_dim, tile_keys):
                return kernel
        known = ", ".join(f"{k.head_dim} x {k.tile_keys}" for k in self.tiles)
        raise SpecError(
            f"cost model {self.name} must have measured head_dim {head_dim} with tiles of {tile_keys} keys, but has only {known}. "
            "Calibrate again."
        )


def rising(points: Sequence[tuple[float, float]]) -> Points:
    """Points from measurements: sorted, equal amounts averaged, and a fall that noise made is levelled."""
    grouped: dict[float, list[float]] = {}
    for amount, measured in points:
        grouped.setdefault(amount, []).append(measured)
    amounts = sorted(grouped)
    seconds: list[float] = []
    for amount in amounts:
        mean = sum(grouped[amount]) / len(grouped[amount])
        seconds.append(max(mean, seconds[-1] if seconds else 0.0))
    return Points(amounts=tuple(amounts), seconds=tuple(seconds))
