"""The H200's cost model against what was measured on an H200: the bars, checked from committed figures."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from scipy.stats import kendalltau

from sparsesearch.bench.attention import plan_rules
from sparsesearch.bench.cost_errors import held_out_plan, model_summary, plan_summary, predictors
from sparsesearch.block_mask import BlockGrid
from sparsesearch.cost import load_cost_model
from sparsesearch.cost.base import DecodeWork
from sparsesearch.cost.device.model import DeviceCostModel
from sparsesearch.kernels.schedule import Span, TileShape, schedule_of_rules

GOLDEN = Path(__file__).parents[1] / "golden"
RECORD = json.loads((GOLDEN / "cost_h200.json").read_text())
PLANS = [row for row in RECORD["rows"] if row["group"] == "plan"]
SHORT_TOKENS = 16384  # longer plans take seconds to schedule
MISSED: dict[str, float] = {"seconds of a cold calibration": 92.7}
"""Bars that are not reached, and what is. A bar that is reached must leave this list. Compiling took 36 s of these, beside the large products
that keep the device warm meanwhile; without them it took 19 s, but then a calibration meets a cooler device than its predictions do."""


class Bar(NamedTuple):
    """What was found, and the most that it may be."""

    found: float
    most: float


@pytest.fixture(scope="module")
def model() -> DeviceCostModel:
    found = load_cost_model("h200")
    assert isinstance(found, DeviceCostModel)
    return found


def figures(way: str) -> tuple[float, float, float]:
    predicted, seconds = np.array(RECORD["plans"][way]["predicted_s"]), np.array([row["seconds"] for row in PLANS])
    errors = np.abs(predicted / seconds - 1)
    return float(errors.mean()), float(np.quantile(errors, 0.95)), float(kendalltau(predicted, seconds).statistic)


def worst(group: str) -> float:
    """Largest error of a group of whole models' rows."""
    return max(
        abs(row["predicted_s"] / row["seconds"] - 1) for row in RECORD["models"]["rows"] if row["group"] == group
    )


def test_bars(model: DeviceCostModel) -> None:
    mape, p95, tau = figures("ours")
    bars = {
        "seconds of a cold calibration": Bar(model.table.provenance["whole_s"], 90.0),
        "held-out layers, from micro-runs alone": Bar(mape, 0.05),
        "held-out layers, stretch": Bar(mape, 0.03),
        "held-out layers, 95th percentile": Bar(p95, 0.12),
        "held-out layers, 1 - tau": Bar(1 - tau, 0.05),
        "regret of the plan chosen": Bar(RECORD["plans"]["ours"]["regret_mean"], 0.02),
        "prompts of 8k to 128k": Bar(worst("prefill"), 0.07),
        "steps of 1 to 32 sequences": Bar(worst("decode_step"), 0.07),
        "fused steps of 1 to 16 sequences": Bar(worst("fused_step"), 0.07),
    }
    missed = {name: bar.found for name, bar in bars.items() if bar.found > bar.most}
    assert set(missed) == set(MISSED), missed
    for name, found in missed.items():
        assert found == pytest.approx(MISSED[name], rel=0.02), name


def test_the_record_covers_what_the_bars_speak_of() -> None:
    assert len(PLANS) >= 60
    assert {row["length"] for row in PLANS} >= {4096, 131072}
    assert {row["head_dim"] for row in PLANS} == {64, 128}
    rows: list[dict[str, Any]] = RECORD["models"]["rows"]
    assert {row["length"] for row in rows if row["group"] == "prefill"} >= {8192, 32768, 65536, 131072}
    assert {row["batch"] for row in rows if row["group"] == "decode_step"} >= {1, 4, 8, 16, 32}
    assert {row["batch"] for row in rows if row["group"] == "fused_step"} >= {1, 8, 16}
    assert RECORD["plans"]["repeat_mape"] <= 0.03  # noise of the measurement itself


def test_one_whole_cold_calibration(model: DeviceCostModel) -> None:
    """Fitted once more to the same micro-runs, since decoding is interpolated along straight lines in its bytes."""
    provenance = model.table.provenance
    assert not {"from_another_calibration", "skipped"} & set(provenance)
    assert not provenance["quick"]
    assert provenance["group_s"]["compile"] > 8  # nothing was compiled before
    groups = {"peak", "tiles", "dense", "decode", "gemm", "skinny", "pointwise", "layer_decode", "layer_fused", "turn"}
    assert set(provenance["group_s"]) >= groups | {"layer_prefill", "permutation", "estimator"}


