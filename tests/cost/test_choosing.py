"""Prices of choosing: measured with few and with many heads, written into a cost model that keeps the rest."""

import json
import sys
from pathlib import Path

import pytest

from sparsesearch.bench import choosing
from sparsesearch.cost.device.fit import fit_estimators
from sparsesearch.cost.device.table import DeviceTable
from sparsesearch.presets import preset_path

ROWS = [
    {
        "group": "estimator",
        "name": "vertical_slash",
        "tokens": tokens,
        "heads": heads,
        "seconds": seconds,
        "spread": 0.0,
    }
    for tokens, heads, seconds in ((4096, 8, 4e-5), (16384, 8, 8e-5), (4096, 64, 9.6e-5), (16384, 64, 3.0e-4))
]


def test_more_heads_take_longer_along_the_measured_line() -> None:
    (cost,) = fit_estimators(ROWS)
    assert cost.seconds(4096, 1) == cost.seconds(4096, 8) == pytest.approx(4e-5)
    assert cost.seconds(4096, 64) == pytest.approx(9.6e-5)
    assert cost.seconds(4096, 72) == pytest.approx(9.6e-5 + 8e-6)
    (few,) = fit_estimators(ROWS[:2])
    assert few.seconds(4096, 16) == pytest.approx(8e-5)


def test_a_cost_model_takes_new_prices_and_keeps_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = DeviceTable.load(preset_path("cost_models", "h200"))
    before.save(tmp_path / "model.json")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    monkeypatch.setattr(
        sys, "argv",
        ["choosing", "--rows", str(tmp_path / "rows.json"), "--json", str(tmp_path / "out.json"), "--update", str(tmp_path / "model.json")],
    )  # fmt: skip
    choosing.main()
    after = DeviceTable.load(tmp_path / "model.json")
    assert {cost.kind for cost in after.estimators} == {cost.kind for cost in before.estimators}
    changed = {cost.kind for cost in after.estimators if cost not in before.estimators}
    assert changed == {"vertical_slash"}
    assert after.model_copy(update={"estimators": before.estimators}) == before


def test_choices_are_measured_where_there_is_no_gpu_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows.json"
    monkeypatch.setattr(
        sys, "argv",
        ["choosing", "--json", str(out), "--tokens", "256", "--kinds", "vertical_slash", "--backend", "triton", "--device", "cpu"],
    )  # fmt: skip
    choosing.main()
    assert [row["heads"] for row in json.loads(out.read_text())] == [8, 64]
