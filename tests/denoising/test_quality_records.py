"""What `sparsesearch bench video-quality` measured on an H200 reaches the bars, the stretch too, and says how it came about."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from sparsesearch.bench.video_quality import BARS_DB

FOLDER = Path(__file__).parent.parent / "golden" / "video"
STRETCH_DB = {"t2v": {0.35: 26.0, 0.5: 33.0}, "i2v": {0.25: 26.5, 0.5: 33.0}}
CASES = [(mode, density) for mode, bars in STRETCH_DB.items() for density in bars]


def record_of(mode: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"wan-tiny-{mode}-h200.json").read_text(encoding="utf-8"))
    return found


def psnr_db(record: dict[str, Any], name: str) -> float:
    return fmean(record["variants"][name]["values"]["psnr_db"])


@pytest.mark.parametrize("mode", STRETCH_DB)
def test_it_says_where_it_comes_from(mode: str) -> None:
    record = record_of(mode)
    assert record["provenance"]["device"] == "NVIDIA H200"
    assert f"bench video-quality --mode {mode}" in record["provenance"]["command"]
    assert record["steps"] == 30
    assert all(len(each["values"]["psnr_db"]) == 12 for each in record["variants"].values())


@pytest.mark.parametrize(("mode", "density"), CASES)
def test_both_menus_reach_their_bars(mode: Any, density: float) -> None:
    record = record_of(mode)
    for menu, bar in BARS_DB[mode][density].items():
        name = f"{menu} {density}"
        assert record["variants"][name]["density"] <= density + 1e-9
        assert psnr_db(record, name) >= bar
    assert psnr_db(record, f"video_mixture {density}") >= STRETCH_DB[mode][density]


@pytest.mark.parametrize(("mode", "density"), CASES)
def test_it_beats_every_control_beyond_the_noise(mode: str, density: float) -> None:
    """The published menus and rules of choice, one rule for all heads, the same rules on the wrong heads; clip by clip."""
    record = record_of(mode)
    ours = f"video_mixture {density}"
    others = [name for name in record["variants"] if f" {density}" in name and not name.startswith("video_mixture")]
    assert len(others) >= 6
    for name in others:
        a, b = (record["variants"][each]["values"]["psnr_db"] for each in (ours, name))
        pair = record["paired_db"][f"{ours} - {name}"]
        assert pair["mean"] == pytest.approx(fmean(x - y for x, y in zip(a, b, strict=True)), abs=1e-6)
        assert pair["won"] == sum(x > y for x, y in zip(a, b, strict=True))
        assert pair["mean"] > 3 * pair["standard_error"]


@pytest.mark.parametrize(("mode", "density"), CASES)
def test_the_plan_was_chosen_by_its_replay_on_calibration_clips(mode: str, density: float) -> None:
    way = record_of(mode)["searches"][f"video_mixture {density}"]
    assert way["weighting"] == min(way["log10_error"], key=lambda name: way["log10_error"][name])
    assert way["log10_error"][way["weighting"]] < way["log10_error"]["range^0 layer^0 rest^0"]
