"""The cost model of a measured accelerator: per unit for the search, and per schedule, layer and byte for predictions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from sparsesearch.cost.base import DecodeWork, StepChoice, UnitWork
from sparsesearch.cost.device.fused import MeasuredFused
from sparsesearch.cost.device.load import tile_load
from sparsesearch.cost.device.table import DecodeCost, DeviceTable, EstimatorCost, StepChoiceCost, TileKernelCost
from sparsesearch.cost.device.tile_seconds import same_keys, schedule_seconds, tile_kernel
from sparsesearch.cost.table import between_sizes
from sparsesearch.errors import SpecError, nearest
from sparsesearch.kernels.dispatch import Backend, tile_shape
from sparsesearch.kernels.schedule import TileSchedule, Workers


@dataclass(frozen=True)
class DeviceCostModel:
    """Answers from a `DeviceTable`.

    Per unit (`unit_latency_s`), a unit adds its tiles' share of an evenly dealt schedule, whichever of clock and power is the longer; a whole
    layer's schedule (`attention_s`) is replayed on the workers. Head sizes between measured ones are interpolated in log-log, beyond them
    taken as proportional.
    """

    table: DeviceTable
    measured: bool = True

    @property
    def name(self) -> str:
        """What it is loaded by."""
        return self.table.name

    @property
    def device(self) -> str:
        """The product that was measured."""
        return self.table.device

    @property
    def workers(self) -> Workers:
        """What schedules are built for."""
        return Workers(self.table.num_workers, self.table.l2_bytes)

    @property
    def kernel(self) -> Backend:
        """The tile kernel that was measured."""
        return self.table.backend  # type: ignore[return-value]

    def unit_latency_s(self, work: UnitWork) -> float:
        """Seconds that one unit adds.

        Raises:
            SpecError: the element size or the estimator was not measured.
        """
        self._check_dtype(work.dtype_bytes)
        index_s = 0.0
        if work.estimator is not None:  # a unit's share of a call that other units of the layer join
            cost = self._estimator(work.estimator)
            heads = cost.heads * work.batch
            index_s = cost.seconds(work.kv_len, heads) * work.query_heads / heads
        match work.kind:
            case "zero":
                return 0.0
            case "mean_value":
                moved = (work.query_heads * work.q_len + work.kv_len) * work.head_dim * self.table.dtype_bytes
                return index_s + moved / self.table.peaks.copy_bytes_per_s
            case "dense" | "tiles":
                return index_s + self._tiles_s(work)

    def latency_s(self, works: Sequence[UnitWork]) -> Float[ndarray, " works"]:
        """The same for many units."""
        seconds = {work: self.unit_latency_s(work) for work in set(works)}  # units repeat each other
        return np.array([seconds[work] for work in works])

    @property
    def decode_call_s(self) -> float:
        """Of the largest head size that was measured."""
        return max(self.table.decode, key=lambda cost: cost.head_dim).call_s

    def decode_latency_s(self, works: Sequence[DecodeWork]) -> Float[ndarray, " works"]:
        """Keys and values at the bandwidth that large caches reach, measured for the nearest head size.

        Raises:
            SpecError: the element size was not measured.
        """
        for work in works:
            self._check_dtype(work.dtype_bytes)
        return np.array([self._decode_s(work) for work in works])

    def _decode_s(self, work: DecodeWork) -> float:
        if work.choice is not None and work.choice.kind not in self.step_choices:
            work = work.reading_all
        index_s = 0.0
        if work.choice is not None:  # a head's share of a call that others of the layer join
            choosing = self._step_choice(work.choice.kind)
            call_s = choosing.seconds(work.choice.num_blocks, choosing.heads * work.batch)
            index_s = call_s * work.query_heads / choosing.heads
        cost = self._decode_cost(work.head_dim, paged=work.choice is not None)
        flops = 4.0 * work.head_dim * work.query_heads * work.kv_tokens * work.batch
        read_s = max(work.kv_bytes * cost.byte_s, flops / self.table.peaks.matmul_flop_per_s)
        return index_s + read_s + work.batch * work.passes * cost.pair_s

    def decode_attention_s(self, works: Sequence[DecodeWork]) -> float:
        """One layer's decoding attention in one step; `works` are all of its KV heads.

        Heads that choose add a call per rule that does, and read in a launch of their own, whose output a few small ones put in its place.
        """
        priced = [work if work.choice and work.choice.kind in self.step_choices else work.reading_all for work in works]
        shared, choosing = (
            [work for work in priced if (work.choice is not None) == chosen] for chosen in (False, True)
        )
        seconds = self._layer_read_s(shared, paged=False) + self._layer_read_s(choosing, paged=True)
        calls: dict[tuple[StepChoice, float], int] = {}
        for work in choosing:
            assert work.choice is not None
            rule = work.choice, work.kv_tokens
            calls[rule] = calls.get(rule, 0) + work.query_heads * work.batch
        seconds += sum(
            self._step_choice(choice.kind).seconds(choice.num_blocks, heads) for (choice, _), heads in calls.items()
        )
        joining = self.table.step_joining_s
        return seconds + (joining.at(choosing[0].batch) if choosing and shared and joining is not None else 0.0)

    def _layer_read_s(self, works: Sequence[DecodeWork], *, paged: bool) -> float:
        if not works:
            return 0.0
        cost = self._decode_cost(works[0].head_dim, paged=paged)
        return cost.at(sum(work.kv_bytes for work in works), sum(work.batch * work.passes for work in works))

    @property
    def step_choices(self) -> frozenset[str]:
        """Rules whose choice for a decoded token was measured."""
        return frozenset(cost.kind for cost in self.table.step_choices) if self.table.paged_decode else frozenset()

    def _step_choice(self, kind: str) -> StepChoiceCost:
        return next(cost for cost in self.table.step_choices if cost.kind == kind)

    def attention_s(
        self, schedule: TileSchedule, *, num_kv_heads: int, head_dim: int, hz: float | None = None
    ) -> float:
        """One layer's prefill attention; `schedule` was built for `workers` and `kernel`.

        At the clock that the power limit leaves when it runs for long, or at `hz`: beside other work a kernel meets another one.

        Raises:
            SpecError: `hz` is given, but the calibration did not read the clock.
        """
        kernel = self.tile_kernel(head_dim, schedule.shape.keys)
        load = tile_load(
            schedule,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype_bytes=self.table.dtype_bytes,
            cache_bytes=self.table.cache_bytes,
        )
        slowdown = None if hz is None else self._boost_hz() / hz
        return schedule_seconds(kernel, load, self.table.peaks.read_bytes_per_s, slowdown)

    def _boost_hz(self) -> float:
        if self.table.boost_hz is None:
            raise SpecError(
                f"cost model {self.name} must know the clock it was measured at, but does not. Calibrate again."
            )
        return self.table.boost_hz

    def own_dense_s(self, pairs: float, head_dim: int) -> float | None:
        """One layer's dense attention by the kernel that PyTorch picks; None if an older calibration left it out."""
        seconds = {cost.head_dim: cost.points.at(pairs) for cost in self.table.dense}
        return between_sizes(seconds, head_dim) if seconds else None

    def linear_s(self, rows: int, outputs: int, inputs: int) -> float:
        """A linear layer of `rows` inputs.

        Between measured sizes the share of the roofline is interpolated, by inverse square distance in the logarithms of both widths. The
        roofline has a floor: the fastest product measured, since a smaller one takes as long to launch and to drain.
        """
        total = weights = 0.0
        for cost in self.table.linear:
            distance = math.log(outputs / cost.outputs) ** 2 + math.log(inputs / cost.inputs) ** 2
            excess = math.log(cost.points.at(rows) / self._linear_roof_s(rows, cost.outputs, cost.inputs))
            if distance < 1e-12:
                total, weights = excess, 1.0
                break
            total, weights = total + excess / distance, weights + 1 / distance
        return self._linear_roof_s(rows, outputs, inputs) * math.exp(total / weights)

    def pointwise_s(self, name: str, elements: float) -> float:
        """Norm, rotation, gate, residual or transpose over so many elements."""
        if name not in self.table.pointwise:
            raise SpecError(
                f"cost model {self.name} must know the pointwise layer {name!r}.{nearest(name, self.table.pointwise)}"
            )
        return self.table.pointwise[name].at(elements)

    def prefill_relief(self, rows: int) -> float:
        """Share of the pointwise time that whole layers of so many rows do not take."""
        return self.table.prefill_relief.at(rows)

    def decode_glue_s(self, batch: int, weight_bytes: float) -> float:
        """What a decoding layer takes beyond its parts: more where a weight pushes everything else out of the cache."""
        evicting = self.table.decode_glue_evicting_s
        if evicting is not None and weight_bytes > self.table.l2_bytes:
            return evicting.at(batch)
        return self.table.decode_glue_s.at(batch)

    def decode_step_s(self, batch: int) -> float:
        """What a decoding step takes beyond its layers and the output layer: embedding, positions; 0 where it was not measured."""
        return 0.0 if self.table.decode_step_s is None else self.table.decode_step_s.at(batch)

    def decode_turn_s(self, batch: int) -> float:
        """What passes between two steps; 0 where it was not measured."""
        return 0.0 if self.table.decode_turn_s is None else self.table.decode_turn_s.at(batch)

    @property
    def fused(self) -> MeasuredFused | None:
        """What the fused decoding step takes; None if an older calibration left it out."""
        table = self.table
        if not table.skinny or table.fused_layer_s is None or table.fused_start_s is None:
            return None
        return MeasuredFused(
            table.skinny, table.dtype_bytes, table.fused_layer_s, table.fused_start_s, table.fused_short
        )

    def permutation_s(self, nbytes: float) -> float:
        """Gathering the tokens of a tensor of so many bytes in another order."""
        return self.table.permutation.at(nbytes)

    def estimator_s(self, kind: str, tokens: int, query_heads: int) -> float:
        """Choosing the tiles of a dynamic rule for a prompt of so many tokens, all heads of the layer that follow it in one call.

        Raises:
            SpecError: it was not measured.
        """
        return self._estimator(kind).seconds(tokens, query_heads)

    def _estimator(self, kind: str) -> EstimatorCost:
        for cost in self.table.estimators:
            if cost.kind == kind:
                return cost
        raise SpecError(
            f"cost model {self.name} must know what {kind!r} costs, but was calibrated without that rule. Run `sparsesearch calibrate --device cuda "
            "-o FILE` and give that file."
        )

    def summary(self) -> dict[str, str | float]:
        """What to show of it: where it comes from and how well it fits."""
        facts = {key: value for key, value in self.table.provenance.items() if isinstance(value, str | int | float)}
        return {"name": self.name, "device": self.device, "backend": self.table.backend, **facts, **self.table.fit}

    def tile_kernel(self, head_dim: int, tile_keys: int) -> TileKernelCost:
        """The measured configuration, or one between two measured head sizes."""
        return tile_kernel(self.table.tiles, head_dim, tile_keys, self.name)

    def _check_dtype(self, dtype_bytes: int | None) -> None:
        if dtype_bytes not in (None, self.table.dtype_bytes):
            raise SpecError(
                f"cost model {self.name} must be asked for {self.table.dtype_bytes} bytes per element, as it was "
                f"measured, but got {dtype_bytes}. Serve in that type (--dtype), or calibrate in the other one."
            )

    def _decode_cost(self, head_dim: int, *, paged: bool = False) -> DecodeCost:
        known = self.table.paged_decode if paged else self.table.decode
        return min(known, key=lambda cost: abs(math.log(cost.head_dim / head_dim)))

    def _linear_roof_s(self, rows: int, outputs: int, inputs: int) -> float:
        moved = (rows * inputs + outputs * inputs + rows * outputs) * self.table.dtype_bytes
        compute_s = 2.0 * rows * outputs * inputs / self.table.peaks.matmul_flop_per_s
        floor_s = min(cost.points.seconds[0] for cost in self.table.linear)
        return max(compute_s + moved / self.table.peaks.read_bytes_per_s, floor_s)

    def _tiles_s(self, work: UnitWork) -> float:
        side = 128 if work.kind == "dense" else work.block_tokens
        shape = tile_shape(self.kernel, work.head_dim, side)
        rows = work.query_heads * -(-work.q_len // shape.rows)
        if work.kind == "dense":
            reach = work.kv_len - work.q_len + (work.q_len + shape.rows) / 2  # mean over the rows of tiles
            blocks = rows * reach / shape.keys
        else:
            halves = max(shape.rows // work.block_tokens - 1, 0) / 2  # where a causal tile's upper part is absent
            blocks = work.tiles * work.block_tokens**2 / (shape.rows * shape.keys) + halves * rows
        seconds = {}
        for kernel in same_keys(self.table.tiles, shape.keys):
            busy = rows * (kernel.tile_s + kernel.partial_s) + blocks * kernel.block_s
            power = rows * kernel.tile_power_s + blocks * kernel.block_power_s
            seconds[kernel.head_dim] = max(busy, power) / self.table.num_workers
        return between_sizes(seconds, work.head_dim)
