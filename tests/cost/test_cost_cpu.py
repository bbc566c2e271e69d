"""The processor's cost model against what was measured there: a plan's attention over dense's, from a committed record."""

import json
import sys
from pathlib import Path

import pytest

from sparsesearch.bench import cost_cpu
from sparsesearch.cost import load_cost_model
from sparsesearch.evaluate.predicted import predicted_seconds
from sparsesearch.plan import Plan
from sparsesearch.presets import preset_path
from sparsesearch.runtime.loading import load_model

RECORD = json.loads((Path(__file__).parents[1] / "golden" / "cost_cpu.json").read_text())


def test_a_plan_over_dense_is_predicted_at_short_and_long_prompts() -> None:
    assert RECORD["provenance"]["threads"] == 1
    assert [row["length"] for row in RECORD["rows"]] == [256, 512, 1024, 2048, 4096]
    for row in RECORD["rows"]:
        assert row["predicted_ratio"] == pytest.approx(row["ratio"], rel=0.15)
        assert row["predicted_dense_s"] == pytest.approx(row["dense_s"], rel=0.2)
        for name in (
            "dense",
            "plan",
        ):  # what the runtime does around the plan's calls is not priced: up to a tenth of short prompts
            assert row[f"predicted_{name}_prefill_s"] == pytest.approx(row[f"{name}_prefill_s"], rel=0.2)
    worth_it = [row["length"] for row in RECORD["rows"] if row["ratio"] < 1]
    assert worth_it == [row["length"] for row in RECORD["rows"] if row["predicted_ratio"] < 1] == [1024, 2048, 4096]


def test_recorded_predictions_are_the_shipped_models() -> None:
    plan = Plan.load(preset_path("profiles", "needle-7m-plan"))
    model, _ = load_model(plan.base_model.name_or_path, with_plan=False)
    for row in RECORD["rows"][:3]:
        found = predicted_seconds(model, {"dense": None, "plan": plan}, row["length"], load_cost_model("cpu"))
        for name in ("dense", "plan"):
            assert found[name]["attention_s"] == pytest.approx(row[f"predicted_{name}_s"], rel=1e-9)
            assert found[name]["prefill_s"] == pytest.approx(row[f"predicted_{name}_prefill_s"], rel=1e-9)


def test_the_command_writes_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "record.json"
    monkeypatch.setattr(sys, "argv", ["cost_cpu", "--json", str(out), "--lengths", "128", "--rounds", "2"])
    cost_cpu.main()
    (row,) = json.loads(out.read_text())["rows"]
    assert min(row["plan_s"], row["dense_s"], row["predicted_plan_s"], row["predicted_dense_s"]) > 0
