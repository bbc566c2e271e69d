"""Prices of choosing: measured with few and with many heads, written into a cost model that keeps the rest."""

import json
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from sparsesearch.bench import choosing
from sparsesearch.block_mask import BlockGrid
from sparsesearch.cost.device.fit import fit_estimators
from sparsesearch.cost.device.micro_bench import Bench
from sparsesearch.cost.device.run_plan import HAVE_KERNELS, MANY_HEADS, RunPlan, estimators
from sparsesearch.cost.device.runs import all_runs
from sparsesearch.cost.device.table import DeviceTable
from sparsesearch.cost.device.timing import Timed
from sparsesearch.kernels.device_select import Selector
from sparsesearch.presets import preset_path

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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
    assert after.provenance["choosing"].endswith("vertical_slash")
    assert after.model_copy(update={"estimators": before.estimators, "provenance": before.provenance}) == before


def test_choices_are_measured_where_there_is_no_gpu_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows.json"
    monkeypatch.setattr(
        sys, "argv",
        ["choosing", "--json", str(out), "--tokens", "256", "--kinds", "vertical_slash", "--backend", "triton", "--device", "cpu"],
    )  # fmt: skip
    choosing.main()
    assert [row["heads"] for row in json.loads(out.read_text())] == [8, 64]


class Watched(Bench):
    """Remembers whether each time was taken in a graph."""

    def __init__(self) -> None:
        super().__init__("cpu", "triton", torch.float32, time_share=0.001)
        self.graphs: list[bool] = []

    def time(self, run: Callable[[int], object], *, copies: int = 1, warm_s: float = 0.12, graph: bool = True) -> Timed:
        self.graphs.append(graph)
        return Timed(1e-4, 0.0)


def test_a_calibration_times_choices_in_a_graph_where_the_device_makes_them() -> None:
    """Launched one by one they would show the host's pace: 1.9 ms whatever the length."""
    bench = Watched()
    nothing = {field.name: () for field in fields(RunPlan) if isinstance(getattr(RunPlan(), field.name), tuple)}
    plan = RunPlan(**{**nothing, "estimator_tokens": (256,), "step_blocks": (1, 2)}, peak_side=64)
    rows = [
        (row, graph)
        for row, graph in zip(all_runs(bench, plan), bench.graphs, strict=False)
        if row["group"] == "estimator"
    ]
    in_graph = {(row["name"], row["heads"]) for row, graph in rows if graph}
    assert in_graph == {(kind, heads) for kind in HAVE_KERNELS for heads in (8, MANY_HEADS)}
    assert {row["name"] for row, _ in rows} == set(estimators())


def test_rules_with_kernels_are_those_that_the_selector_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    by_themselves: list[str] = []
    monkeypatch.setattr(Selector, "_by_rule", lambda self, job, *more: by_themselves.append(job.rule.kind))
    grid = BlockGrid(512, 512, 128)
    q, k = torch.randn(1, 512, 16, device=DEVICE), torch.randn(1, 512, 16, device=DEVICE)
    for rule in estimators().values():
        Selector((rule,), grid, 1, DEVICE).choose(q, k, scale=0.25)
    assert set(by_themselves) == set(estimators()) - set(HAVE_KERNELS)


def test_shipped_prices_of_choosing_are_the_devices_and_not_the_hosts() -> None:
    costs = {cost.kind: cost for cost in DeviceTable.load(preset_path("cost_models", "h200")).estimators}
    for kind in HAVE_KERNELS:
        assert costs[kind].seconds(4096, 8) < 3e-4, kind
        assert costs[kind].seconds(65536, 8) > 1.3 * costs[kind].seconds(4096, 8), kind
        assert costs[kind].seconds(4096, 64) < 8 * costs[kind].seconds(4096, 8), kind
