"""`sparsesearch predict`: the shipped plan on a measured device and on a datasheet."""

from pathlib import Path
from typing import Any

import pytest

from sparsesearch.cost import load_cost_model
from sparsesearch.cost.table import TableCostModel
from sparsesearch.cut import Cut, LayerCut
from sparsesearch.plan import Plan

PLAN = Path(__file__).parents[2] / "profiles" / "needle-7m-plan.json"
WORK = ("--workload", "prompt=8192,generate=64,batch=2")


def test_json_has_both_sides_of_every_workload(run_json: Any) -> None:
    found = run_json("predict", PLAN, "--device", "h200", *WORK, "--workload", "prompt=4k")
    assert (found["device"], found["measured"], found["model_shape"]) == ("NVIDIA H200", True, "needle-7m")
    assert len(found["workloads"]) == 2
    first, second = found["workloads"]
    assert first["plan"]["density"] < first["dense"]["density"] == 1.0
    tiles_s = {name: sum(layer["attention_s"] for layer in first[name]["layers"]) for name in ("dense", "plan")}
    assert tiles_s["plan"] < tiles_s["dense"]
    assert first["plan"]["attention_s"] > tiles_s["plan"]  # dynamic rules pay for their choice
    assert first["plan"]["kv_bytes"] < first["dense"]["kv_bytes"]
    assert len(first["plan"]["layers"]) == 8
    assert second["plan"]["tpot_s"] is None


def test_a_plan_that_removes_weights_is_refused(run: Any, tmp_path: Path) -> None:
    """Its layers are smaller than those that would be priced."""
    plan = Plan.load(PLAN)
    cut = Cut(layers={0: LayerCut(num_heads=8, num_kv_heads=4, num_channels=96, removed_channels=(1,))})
    plan.model_copy(update={"pruning": cut}).save(tmp_path / "cut.json")
    assert "must keep every weight" in run("predict", tmp_path / "cut.json", "--device", "h200", *WORK, code=1).stderr


def test_a_datasheet_says_that_it_was_not_measured(run: Any) -> None:
    shown = run("predict", PLAN, "--device", "roofline:l40s", *WORK).stdout
    assert "NVIDIA L40S" in shown
    assert "nobody has measured this device" in shown
    assert "nobody has" not in run("predict", PLAN, "--device", "h200", *WORK).stdout


def test_a_processor_knows_prompts_but_of_a_decoded_token_its_attention_alone(run: Any, run_json: Any) -> None:
    shown = run("predict", PLAN, "--device", "cpu", *WORK).stdout
    assert "only the attention is known on a CPU" in shown
    (found,) = run_json("predict", PLAN, "--device", "cpu", *WORK)["workloads"]
    dense, plan = found["dense"], found["plan"]
    assert (plan["tpot_s"], plan["peak_bytes"]) == (None, None)
    rest = [one["ttft_s"] - one["attention_s"] for one in (dense, plan)]
    assert rest[0] == pytest.approx(rest[1])
    assert rest[0] > 0
    assert plan["attention_s"] < 0.5 * dense["attention_s"]
    assert (
        dense["weight_bytes"]
        == 4 * run_json("predict", PLAN, "--device", "h200", *WORK)["workloads"][0]["dense"]["weight_bytes"] / 2
    )


def test_a_calibration_of_attention_alone_predicts_no_model(run: Any, tmp_path: Path) -> None:
    older = load_cost_model("cpu")
    assert isinstance(older, TableCostModel)
    older.table.model_copy(update={"layers": None}).save(tmp_path / "older.json")
    refused = run("predict", PLAN, "--device", tmp_path / "older.json", *WORK, code=1)
    assert "prices attention alone" in " ".join(refused.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--device", "h20", *WORK), 1, "Did you mean 'h200'"),
        (("--device", "h200", "--workload", "promt=5"), 2, "--workload"),
        (("--device", "h200", *WORK, "--model-shape", "llama3-8b"), 5, "Name the model's own shape"),
        (("--device", "h200", *WORK, "--model-shape", "llama3-9b"), 1, "Did you mean 'llama3-8b'"),
    ],
)
def test_what_cannot_be_predicted_is_refused(run: Any, arguments: tuple[str, ...], code: int, message: str) -> None:
    refused = run("predict", PLAN, *arguments, code=code)
    assert " ".join(message.split()) in " ".join(refused.stderr.replace("│", " ").split())
