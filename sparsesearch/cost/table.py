"""A cost model made of measurements: `cost_models/<device>.json`, as `sparsesearch calibrate` writes it."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from pydantic import Field, model_validator

from sparsesearch.cost.base import DecodeWork, UnitWork
from sparsesearch.cost.stored import Frozen, StoredModel
from sparsesearch.errors import SpecError

FORMAT = "sparsesearch.cost_model"
SCHEMA_VERSION = "1.3"
SHARED_HEADS = 4
"""Query heads of a layer that a call is taken to serve where a unit is priced by itself."""


class Curve(Frozen):
    """Seconds per query head at some sequence lengths, for one head_dim."""

    head_dim: int = Field(ge=1)
    tokens: tuple[int, ...] = Field(min_length=2, description="rising")
    seconds: tuple[float, ...] = Field(description="never falling")

    @model_validator(mode="after")
    def _monotone(self) -> Self:
        rising = all(a < b for a, b in zip(self.tokens, self.tokens[1:], strict=False))
        steady = all(0 < a <= b for a, b in zip(self.seconds, self.seconds[1:], strict=False))
        if len(self.tokens) != len(self.seconds) or not rising or not steady:
            raise ValueError("tokens must rise and seconds must be positive and never fall, one per length")
        return self

    def at(self, tokens: float, *, growth: float) -> float:
        """Log-log interpolation; constant below the first length, and ∝ tokens^growth beyond the last."""
        if tokens >= self.tokens[-1]:
            return float(self.seconds[-1] * (tokens / self.tokens[-1]) ** growth)
        return _power_law(tokens, self.tokens, self.seconds)


class TileCost(Frozen):
    """Tile attention of the query heads that share one call: group_s + rows·launch_s + heads·(call_s + rows·row_s) + tiles·tile_s.

    `rows` are those of one head. The first two terms are bookkeeping, paid once per call however few its tiles are: it is what short prompts
    pay.
    """

    head_dim: int = Field(ge=1)
    block_tokens: int = Field(ge=1)
    group_s: float = Field(0.0, ge=0, description="per call")
    launch_s: float = Field(
        0.0, ge=0, description="per call and row of tiles: rows with equally many tiles are one launch"
    )
    call_s: float = Field(ge=0, description="per query head")
    row_s: float = Field(ge=0, description="per query head and row of tiles")
    tile_s: float = Field(gt=0, description="per computed tile")

    def seconds(self, *, heads: int, rows: float, tiles: float, share: float = 1.0) -> float:
        """Of a call, or of heads that pay a share of its bookkeeping; `rows` per head, `tiles` over all heads."""
        bookkeeping_s = self.group_s + rows * self.launch_s
        return share * bookkeeping_s + heads * (self.call_s + rows * self.row_s) + tiles * self.tile_s


class DecodeCost(Frozen):
    """Decoding attention of one query head in one sequence: head_s + keys·key_s. Keys are read per query head."""

    head_dim: int = Field(ge=1)
    head_s: float = Field(ge=0, description="per query head and sequence")
    key_s: float = Field(gt=0, description="per cached key that is read")


class PointwiseCost(Frozen):
    """A norm, rotation, gate, residual or transpose: seconds at rising numbers of elements."""

    elements: tuple[int, ...] = Field(min_length=2)
    seconds: tuple[float, ...] = Field(description="never falling")

    def at(self, elements: float) -> float:
        """Log-log interpolation; constant below the first number, proportional beyond the last."""
        if elements >= self.elements[-1]:
            return self.seconds[-1] * elements / self.elements[-1]
        return _power_law(elements, self.elements, self.seconds)


class LayerTable(Frozen):
    """What layers are made of besides attention: products, whose rate depends on their rows, and pointwise layers."""

    rows: tuple[int, ...] = Field(min_length=2, description="rising")
    flop_s: tuple[float, ...] = Field(description="seconds per floating-point operation of a product of so many rows")
    pointwise: dict[str, PointwiseCost]


class CostTable(StoredModel):
    """Everything that was measured on a device."""

    format: ClassVar[str] = FORMAT
    schema_version: ClassVar[str] = SCHEMA_VERSION

    name: str
    device: str
    backend: str = Field(description="which kernel runs the tiles; dense is always SDPA")
    dtype_bytes: int
    dense: tuple[Curve, ...] = Field(min_length=1)
    mean_value: tuple[Curve, ...] = Field(min_length=1)
    estimators: dict[str, tuple[Curve, ...]] = Field(
        description="dynamic rule kind -> cost of choosing the tiles, per query head"
    )
    estimator_calls: dict[str, tuple[Curve, ...]] = Field(
        default={}, description="likewise, per call and however many heads choose in it"
    )
    tiles: tuple[TileCost, ...] = Field(min_length=1)
    decode: tuple[DecodeCost, ...] = Field(min_length=1)
    layers: LayerTable | None = Field(None, description="None in files of older calibrations")
    step_choices: dict[str, tuple[Curve, ...]] = Field(
        default={},
        description="dynamic rule kind -> what choosing the blocks that one token reads takes, per query head and cached keys; a rule that is "
        "missing is priced as reading every key",
    )
    fit: dict[str, float] = Field(description="errors on the fitted and on held-out runs, and the noise of repeats")
    provenance: dict[str, Any]


@dataclass(frozen=True)
class TableCostModel:
    """Dense attention, estimators and mean values by curves over length; tiles by a line per head_dim and block size.

    Heads of a layer that follow one rule share a call, and its bookkeeping. What a unit adds is therefore priced as in a call of
    `SHARED_HEADS`; what a layer takes is the sum of its calls, each with all of its bookkeeping (`call_latency_s`).
    A call of q queries against longer context is priced as the prefill with equally many query-key pairs. Between
    measured head_dims costs are interpolated in log-log, beyond them taken as proportional; the nearest measured block
    size is scaled by its area.
    """

    table: CostTable
    measured: bool = True
    decode_call_s: float = 0.0

    @property
    def name(self) -> str:
        """What it is loaded by."""
        return self.table.name

    @property
    def device(self) -> str:
        """The processor that was measured."""
        return self.table.device

    def unit_latency_s(self, work: UnitWork) -> float:
        """Seconds that one unit adds to a call that others join.

        Raises:
            SpecError: the element size or the estimator was not measured.
        """
        return self._latency_s(work, share=work.query_heads / max(work.query_heads, SHARED_HEADS))

    def call_latency_s(self, work: UnitWork) -> float:
        """Seconds of a call of just these heads; errors as in `unit_latency_s`."""
        return self._latency_s(work, share=1.0)

    def _latency_s(self, work: UnitWork, share: float) -> float:
        self._check_dtype(work.dtype_bytes)
        chosen = self._kind_s(work, share)
        if work.estimator is None:
            return chosen
        curves = self.table.estimators
        if work.estimator not in curves:
            raise SpecError(
                f"cost model {self.name} must know what {work.estimator!r} costs, but was calibrated without that rule. Run "
                "`sparsesearch calibrate -o FILE` and give that file."
            )
        calls = self.table.estimator_calls.get(work.estimator, ())
        call_s = _at(calls, work.head_dim, work.kv_len, growth=1.0) if calls else 0.0
        return (
            chosen
            + share * call_s
            + work.query_heads * _at(curves[work.estimator], work.head_dim, work.kv_len, growth=1.0)
        )

    def latency_s(self, works: Sequence[UnitWork]) -> Float[ndarray, " works"]:
        """The same for many units."""
        seconds = {work: self.unit_latency_s(work) for work in set(works)}  # units repeat each other
        return np.array([seconds[work] for work in works])

    def decode_latency_s(self, works: Sequence[DecodeWork]) -> Float[ndarray, " works"]:
        """Per query head: here a group's heads do not share one pass over the keys, whether or not they choose which ones to read.

        Raises:
            SpecError: the element size was not measured.
        """
        return np.array([self._decode_s(work) for work in works])

    def _decode_s(self, work: DecodeWork) -> float:
        self._check_dtype(work.dtype_bytes)
        choice_s = 0.0
        if work.choice is not None and work.choice.kind not in self.step_choices:
            work = work.reading_all
        elif work.choice is not None:
            curves = self.table.step_choices[work.choice.kind]
            choice_s = _at(curves, work.head_dim, work.choice.cached_tokens, growth=1.0)
        seconds = {cost.head_dim: cost.head_s + work.kv_tokens * cost.key_s for cost in self.table.decode}
        return work.batch * work.query_heads * (choice_s + between_sizes(seconds, work.head_dim))

    @property
    def step_choices(self) -> frozenset[str]:
        """Rules whose choice for a decoded token was measured."""
        return frozenset(self.table.step_choices)

    @property
    def dtype_bytes(self) -> int:
        """Per element of what was measured."""
        return self.table.dtype_bytes

    @property
    def prices_layers(self) -> bool:
        """Whether everything but attention was measured too."""
        return self.table.layers is not None

    def linear_s(self, rows: int, outputs: int, inputs: int) -> float:
        """A linear layer.

        Raises:
            SpecError: an older calibration left it out.
        """
        known = self._layers()
        flop_s = known.flop_s[-1] if rows >= known.rows[-1] else _power_law(rows, known.rows, known.flop_s)
        return 2.0 * rows * outputs * inputs * flop_s

    def pointwise_s(self, name: str, elements: float) -> float:
        """Norm, rotation, gate, residual or transpose over so many elements; errors as of `linear_s`."""
        return self._layers().pointwise[name].at(elements)

    def prefill_relief(self, rows: int) -> float:
        """Nothing: on a CPU, layers take what their parts take."""
        return 0.0

    def _layers(self) -> LayerTable:
        if self.table.layers is None:
            raise SpecError(
                f"cost model {self.name} must know more than attention, but was calibrated without linear layers. Run `sparsesearch calibrate -o FILE` "
                "and give that file."
            )
        return self.table.layers

    def _check_dtype(self, dtype_bytes: int | None) -> None:
        if dtype_bytes not in (None, self.table.dtype_bytes):
            raise SpecError(
                f"cost model {self.name} must be asked for {self.table.dtype_bytes} bytes per element, as it was "
                f"measured, but got {dtype_bytes}. Serve in that type (--dtype), or calibrate in the other one."
            )

    def summary(self) -> dict[str, str | float]:
        """What to show of it: where it comes from and how well it fits."""
        facts = {key: value for key, value in self.table.provenance.items() if isinstance(value, str | int | float)}
        return {"name": self.name, "device": self.device, "backend": self.table.backend, **facts, **self.table.fit}

    def _kind_s(self, work: UnitWork, share: float) -> float:
        match work.kind:
            case "dense":
                same_pairs = (2.0 * work.pairs) ** 0.5
                return work.query_heads * _at(self.table.dense, work.head_dim, same_pairs, growth=2.0)
            case "tiles":
                return self._tiles_s(work, share)
            case "mean_value":
                return work.query_heads * _at(self.table.mean_value, work.head_dim, work.kv_len, growth=1.0)
            case "zero":
                return 0.0

    def _tiles_s(self, work: UnitWork, share: float) -> float:
        def distance(cost: TileCost) -> float:
            return abs(math.log(cost.block_tokens / work.block_tokens))

        closest = min(distance(cost) for cost in self.table.tiles)
        costs = [cost for cost in self.table.tiles if distance(cost) <= closest + 1e-9]
        seconds = {}
        for cost in costs:
            side = work.block_tokens / cost.block_tokens
            rows, tiles = work.query_blocks * side, work.tiles * side**2
            seconds[cost.head_dim] = cost.seconds(heads=work.query_heads, rows=rows, tiles=tiles, share=share)
        return between_sizes(seconds, work.head_dim)


def _at(curves: Sequence[Curve], head_dim: int, tokens: float, *, growth: float) -> float:
    return between_sizes({curve.head_dim: curve.at(tokens, growth=growth) for curve in curves}, head_dim)


def between_sizes(seconds: dict[int, float], head_dim: int) -> float:
    """Interpolate over head_dim in log-log; proportional outside."""
    known = sorted(seconds)
    if head_dim <= known[0]:
        return seconds[known[0]] * head_dim / known[0]
    if head_dim >= known[-1]:
        return seconds[known[-1]] * head_dim / known[-1]
    return _power_law(head_dim, known, [max(seconds[size], 1e-12) for size in known])


def _power_law(x: float, xs: Sequence[int], ys: Sequence[float]) -> float:
    """Through the two points around x, straight in log-log; constant below the first. x is below the last."""
    if x <= xs[0]:
        return ys[0]
    right = bisect_right(xs, x)
    part = math.log(x / xs[right - 1]) / math.log(xs[right] / xs[right - 1])
    return float(ys[right - 1] * (ys[right] / ys[right - 1]) ** part)