@pytest.mark.parametrize("way", ["flop_share", "roofline", "additive"])
def test_simpler_ways_are_worse(way: str) -> None:
    assert figures("ours")[0] < 0.7 * figures(way)[0]


def test_what_is_left_is_the_clock() -> None:
    """At the clock that each layer met, its replay has no tail: the prediction must guess the clock."""
    mape, p95, _ = figures("ours_at_their_clock")
    assert mape <= 0.02
    assert p95 <= 0.05


def test_recorded_predictions_are_the_shipped_models(model: DeviceCostModel) -> None:
    ours = predictors(model)["ours"]
    for row, recorded in zip(PLANS, RECORD["plans"]["ours"]["predicted_s"], strict=True):
        if row["length"] <= SHORT_TOKENS:
            assert ours(held_out_plan(row)) == pytest.approx(recorded, rel=1e-6)


def test_summary_of_the_short_plans_stays_within_the_bars(model: DeviceCostModel) -> None:
    short = [row for row in RECORD["rows"] if row.get("length", 0) <= SHORT_TOKENS]
    found = plan_summary(short, model)["ours"]
    assert found["mape"] <= 0.05
    assert found["kendall_tau"] >= 0.95


def test_whole_models_are_predicted_as_recorded(model: DeviceCostModel) -> None:
    again = model_summary([row for row in RECORD["rows"] if row.get("length", 0) <= 8192], model)
    keys = ("group", "length", "seed", "batch", "kv_tokens", "prompt_tokens")
    recorded = {tuple(row.get(key) for key in keys): row["predicted_s"] for row in RECORD["models"]["rows"]}
    assert len(again["rows"]) >= 12
    for row in again["rows"]:
        assert row["predicted_s"] == pytest.approx(recorded[tuple(row.get(key) for key in keys)], rel=1e-6)


def test_rows_that_take_turns_are_predicted_at_the_clock_they_met(model: DeviceCostModel) -> None:
    """In turns with cuDNN a kernel meets a clock a tenth higher than alone for long, where the prediction is too long by about as much."""
    rows = [
        row
        for run in json.loads((GOLDEN / "attention_h200.json").read_text())["runs"]
        for row in run["rows"]
        if row["kernel"] == "gluon" and row["causal"] and row["length"] in (8192, 32768)
    ]
    errors: dict[tuple[int, bool], list[float]] = {}
    for row in rows:
        grid, heads = BlockGrid(row["length"], row["length"], 128), {"num_kv_heads": 8, "head_dim": row["head_dim"]}
        schedule = schedule_of_rules(
            plan_rules(row["plan"], 32, row["length"]), (Span(grid),), num_kv_heads=8, shape=TileShape(128, 128),
            workers=model.workers, head_bytes=2 * row["head_dim"],
        )  # fmt: skip
        for met, hz in ((True, row["hz"]), (False, None)):
            error = model.attention_s(schedule, **heads, hz=hz) / row["seconds"] - 1
            errors.setdefault((row["head_dim"], met), []).append(error)
    assert len(rows) == 24
    means = {key: float(np.mean(np.abs(own))) for key, own in errors.items()}
    for head_dim in (64, 128):
        assert means[head_dim, True] < 0.6 * means[head_dim, False]
        assert means[head_dim, True] <= 0.05


def test_decoding_rows_of_the_kernel_benchmark(model: DeviceCostModel) -> None:
    errors = []
    for row in json.loads((GOLDEN / "decode_h200.json").read_text())["rows"]:
        if row["kernel"] == "ragged_decode":
            heads = [DecodeWork(row["bytes"] / 4 / 128 / 8 / row["batch"], 128, 4, row["batch"])] * 8
            errors.append(abs(model.decode_attention_s(heads) / row["seconds"] - 1))
    assert np.mean(errors) <= 0.03


def test_peak_memory_of_prompts() -> None:
    """Weights, cache and activations of the 8B shape, dense without a cache and under a plan through the runtime, within 2 %."""
    rows = [row for row in RECORD["models"]["rows"] if "peak_bytes" in row]
    assert {row["group"] for row in rows} == {"prefill", "fused_step"}
    assert {row["length"] for row in rows if "length" in row} >= {8192, 131072}
    for row in rows:
        assert row["predicted_peak_bytes"] == pytest.approx(row["peak_bytes"], rel=0.02)
