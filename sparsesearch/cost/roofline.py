"""The roofline: the time that arithmetic or memory traffic needs at the datasheet's peak, whichever is longer."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from sparsesearch.cost.base import DecodeWork, UnitWork
from sparsesearch.errors import SpecError, nearest


@dataclass(frozen=True)
class Datasheet:
    """Peaks of a device, from its vendor's datasheet.

    Attributes:
        device: product name.
        half_flop_per_s: bf16/fp16 tensor throughput with fp32 accumulation, without structured sparsity.
        single_flop_per_s: fp32 throughput of the vector units.
        bytes_per_s: memory bandwidth.
    """

    device: str
    half_flop_per_s: float
    single_flop_per_s: float
    bytes_per_s: float


DATASHEETS = {
    "a100": Datasheet("NVIDIA A100 SXM 80GB", 312e12, 19.5e12, 2.039e12),
    "h100": Datasheet("NVIDIA H100 SXM", 989.4e12, 66.9e12, 3.35e12),
    "h200": Datasheet("NVIDIA H200 SXM", 989.4e12, 66.9e12, 4.8e12),
    "l40s": Datasheet("NVIDIA L40S", 362.05e12, 91.6e12, 0.864e12),
    "rtx4090": Datasheet("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12, 1.008e12),
    "b200": Datasheet("NVIDIA B200 SXM", 2250e12, 75e12, 8.0e12),
    "mi300x": Datasheet("AMD Instinct MI300X", 1307.4e12, 163.4e12, 5.3e12),
}


@dataclass(frozen=True)
class Roofline:
    """max(FLOPs / peak, bytes / bandwidth) per unit, for a device that nobody has measured.

    FLOPs: 4·head_dim per query-key pair for dense attention (causal pairs only), 4·head_dim·block² per computed tile.
    Bytes: queries and output of every head, and every key and value that is touched, once. An estimator reads the
    queries and keys once more. Launches, tile overheads and imbalance are left out, so it flatters short sequences and
    low densities.

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
        """Keys and values read once at the datasheet's bandwidth, or 4·head_dim FLOPs per query head and key."""
        bytes_s = np.array([work.kv_bytes for work in works]) / self.datasheet.bytes_per_s
        flops = [4.0 * work.head_dim * work.query_heads * work.kv_tokens * work.batch for work in works]
        peaks = [self._peak_flop_per_s(max(work.dtype_bytes, 2)) for work in works]
        return np.asarray(np.maximum(bytes_s, np.array(flops) / np.array(peaks)))

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
