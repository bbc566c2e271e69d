"""The committed measurement at true video shapes is consistent with itself."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparsesearch.bench.video_predicted import with_predictions
from sparsesearch.cost import load_cost_model
from sparsesearch.cost.device.model import DeviceCostModel

RECORD = json.loads((Path(__file__).parents[1] / "golden" / "video_h200.json").read_text())
ROWS = [row for row in RECORD["rows"] if "R" in row]


def test_it_says_where_it_comes_from() -> None:
    assert {"device", "torch", "triton", "cudnn", "command"} <= set(RECORD["provenance"])
    assert len(ROWS) == 21
    assert {row["model"] for row in ROWS} == {"CogVideoX1.5-5B", "Wan2.1-14B", "HunyuanVideo"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['model']}-{row['mix']}-{row['density']:.2f}")
def test_ratios_follow_from_the_times(row: dict[str, float]) -> None:
    assert row["R"] == pytest.approx(row["seconds"] / (row["density"] * row["dense_s"]), rel=1e-3)
    assert row["attention_speedup"] == pytest.approx(row["dense_s"] / row["seconds"], rel=1e-3)
    share, gain = row["attention_share"], row["attention_speedup"]
    assert row["projected_speedup"] == pytest.approx(1 / (1 - share + share / gain), rel=1e-3)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['model']}-{row['mix']}")
def test_a_computed_tile_costs_less_than_cudnns_and_a_skipped_one_nothing(row: dict[str, float]) -> None:
    """Copies included: the plan as a whole, and its tiles alone with the copies alone; both took turns with cuDNN."""
    assert row["R"] <= 0.88
    assert (row["tiles_s"] + row["copies_s"]) / (row["density"] * row["dense_s"]) <= 0.90


def test_one_schedule_takes_up_to_five_per_cent_more_or_less_time() -> None:
    """Bands in the model's own order and in another compute the same tiles: their times differ by the clock they met, which no prediction knows."""
    tiles = {(row["model"], row["mix"]): row["tiles_s"] for row in ROWS if row["mix"] in ("spatial", "temporal")}
    spread = [tiles[model, "temporal"] / tiles[model, "spatial"] - 1 for model in {row["model"] for row in ROWS}]
    assert 0.02 < max(map(abs, spread)) < 0.05


def test_whole_models_would_gain_more_than_was_published() -> None:
    """Projected from the share of attention at the published density; the published figure is another kernel's on another device."""
    modes = [row for row in ROWS if row["mix"] == "modes" and abs(row["density"] - row["published_density"]) < 0.01]
    assert len(modes) == 3
    for row in modes:
        assert row["projected_speedup"] > 1.14 * row["published_speedup"]


def test_predictions_stand_beside_the_times() -> None:
    """Every row; some of them computed anew, which needs no device."""
    errors = [abs(row["predicted_s"] / row["seconds"] - 1) for row in ROWS]
    assert sum(errors) / len(errors) <= 0.03
    assert max(errors) <= 0.07
    costs = load_cost_model(RECORD["predicted_by"])
    assert isinstance(costs, DeviceCostModel)
    few = [row for row in ROWS if row["model"] == "CogVideoX1.5-5B" and row["mix"] == "bands"]
    assert few
    for row, again in zip(few, with_predictions({**RECORD, "rows": few}, costs)["rows"], strict=True):
        assert abs(again["predicted_s"] / row["seconds"] - 1) <= 0.08


def test_the_command_prints_them(tmp_path: Path) -> None:
    from sparsesearch_cli.main import app

    few = {**RECORD, "rows": [row for row in RECORD["rows"] if row.get("mix") == "spatial" and row["tokens"] < 50_000]}
    (tmp_path / "few.json").write_text(json.dumps(few))
    result = CliRunner().invoke(
        app, ["bench", "video", "--measured", str(tmp_path / "few.json"), "-o", str(tmp_path / "out.json")]
    )
    assert result.exit_code == 0, result.stderr
    assert "mean error" in result.stdout
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["rows"][0]["predicted_s"] == pytest.approx(few["rows"][0]["seconds"], rel=0.12)
