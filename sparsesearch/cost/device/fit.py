"""From the rows of the micro-runs to a cost model, with its errors."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.optimize import least_squares, nnls

from sparsesearch.cost.base import DecodeWork, StepChoice
from sparsesearch.cost.device.corrections import corrections, group_of
from sparsesearch.cost.device.fused import fit_skinny
from sparsesearch.cost.device.load import TileLoad, tile_load
from sparsesearch.cost.device.micro_bench import Row
from sparsesearch.cost.device.model import DeviceCostModel, many_schedule_seconds
from sparsesearch.cost.device.run_plan import STEP_GROUP
from sparsesearch.cost.device.table import (
    Correction,
    DecodeCost,
    DenseCost,
    DeviceTable,
    EstimatorCost,
    LinearCost,
    PairPoints,
    Peaks,
    Points,
    StepChoiceCost,
    TileKernelCost,
    rising,
)
from sparsesearch.cost.device.tile_cases import TileCase
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


def fitted(
    rows: Sequence[Row],
    *,
    name: str,
    device: str,
    kernel: Backend,
    workers: Workers,
    memory_bytes: float,
    dtype_bytes: int,
    provenance: dict[str, Any],
) -> DeviceTable:
    """Everything that the rows tell.

    Args:
        rows: from `runs.all_runs`.
        name: what the model is loaded by.
        device: product name.
        kernel: tile kernel that ran.
        workers: multiprocessors and cache.
        memory_bytes: of the device.
        dtype_bytes: bytes per element.
        provenance: settings and versions.
    """
    peaks = _peaks(rows)
    skipped = {row["name"]: row["error"] for row in group_of(rows, "skipped")}
    tiles, errors = fit_tiles(
        [row for row in rows if row["group"] == "tiles"], kernel, workers, dtype_bytes, peaks.read_bytes_per_s
    )
    skinny, skinny_errors = fit_skinny(group_of(rows, "skinny"), dtype_bytes, peaks.read_bytes_per_s)
    table = DeviceTable(
        name=name,
        device=device,
        backend=kernel,
        dtype_bytes=dtype_bytes,
        num_workers=workers.count,
        l2_bytes=workers.l2_bytes,
        cache_bytes=CACHE_SHARE * workers.l2_bytes,
        memory_bytes=memory_bytes,
        boost_hz=boost_clock(rows),
        peaks=peaks,
        tiles=tiles,
        dense=_dense(rows),
        decode=_decode(group_of(rows, "decode"), dtype_bytes),
        step_choices=_step_choices(rows),
        paged_decode=_decode(group_of(rows, "paged_decode"), dtype_bytes),
        linear=_linear(rows),
        pointwise=_pointwise(rows),
        estimators=fit_estimators(rows),
        prefill_relief=Correction(amounts=(1.0,), values=(0.0,)),
        decode_glue_s=Correction(amounts=(1.0,), values=(0.0,)),
        permutation=rising([(row["nbytes"], row["seconds"]) for row in group_of(rows, "permutation")]),
        skinny=skinny,
        fit={
            **errors,
            **skinny_errors,
            "repeat_spread_median": float(np.median([row["spread"] for row in rows if "spread" in row])),
        },
        provenance=provenance | ({"skipped": skipped} if skipped else {}),
    )
    table = table.model_copy(update={"step_joining_s": _step_joining(DeviceCostModel(table), rows)})
    model = DeviceCostModel(table)
    fit = table.fit | step_errors(model, rows)
    return table.model_copy(update={"fit": fit} | corrections(model, rows))


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


def _peaks(rows: Sequence[Row]) -> Peaks:
    rates = {row["name"]: row["amount"] / row["seconds"] for row in group_of(rows, "peak")}
    return Peaks(
        matmul_flop_per_s=rates["matmul_flop_per_s"],
        copy_bytes_per_s=rates["copy_bytes_per_s"],
        read_bytes_per_s=rates["read_bytes_per_s"],
        launch_s=1 / rates["launch_per_s"],
    )


def _dense(rows: Sequence[Row]) -> tuple[DenseCost, ...]:
    own = group_of(rows, "dense")
    return tuple(
        DenseCost(
            head_dim=size, points=rising([(row["pairs"], row["seconds"]) for row in own if row["head_dim"] == size])
        )
        for size in sorted({row["head_dim"] for row in own})
    )


def _decode(rows: Sequence[Row], dtype_bytes: int) -> tuple[DecodeCost, ...]:
    costs = []
    for head_dim in sorted({row["head_dim"] for row in rows}):
        own = [row for row in rows if row["head_dim"] == head_dim]
        pairs = np.array([row["batch"] * row.get("readers", row.get("num_kv_heads")) for row in own])
        nbytes = 2.0 * pairs * np.array([row["tokens"] for row in own]) * head_dim * dtype_bytes
        seconds = np.array([row["seconds"] for row in own])
        features = np.stack([np.ones_like(nbytes), nbytes / nbytes.mean(), pairs / pairs.mean()], 1)
        (call_s, per_byte, per_pair), _ = nnls(features / seconds[:, None], np.ones(len(own)))
        measured = list(zip(pairs.tolist(), nbytes.tolist(), seconds.tolist(), strict=True))
        costs.append(
            DecodeCost(
                head_dim=head_dim,
                curves=tuple(
                    PairPoints(pairs=count, points=rising([(size, s) for n, size, s in measured if n == count]))
                    for count in sorted(set(pairs.tolist()))
                ),
                pair_s=float(per_pair / pairs.mean()),
                call_s=float(call_s),
                byte_s=max(float(per_byte / nbytes.mean()), 1e-15),
            )
        )
    return tuple(costs)


def _pointwise(rows: Sequence[Row]) -> dict[str, Points]:
    own = group_of(rows, "pointwise")
    return {
        kind: rising([(row["elements"], row["seconds"]) for row in own if row["name"] == kind])
        for kind in sorted({row["name"] for row in own})
    }


def _linear(rows: Sequence[Row]) -> tuple[LinearCost, ...]:
    own = group_of(rows, "gemm")
    return tuple(
        LinearCost(
            outputs=n,
            inputs=k,
            points=rising([(row["m"], row["seconds"]) for row in own if (row["n"], row["k"]) == (n, k)]),
        )
        for n, k in sorted({(row["n"], row["k"]) for row in own})
    )


def fit_estimators(rows: Sequence[Row]) -> tuple[EstimatorCost, ...]:
    """One entry per rule, from the smallest number of heads it was timed with and, where there is another, the largest."""
    return tuple(EstimatorCost(**fields) for fields in _by_heads(group_of(rows, "estimator"), "tokens"))


def _step_choices(rows: Sequence[Row]) -> tuple[StepChoiceCost, ...]:
    """Likewise, over blocks."""
    return tuple(StepChoiceCost(**fields) for fields in _by_heads(group_of(rows, "step_choice"), "blocks"))


def _by_heads(rows: Sequence[Row], amount: str) -> Iterator[dict[str, Any]]:
    heads: dict[str, set[int]] = {}
    for row in rows:
        heads.setdefault(row["name"], set()).add(row["heads"])

    def points(kind: str, count: int) -> Points:
        return rising([(r[amount], r["seconds"]) for r in rows if (r["name"], r["heads"]) == (kind, count)])

    for kind, counts in sorted(heads.items()):
        few, many = min(counts), max(counts)
        yield {"kind": kind, "heads": few, "points": points(kind, few)} | (
            {"many_heads": many, "many_points": points(kind, many)} if many > few else {}
        )


def _step_joining(model: DeviceCostModel, rows: Sequence[Row]) -> Correction | None:
    """What layers in which some heads choose take beyond their parts, which the model prices without joining them."""
    beyond = {}
    for row in sorted(group_of(rows, "step_joined"), key=lambda row: int(row["batch"])):
        choice = StepChoice(row["name"], row["blocks"] * row["block_tokens"], row["block_tokens"])
        sizes = row["tokens"], row["head_dim"], STEP_GROUP, row["batch"], model.table.dtype_bytes
        works = [DecodeWork(*sizes), DecodeWork(*sizes, choice)] * row["kv_heads"]
        beyond[row["batch"]] = max(0.0, row["seconds"] - model.decode_attention_s(works))
    return Correction(amounts=tuple(beyond), values=tuple(beyond.values())) if beyond else None


def step_errors(model: DeviceCostModel, rows: Sequence[Row]) -> dict[str, float]:
    """Of steps that choose and read, which nothing was fitted to: how far off the model is."""
    errors = []
    for row in group_of(rows, "step_held_out"):
        choice = StepChoice(row["name"], row["blocks"] * row["block_tokens"], row["block_tokens"])
        work = DecodeWork(row["tokens"], row["head_dim"], row["readers"], row["batch"], model.table.dtype_bytes, choice)
        errors.append(abs(model.decode_attention_s([work]) / row["seconds"] - 1))
    return {"held_out_steps_mape": float(np.mean(errors)), "held_out_steps_max": max(errors)} if errors else {}
