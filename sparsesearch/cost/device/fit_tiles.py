"""The tile kernel's law, fitted to the times of its micro-runs, and its errors on cases that are left out in turn."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.optimize import least_squares

from sparsesearch.cost.device.corrections import group_of
from sparsesearch.cost.device.load import TileLoad, tile_load
from sparsesearch.cost.device.micro_bench import Row
from sparsesearch.cost.device.table import TileKernelCost
from sparsesearch.cost.device.tile_cases import TileCase
from sparsesearch.cost.device.tile_seconds import many_schedule_seconds
from sparsesearch.kernels.dispatch import Backend, tile_shape
from sparsesearch.kernels.schedule import Workers

CACHE_SHARE = 0.5  # of L2: both halves of a Hopper's cache keep their own copy of what all multiprocessors read
PARAMETERS = (
    "launch_s",
    "tile_s",
    "block_s",
    "partial_s",
    "tile_power_s",
    "block_power_s",
    "merge_s",
    "piece_s",
)
START = (3e-6, 1e-6, 1.5e-6, 1e-7, 5e-7, 1.5e-6, 3e-6, 2e-8)  # at head_dim 128; scaled to the device first
FOLDS = 4


def fit_tiles(
    rows: Sequence[Row], kernel: Backend, workers: Workers, dtype_bytes: int, read_bytes_per_s: float
) -> tuple[tuple[TileKernelCost, ...], dict[str, float]]:
    """Least squares on relative errors, per configuration; the errors of the fit, and of cases left out in turn."""
    costs, residuals, left_out, beyond, met = [], [], [], [], []
    boost_hz = boost_clock(rows)
    for head_dim, block_tokens in sorted({(row["head_dim"], row["block_tokens"]) for row in rows}):
        own = [row for row in rows if (row["head_dim"], row["block_tokens"]) == (head_dim, block_tokens)]
        shape = tile_shape(kernel, head_dim, block_tokens)
        fixed = {"head_dim": head_dim, "tile_rows": shape.rows, "tile_keys": shape.keys}
        loads = [case_load(row, kernel, workers, dtype_bytes) for row in own]
        seconds = np.array([row["seconds"] for row in own])
        slowdown = _slowdown(own, boost_hz)
        cost = _solve(loads, seconds, fixed, read_bytes_per_s, slowdown)
        costs.append(cost)
        errors = _errors(cost, loads, seconds, read_bytes_per_s)
        residuals += errors.tolist()
        if slowdown is not None:
            met += _errors(cost, loads, seconds, read_bytes_per_s, slowdown).tolist()
        cache_bytes = CACHE_SHARE * workers.l2_bytes
        beyond += [
            error for error, load in zip(errors.tolist(), loads, strict=True) if load.traffic_bytes > 2 * cache_bytes
        ]
        fold = np.arange(len(own)) % FOLDS
        for part in range(FOLDS if len(own) >= 3 * FOLDS else 0):
            kept, out = np.flatnonzero(fold != part), np.flatnonzero(fold == part)
            partial = _solve(
                [loads[i] for i in kept],
                seconds[kept],
                fixed,
                read_bytes_per_s,
                None if slowdown is None else slowdown[kept],
            )
            left_out += _errors(partial, [loads[i] for i in out], seconds[out], read_bytes_per_s).tolist()
    summary = {"tiles_mape": float(np.mean(np.abs(residuals))), "tiles_max": float(np.max(np.abs(residuals)))}
    if left_out:
        summary |= {
            "held_out_tiles_mape": float(np.mean(np.abs(left_out))),
            "held_out_tiles_max": float(np.max(np.abs(left_out))),
        }
    if met:
        summary["tiles_at_their_clock_mape"] = float(np.mean(np.abs(met)))
    if beyond:
        summary["beyond_cache_bias"] = float(
            np.mean(beyond)
        )  # what reading past the cache costs and the model leaves out
    return tuple(costs), summary


def case_load(row: Row, kernel: Backend, workers: Workers, dtype_bytes: int) -> TileLoad:
    """The load of a tile row, made again from its parameters."""
    case = TileCase(**{field: row[field] for field in TileCase.__dataclass_fields__})
    return tile_load(
        case.schedule(workers, kernel, dtype_bytes),
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        dtype_bytes=dtype_bytes,
        cache_bytes=CACHE_SHARE * workers.l2_bytes,
    )


def _solve(
    loads: Sequence[TileLoad],
    seconds: Float[ndarray, " cases"],
    fixed: dict[str, int],
    read_bytes_per_s: float,
    slowdown: Float[ndarray, " cases"] | None,
) -> TileKernelCost:
    """What explains the seconds twice: at the clock that each case met, and with the one that the power limit leaves it."""
    usual = TileKernelCost(**fixed, **dict(zip(PARAMETERS, START, strict=True)))
    start = np.log(START) + np.median(np.log(seconds / many_schedule_seconds(usual, loads, read_bytes_per_s)))

    def cost(logs: ndarray) -> TileKernelCost:
        return TileKernelCost(**fixed, **dict(zip(PARAMETERS, np.exp(logs).tolist(), strict=True)))

    def residual(logs: ndarray) -> ndarray:
        pull = 0.003 * (logs - start)  # what the cases cannot tell stays where it was
        errors = [_errors(cost(logs), loads, seconds, read_bytes_per_s)]
        if slowdown is not None:
            errors.append(_errors(cost(logs), loads, seconds, read_bytes_per_s, slowdown))
        return np.concatenate([*errors, pull])

    found = least_squares(residual, start, loss="soft_l1", f_scale=0.03, x_scale=1.0, max_nfev=200)
    return cost(found.x)


def _errors(
    cost: TileKernelCost,
    loads: Sequence[TileLoad],
    seconds: Float[ndarray, " cases"],
    read_bytes_per_s: float,
    slowdown: Float[ndarray, " cases"] | None = None,
) -> Float[ndarray, " cases"]:
    return np.asarray(many_schedule_seconds(cost, loads, read_bytes_per_s, slowdown) / seconds - 1)


def boost_clock(rows: Sequence[Row]) -> float | None:
    """The highest clock that any tile row met; None where it was not read."""
    return max((float(row["hz"]) for row in group_of(rows, "tiles") if row.get("hz")), default=None)


def _slowdown(rows: Sequence[Row], boost_hz: float | None) -> Float[ndarray, " rows"] | None:
    if boost_hz is None or not all(row.get("hz") for row in rows):
        return None
    return boost_hz / np.array([row["hz"] for row in rows], dtype=float)
