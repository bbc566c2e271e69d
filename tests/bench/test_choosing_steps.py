"""Fused steps of heads that choose what they read: the record, and the bench in the interpreter."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsesearch.bench import choosing_steps
from sparsesearch.bench.choosing_steps import FORMAT, Case, judged, step_rows
from sparsesearch.bench.model_predicted import heads_of
from sparsesearch.cost import load_cost_model
from sparsesearch.cost.device.micro_bench import Bench
from sparsesearch.cost.device.model import DeviceCostModel
from sparsesearch.model_shapes import ModelShape, model_shape
from sparsesearch.rules.bounds_topk import BoundsTopk

RECORD: dict[str, Any] = json.loads(Path("tests/golden/choosing_steps_h200.json").read_text(encoding="utf-8"))
BAR = 0.07
"""Of a prediction, end to end (issue 4)."""
MISSED = {("all", 131072, 1)}
"""Predicted a tenth too short in both runs, whose 32 steps differ there by 8 % (interquartile range); elsewhere by 3 % at most. Why is not known."""


def rows_of(plan: str) -> dict[tuple[int, int], dict[str, Any]]:
    return {
        (row["prompt_tokens"], row["batch"]): row
        for row in RECORD["rows"]
        if row["plan"] == plan and row["block_tokens"] == 64 and row["keep_tokens"] == 2048
    }


def test_the_record_covers_what_is_claimed() -> None:
    assert RECORD["format"] == FORMAT
    assert {run["device"] for run in RECORD["provenance"].values()} == {"NVIDIA H200"}
    assert {(n, b) for n in (16384, 65536, 131072) for b in (1, 8)} <= set(rows_of("all"))
    assert {row["plan"] for row in RECORD["rows"]} == {"all", "half", "whole"}


@pytest.mark.parametrize("row", RECORD["rows"], ids=lambda r: f"{r['plan']} {r['prompt_tokens']} x {r['batch']}")
def test_steps_are_predicted(row: dict[str, Any]) -> None:
    """By the shipped cost model, which has seen none of them."""
    shipped = load_cost_model("h200")
    assert isinstance(shipped, DeviceCostModel)
    if not shipped.step_choices:
        pytest.skip("the shipped cost model is older than its prices of choices")
    (found,) = judged([row], shipped)
    assert (abs(found["error"]) > BAR) == ((row["plan"], row["prompt_tokens"], row["batch"]) in MISSED)


def test_what_is_missed_was_unsteady() -> None:
    for row in RECORD["rows"]:
        unsteady = (row["plan"], row["prompt_tokens"], row["batch"]) in MISSED
        assert (row["spread"] > 0.05) == unsteady


def test_reading_less_pays_where_the_cache_is_long() -> None:
    chosen, whole = rows_of("all"), rows_of("whole")
    gain = {where: whole[where]["seconds"] / chosen[where]["seconds"] for where in whole}
    assert gain[65536, 8] > 2
    assert gain[131072, 8] > 3
    assert gain[131072, 1] > 1.2


def test_cases_choose_in_the_heads_that_they_say() -> None:
    info = heads_of(model_shape("llama3-8b"))
    shares = {}
    for plan in ("all", "half", "whole"):
        built = Case(plan, 16384).build(info)
        shares[plan] = sum(isinstance(rule, BoundsTopk) for _, _, rule in built.heads()) / (32 * 32)
    assert shares == {"all": 1.0, "half": 0.5, "whole": 0.0}


def test_steps_run_through_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing_steps, "STEPS", 2)
    monkeypatch.setattr(choosing_steps, "event_times", lambda step, count: [float(step() is not None)] * count)
    shape = ModelShape("tiny", "llama", 1, 32, 48, 4, 2, 16, 50, False, 1e4, 1024)
    bench = Bench("cpu", "triton", torch.float32, time_share=0.001)
    (one, two) = step_rows(bench, shape, [Case("half", 40, 16, 16, batches=(1, 2))])
    assert (one["batch"], one["context_tokens"], two["batch"], two["context_tokens"]) == (1, 42, 2, 45)
    assert one["seconds"] == 1.0
