"""The roofline: the time that arithmetic or memory traffic needs at the datasheet's peak, whichever is longer."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray

from sparsesearch.cost.base import DecodeWork, UnitWork
from sparsesearch.errors import SpecError, nearest
from sparsesearch.kernels.dispatch import Backend
from sparsesearch.kernels.schedule import TileSchedule, Workers
from sparsesearch.rules import rule_kinds


@dataclass(frozen=True)
class Datasheet:
    """Peaks of a device, from its vendor's datasheet.

    Attributes:
        device: product name.
        half_flop_per_s: bf16/fp16 tensor throughput with fp32 accumulation, without structured sparsity.
        single_flop_per_s: fp32 throughput of the vector units.
        bytes_per_s: memory bandwidth.
        memory_bytes: capacity.
        num_sms: multiprocessors.
        l2_bytes: cache that they share.
    """

    device: str
    half_flop_per_s: float
    single_flop_per_s: float
    bytes_per_s: float
    memory_bytes: float
    num_sms: int
    l2_bytes: float


DATASHEETS = {
    "a100": Datasheet("NVIDIA A100 SXM 80GB", 312e12, 19.5e12, 2.039e12, 80e9, 108, 40e6),
    "h100": Datasheet("NVIDIA H100 SXM", 989.4e12, 66.9e12, 3.35e12, 80e9, 132, 50e6),
    "h200": Datasheet("NVIDIA H200 SXM", 989.4e12, 66.9e12, 4.8e12, 141e9, 132, 50e6),
    "l40s": Datasheet("NVIDIA L40S", 362.05e12, 91.6e12, 0.864e12, 48e9, 142, 96e6),
    "rtx4090": Datasheet("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12, 1.008e12, 24e9, 128, 72e6),
    "b200": Datasheet("NVIDIA B200 SXM", 2250e12, 75e12, 8.0e12, 180e9, 148, 126e6),
    "mi300x": Datasheet("AMD Instinct MI300X", 1307.4e12, 163.4e12, 5.3e12, 192e9, 304, 256e6),
}

PASSES = {"norm": 2, "rotation": 2, "gate": 3, "residual": 3, "transpose": 2}
"""Elements that a pointwise layer reads and writes per element of its result."""


@dataclass(frozen=True)
class Roofline:
    """max(FLOPs / peak, bytes / bandwidth) per unit, for a device that nobody has measured.

    FLOPs: 4·head_dim per query-key pair for dense attention (causal pairs only), 4·head_dim·block² per computed tile.
    Bytes: queries and output of every head, and every key and value that is touched, once. An estimator reads the
    queries and keys once more. Launches, tile overheads and imbalance are left out, so it flatters short sequences and
    low densities. Whole layers (`attention_s`, `linear_s`, `pointwise_s`) are priced alike, in 2 bytes per element.

    Source: Williams, Waterman and Patterson 2009, Roofline, CACM 52(4).
    """

    key: str
    datasheet: Datasheet
    measured: bool = False
    decode_call_s: float = 0.0

    @property
    def name(self) -> str:
        """`roofline:<gpu>`."""
        return f"roofline:{self.key}"

    @property
    def device(self) -> str:
        """Product name."""
        return self.datasheet.device

    def unit_latency_s(self, work: UnitWork) -> float:
        """Seconds at the datasheet's peaks."""
        flops, elements = _demand(work)
        if work.estimator is not None:
            elements += (work.query_heads * work.q_len + work.kv_len) * work.head_dim
        dtype_bytes = work.dtype_bytes or 2
        return max(flops / self._peak_flop_per_s(dtype_bytes), elements * dtype_bytes / self.datasheet.bytes_per_s)

    def latency_s(self, works: Sequence[UnitWork]) -> Float[ndarray, " works"]:
        """The same for many units."""
        seconds = {work: self.unit_latency_s(work) for work in set(works)}  # units repeat each other
        return np.array([seconds[work] for work in works])

    def decode_latency_s(self, works: Sequence[DecodeWork]) -> Float[ndarray, " works"]:
        """Keys and values read once at the datasheet's bandwidth, or 4·head_dim FLOPs per query head and key.

        Heads that choose what they read read the bounds of all blocks first; other choices are not known to save anything.
        """
        works = [work if work.choice and work.choice.kind in self.step_choices else work.reading_all for work in works]
        bytes_s = np.array([work.kv_bytes + work.bounds_bytes for work in works]) / self.datasheet.bytes_per_s
        flops = [4.0 * work.head_dim * work.query_heads * work.kv_tokens * work.batch for work in works]
        peaks = [self._peak_flop_per_s(max(work.dtype_bytes, 2)) for work in works]
        return np.asarray(np.maximum(bytes_s, np.array(flops) / np.array(peaks)))

    @property
    def step_choices(self) -> frozenset[str]:
        """Those that read the bounds of blocks and nothing else."""
        return frozenset(kind for kind, rule in rule_kinds().items() if rule.reads_bounds)

    @property
    def workers(self) -> Workers:
        """One per multiprocessor."""
        return Workers(self.datasheet.num_sms, self.datasheet.l2_bytes)

    @property
    def kernel(self) -> Backend:
        """The tile kernel that would run there."""
        return "gluon" if self.key in ("h100", "h200") else "triton"

    def attention_s(self, schedule: TileSchedule, *, num_kv_heads: int, head_dim: int) -> float:
        """One layer's prefill attention."""
        batch, head, kept = schedule.tiles.long()[:, [0, 1, 6]].T
        group = schedule.num_heads // num_kv_heads
        longest = torch.zeros(int(batch.max()) + 1 if len(batch) else 0, num_kv_heads, dtype=torch.long)
        longest.view(-1).scatter_reduce_(0, batch * num_kv_heads + head // group, kept, "amax")
        elements = 2.0 * (schedule.covered_rows + float(longest.sum())) * head_dim
        flops = 4.0 * head_dim * schedule.num_blocks * schedule.shape.rows * schedule.shape.keys
        return self._bound_s(flops, elements)

    def own_dense_s(self, pairs: float, head_dim: int) -> None:
        """A datasheet knows no kernels: as ours."""

    def linear_s(self, rows: int, outputs: int, inputs: int) -> float:
        """A linear layer."""
        return self._bound_s(2.0 * rows * outputs * inputs, rows * inputs + outputs * inputs + rows * outputs)

    def pointwise_s(self, name: str, elements: float) -> float:
        """Read and written once."""
        return self._bound_s(0.0, PASSES[name] * elements)

    def estimator_s(self, kind: str, tokens: int, query_heads: int) -> float:
        """Queries and keys read once more, at head_dim 128."""
        return self._bound_s(0.0, 2.0 * tokens * query_heads * 128)

    def prefill_relief(self, rows: int) -> float:
        """Nothing is known."""
        return 0.0

    def decode_glue_s(self, batch: int, weight_bytes: float) -> float:
        """Nothing is known."""
        return 0.0

    def decode_step_s(self, batch: int) -> float:
        """Nothing is known."""
        return 0.0

    def decode_turn_s(self, batch: int) -> float:
        """Nothing is known."""
        return 0.0

    @property
    def fused(self) -> None:
        """Nothing is known."""

    def decode_attention_s(self, works: Sequence[DecodeWork]) -> float:
        """One layer's decoding attention."""
        return float(self.decode_latency_s(works).sum())

    def _bound_s(self, flops: float, elements: float) -> float:
        return max(flops / self.datasheet.half_flop_per_s, 2.0 * elements / self.datasheet.bytes_per_s)

    def _peak_flop_per_s(self, dtype_bytes: int) -> float:
        match dtype_bytes:
            case 2:
                return self.datasheet.half_flop_per_s
            case 4:
                return self.datasheet.single_flop_per_s
        raise SpecError(f"{self.name} must be asked for 2 or 4 bytes per element, but got {dtype_bytes}.")


def roofline(gpu: str) -> Roofline:
    """The roofline of a GPU by its short name.

    Raises:
        SpecError: no datasheet is known; the message names the nearest one.
    """
    if gpu not in DATASHEETS:
        raise SpecError(f"roofline:{gpu} must name a known GPU.{nearest(gpu, DATASHEETS)}")
    return Roofline(gpu, DATASHEETS[gpu])


def _demand(work: UnitWork) -> tuple[float, float]:
    """FLOPs, and elements moved."""
    outputs = work.query_heads * work.q_len * work.head_dim
    keys = work.kv_len * work.head_dim
    match work.kind:
        case "dense":
            return 4.0 * work.head_dim * work.pairs * work.query_heads, 2.0 * outputs + 2.0 * keys
        case "tiles":
            touched = min(work.kv_len, work.tiles * work.block_tokens) * work.head_dim
            return 4.0 * work.head_dim * work.block_tokens**2 * work.tiles, 2.0 * outputs + 2.0 * touched
        case "mean_value":
            return float(keys), float(outputs + keys)
        case "zero":
            return 0.0, 0.0
