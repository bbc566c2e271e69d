"""`search` for a workload: what is asked on the command line stands in the plan, and what cannot be is refused with exit code 3."""

from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sparsesearch import planning
from sparsesearch.plan import Plan


def test_a_workload_and_budgets_of_every_kind(
    corridor: Path, run_json: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the 120 searches of a whole front take a minute, and so does closing the gap over layers of many rules
    coarse = partial(planning.surface_rows, num_points=3, num_levels=2)
    few = [
        line
        for line in (corridor / "space.yaml").read_text().splitlines()
        if "mean" not in line and "fixed" not in line
    ]
    (tmp_path / "few.yaml").write_text("\n".join(few))
    monkeypatch.setattr(planning, "surface_rows", coarse)
    found = run_json(
        "search", corridor / "profile", "--space", tmp_path / "few.yaml", "--unit", "kv_group", "--device", "cpu",
        "--workload", "prompt=512,generate=32,batch=2,weight=3", "--workload", "prompt=1k",
        "--budget", "density=0.8,memory=60MB", "--budget", "latency=0.95x", "--max-groups-per-layer", "2",
        "--pareto", tmp_path / "front.csv", "-o", tmp_path / "plan.json",
    )  # fmt: skip
    plan = Plan.load(tmp_path / "plan.json")
    assert [(record["metric"], record["bound"]) for record in found["budgets"]] == [
        ("density", 0.8), ("memory", 60e6), ("latency", 0.95),
    ]  # fmt: skip
    assert plan.budgets[1].absolute
    assert set(plan.budgets[1].predicted) == {"512", "1024"}
    assert plan.provenance["workloads"] == [
        "prompt=512,generate=32,batch=2,weight=3",
        "prompt=1024,generate=0,batch=1,weight=1",
    ]
    for module in plan.base_model.modules:
        assert len({plan.rules[name].kind for name in plan.assignments[module]} - {"zero"}) <= 2
    front = pd.read_csv(tmp_path / "front.csv")
    assert {"loss", "lower_bound", "memory_bound", "memory_bytes@512", "latency_s@workload"} <= set(front)


def test_infeasible_combinations_exit_with_3(corridor: Path, run: Any, tmp_path: Path) -> None:
    result = run(
        "search", corridor / "profile", "--unit", "kv_group", "--workload", "prompt=2048",
        "--budget", "density=0.000001,memory=1KB", "-o", tmp_path / "plan.json", code=3,
    )  # fmt: skip
    assert "smallest feasible value" in result.stderr
    assert not (tmp_path / "plan.json").exists()


def test_layers_that_reuse(corridor: Path, run_json: Any, tmp_path: Path) -> None:
    """HyLRA's choice of layers from the command line, for decoded tokens too."""
    found = run_json(
        "search-reuse", corridor / "profile", "--objective", "hylra", "--threshold", "0.3", "--keep", "0.4", "--span", "1",
        "--passes", "1", "--num-samples", "1", "--decode", "-o", tmp_path / "plan.json",
    )  # fmt: skip
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.sha256 == found["sha256"]
    assert set(found["rules"]) == {"dense_source", "reuse"}
    assert len(found["passes"]) == 1
    reusing = [rule for _, _, rule in plan.heads() if rule.reuses]
    assert reusing
    assert all(rule.decodes for rule in reusing)
