"""From the rows of the micro-runs to a cost model, with its errors."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy.optimize import nnls

from sparsesearch.cost.base import DecodeWork, StepChoice
from sparsesearch.cost.device.corrections import corrections, group_of
from sparsesearch.cost.device.fit_tiles import CACHE_SHARE, boost_clock, fit_tiles
from sparsesearch.cost.device.fused import fit_skinny
from sparsesearch.cost.device.micro_bench import Row
from sparsesearch.cost.device.model import DeviceCostModel
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
    rising,
)
from sparsesearch.kernels.dispatch import Backend
from sparsesearch.kernels.schedule import Workers


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
