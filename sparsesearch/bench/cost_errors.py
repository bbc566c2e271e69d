"""Predictions beside measurements: ours, and three simpler ways that are in use.

flop_share   dense attention's time times the density             (MoA, Sparse-vDiT)
roofline     datasheet peaks                                       (LLM-Viewer)
additive     a table of costs per head, summed over the heads      (HAQ, once-for-all)
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.stats import kendalltau

from sparsesearch.bench.cost_plans import HeldOutPlan
from sparsesearch.bench.cost_runs import DENSE_SEED, model_plans
from sparsesearch.cost.base import DecodeWork, UnitWork
from sparsesearch.cost.device.micro_bench import Row
from sparsesearch.cost.device.model import DeviceCostModel
from sparsesearch.cost.layer_parts import WEIGHT_BYTES, activation_bytes, decode_rest_s, prefill_rest_s
from sparsesearch.cost.roofline import DATASHEETS, Roofline, roofline
from sparsesearch.kernels.dispatch import Backend
from sparsesearch.kernels.schedule import TileSchedule, Workers
from sparsesearch.model_shapes import model_shape

Predict = Callable[[HeldOutPlan], float]
NEAR = 1.15  # plans whose times are this close are hard to rank


def held_out_plan(row: Row) -> HeldOutPlan:
    """The plan of a row, made again."""
    return HeldOutPlan(**{field: row[field] for field in HeldOutPlan.__dataclass_fields__})


def predictors(model: DeviceCostModel) -> dict[str, Predict]:
    """Ours and the three baselines, all from the same calibration; the roofline from the datasheet."""
    sheet = roofline(model.name) if model.name in DATASHEETS else None
    dense_s = cache(lambda plan: _attention_s(plan, model))
    found: dict[str, Predict] = {
        "ours": lambda plan: _attention_s(plan, model),
        "flop_share": lambda plan: (
            _schedule(plan, model.workers, model.kernel).density * dense_s(replace(plan, seed=DENSE_SEED))
        ),
        "additive": lambda plan: _additive_s(plan, model),
    }
    if sheet is not None:
        found["roofline"] = lambda plan: _attention_s(plan, sheet)
    return found


@lru_cache(maxsize=512)
def _schedule(plan: HeldOutPlan, workers: Workers, kernel: Backend) -> TileSchedule:
    return plan.schedule(workers, kernel)


def _attention_s(plan: HeldOutPlan, costs: DeviceCostModel | Roofline, **clock: float) -> float:
    schedule = _schedule(plan, costs.workers, costs.kernel)
    return costs.attention_s(schedule, num_kv_heads=plan.num_kv_heads, head_dim=plan.head_dim, **clock)


def _additive_s(plan: HeldOutPlan, model: DeviceCostModel) -> float:
    tiles, grid = plan.head_tiles(), plan.grid
    counts = tiles.choices.sum((1, 2)).tolist()
    works = [
        UnitWork(
            "tiles",
            grid.q_len,
            grid.kv_len,
            plan.head_dim,
            1,
            float(counts[index]),
            grid.num_q_blocks,
            grid.block_tokens,
        )
        for index in tiles.of_head
    ]
    return float(model.latency_s(works).sum())


def plan_summary(rows: Sequence[Row], model: DeviceCostModel) -> dict[str, Any]:
    """Errors, ranks and regrets of every way of predicting, and the noise of the measurement.

    Rows that hold the clock that they met are predicted at that clock too: what is left then is the replay's own error.
    """
    own = [row for row in rows if row["group"] == "plan"]
    if not own:
        return {"num_plans": 0}
    plans, seconds = [held_out_plan(row) for row in own], np.array([row["seconds"] for row in own])
    again = {held_out_plan(row): row["seconds"] for row in rows if row["group"] == "repeat"}
    noise = [abs(again[plan] / first - 1) for plan, first in zip(plans, seconds, strict=True) if plan in again]
    ways = {
        name: _figures(np.array([predict(plan) for plan in plans]), seconds, plans)
        for name, predict in predictors(model).items()
    }
    if model.table.boost_hz is not None and all("hz" in row for row in own):
        met = [_attention_s(plan, model, hz=row["hz"]) for plan, row in zip(plans, own, strict=True)]
        ways["ours_at_their_clock"] = _figures(np.array(met), seconds, plans)
    return {"num_plans": len(plans), "repeat_mape": float(np.mean(noise)) if noise else None, **ways}


def _figures(
    predicted: Float[ndarray, " plans"], seconds: Float[ndarray, " plans"], plans: Sequence[HeldOutPlan]
) -> dict[str, Any]:
    errors = np.abs(predicted / seconds - 1)
    shapes = [(plan.length, plan.head_dim) for plan in plans]
    regrets, near = [], []
    for shape in sorted(set(shapes)):
        here = np.array([index for index, other in enumerate(shapes) if other == shape])
        best = here[np.argmin(predicted[here])]
        regrets.append(seconds[best] / seconds[here].min() - 1)
        for a, b in combinations(here, 2):
            if 1 / NEAR < seconds[a] / seconds[b] < NEAR:
                chosen = a if predicted[a] <= predicted[b] else b
                near.append(seconds[chosen] / min(seconds[a], seconds[b]) - 1)
    return {
        "mape": float(errors.mean()),
        "p95": float(np.quantile(errors, 0.95)),
        "max": float(errors.max()),
        "kendall_tau": float(kendalltau(predicted, seconds).statistic),
        "regret_mean": float(np.mean(regrets)),
        "regret_max": float(np.max(regrets)),
        "near_pairs": len(near),
        "near_pairs_regret_mean": float(np.mean(near)) if near else None,
        "predicted_s": predicted.tolist(),
    }


def model_summary(rows: Sequence[Row], model: DeviceCostModel) -> dict[str, Any]:
    """Predicted and measured seconds end to end."""
    results = []
    for row in rows:
        match row["group"]:
            case "prefill":
                predicted = _prefill_s(row, model)
            case "decode_step":
                predicted = _decode_s(row, model)
            case "fused_step" if model.fused is not None:
                predicted = _fused_s(row, model)
            case _:
                continue
        kept = {name: value for name, value in row.items() if name not in ("spread", "at_s")}
        if row["group"] == "fused_step":
            kept["kv_tokens"] = float(np.mean(row["kv_tokens"]))
        results.append(kept | {"predicted_s": predicted, "error": predicted / row["seconds"] - 1} | _peak(row))
    errors = [abs(result["error"]) for result in results]
    return {"rows": results, "mape": float(np.mean(errors)), "max": float(np.max(errors))} if results else {"rows": []}


def _prefill_s(row: Row, model: DeviceCostModel) -> float:
    shape = model_shape(row["model"])
    layers = [_attention_s(plan, model) for plan in model_plans(shape, row["length"], row["seed"])]
    attention_s = sum(layers[layer % len(layers)] for layer in range(shape.num_layers))
    return attention_s + prefill_rest_s(shape, model, rows=row["length"], batch=1)


def _peak(row: Row) -> dict[str, float]:
    """Peak memory of the prompt, as `cost.predict` has it, where it was measured."""
    if "peak_bytes" not in row:
        return {}
    shape = model_shape(row["model"])
    tokens = int(row["prompt_tokens" if row["group"] == "fused_step" else "length"])
    held = WEIGHT_BYTES * shape.num_parameters + row.get("cache_bytes", 0)
    return {"predicted_peak_bytes": held + activation_bytes(shape, tokens, WEIGHT_BYTES)}


def _decode_s(row: Row, model: DeviceCostModel) -> float:
    shape = model_shape(row["model"])
    head = DecodeWork(row["kv_tokens"], shape.head_dim, shape.num_heads // shape.num_kv_heads, row["batch"])
    attention_s = shape.num_layers * model.decode_attention_s([head] * shape.num_kv_heads)
    return attention_s + decode_rest_s(shape, model, batch=row["batch"], fused=False, turn=False)


def _fused_s(row: Row, model: DeviceCostModel) -> float:
    shape = model_shape(row["model"])
    group = shape.num_heads // shape.num_kv_heads
    attention_s = sum(
        model.decode_attention_s([DecodeWork(kept, shape.head_dim, group, row["batch"]) for kept in layer])
        for layer in row["kv_tokens"]
    )
    return attention_s + decode_rest_s(shape, model, batch=row["batch"], fused=True, turn=False)
