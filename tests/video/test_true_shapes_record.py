"""The committed measurement at true video shapes is consistent with itself."""

import json
from pathlib import Path

import pytest

RECORD = json.loads((Path(__file__).parents[1] / "golden" / "video_h200.json").read_text())
ROWS = [row for row in RECORD["rows"] if "R" in row]


def test_it_says_where_it_comes_from() -> None:
    assert {"device", "torch", "triton", "cudnn", "command"} <= set(RECORD["provenance"])
    assert {row["model"] for row in ROWS} == {"CogVideoX1.5-5B", "Wan2.1-14B", "HunyuanVideo"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['model']}-{row['mix']}-{row['density']:.2f}")
def test_ratios_follow_from_the_times(row: dict[str, float]) -> None:
    assert row["R"] == pytest.approx(row["seconds"] / (row["density"] * row["dense_s"]), rel=1e-3)
    assert row["attention_speedup"] == pytest.approx(row["dense_s"] / row["seconds"], rel=1e-3)
    share, gain = row["attention_share"], row["attention_speedup"]
    assert row["projected_speedup"] == pytest.approx(1 / (1 - share + share / gain), rel=1e-3)
