"""What the tile kernel takes on an accelerator: the law of its configurations, and the ones between those that were measured."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from sparsesearch.cost.device.load import TileLoad
from sparsesearch.cost.device.table import TileKernelCost

SHARPNESS = 8.0


def schedule_seconds(
    kernel: TileKernelCost, load: TileLoad, read_bytes_per_s: float, slowdown: float | None = None
) -> float:
    """Seconds of one launch over a schedule; the formula is that of `TileKernelCost`."""
    met = None if slowdown is None else np.array([slowdown])
    return float(many_schedule_seconds(kernel, (load,), read_bytes_per_s, met)[0])


def many_schedule_seconds(
    kernel: TileKernelCost,
    loads: Sequence[TileLoad],
    read_bytes_per_s: float,
    slowdown: Float[ndarray, " loads"] | None = None,
) -> Float[ndarray, " loads"]:
    """The same for several schedules on equally many workers.

    Args:
        kernel: the configuration that runs them.
        loads: what they ask for.
        read_bytes_per_s: of the memory.
        slowdown: a cool device's clock over the one that each of them met; None: the one that the power limit leaves.
    """
    tiles, blocks, partial = (
        np.stack([getattr(load, name) for load in loads]) for name in ("tiles", "blocks", "partial")
    )
    busy = (tiles * kernel.tile_s + blocks * kernel.block_s + partial * kernel.partial_s).max(-1)
    power = tiles.mean(-1) * kernel.tile_power_s + blocks.mean(-1) * kernel.block_power_s
    if slowdown is not None:
        busy, power = busy * slowdown, np.zeros_like(power)
    memory = np.array([load.traffic_bytes for load in loads]) / read_bytes_per_s
    merging = np.array([kernel.merge_s + load.pieces * kernel.piece_s if load.merges else 0.0 for load in loads])
    bounds = np.stack([busy, power, memory])
    longest = np.maximum(bounds.max(0), 1e-12)
    corner = ((bounds / longest) ** SHARPNESS).sum(0) ** (1 / SHARPNESS)
    return np.asarray(kernel.launch_s + longest * corner + merging)


@lru_cache(maxsize=64)
def tile_kernel(known: tuple[TileKernelCost, ...], head_dim: int, tile_keys: int, name: str) -> TileKernelCost:
    """The measured configuration, or one between two measured head sizes; `name` is the cost model's."""
    same = {kernel.head_dim: kernel for kernel in same_keys(known, tile_keys)}
    if head_dim in same:
        return same[head_dim]
    sizes = sorted(same)
    low = max((size for size in sizes if size < head_dim), default=sizes[0])
    high = min((size for size in sizes if size > head_dim), default=sizes[-1])
    if low == high:
        share = head_dim / low
        scaled = {
            field: getattr(same[low], field) * share
            for field in ("tile_s", "block_s", "partial_s", "tile_power_s", "block_power_s")
        }
    else:
        part = math.log(head_dim / low) / math.log(high / low)
        scaled = {
            field: (max(getattr(same[low], field), 1e-15) ** (1 - part))
            * max(getattr(same[high], field), 1e-15) ** part
            for field in ("tile_s", "block_s", "partial_s", "tile_power_s", "block_power_s")
        }
    return same[low].model_copy(update={"head_dim": head_dim, **scaled})


def same_keys(known: Sequence[TileKernelCost], tile_keys: int) -> list[TileKernelCost]:
    """The configurations whose tiles have the number of keys nearest to the one asked for."""
    closest = min(abs(math.log(kernel.tile_keys / tile_keys)) for kernel in known)
    return [kernel for kernel in known if abs(math.log(kernel.tile_keys / tile_keys)) <= closest + 1e-9]
