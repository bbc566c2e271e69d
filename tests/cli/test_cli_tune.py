"""`tune` and `lint` from the command line: a study is made, joined, and its front written; a plan's defects are named."""

import json
import shutil
from pathlib import Path
from typing import Any

from sparsesearch.plan import Plan
from sparsesearch.rules import LengthLaw
from sparsesearch.rules.sink_window import SinkWindow


def test_a_study_is_made_and_joined(corridor: Path, run: Any, run_json: Any, tmp_path: Path) -> None:
    study = ("-o", tmp_path / "study")
    first = run_json(
        "tune", corridor / "profile", *study, "--trials", "1", "--warm", "1", "--num-sequences", "4", "--name", "both",
        "--densities", "0.35,0.6",
    )  # fmt: skip
    again = run_json("tune", "--join", "both", *study, "--trials", "2")
    assert first["trials"] == {"complete": 1}
    assert sum(again["trials"].values()) == 2  # a worker draws by its process: the second may be stopped early
    assert set(again["trials"]) <= {"complete", "pruned"}
    assert [row["origin"] for row in first["front"]] == ["exact front"]
    plans = sorted((tmp_path / "study").glob("*.json"))
    assert plans
    assert all(Plan.load(path).unit == "query_head" for path in plans)
    shutil.copytree(corridor / "profile", tmp_path / "copy")
    joined = run_json("tune", tmp_path / "copy", "--join", "both", *study, "--trials", "2", "--workers", "2")
    assert joined["trials"] == again["trials"]
    refused = run("tune", tmp_path, "--join", "both", *study, "--trials", "2", code=1)
    assert "must be a profile directory" in " ".join(refused.stderr.split())
    result = run("tune", "--join", "other", *study, "--trials", "2", code=1)
    assert "it holds both" in " ".join(result.stderr.split())


def test_defects_of_a_plan_are_named(corridor: Path, run: Any, tmp_path: Path) -> None:
    """A law that is negative where the plan is for: exit 1, one finding, on stdout as JSON too."""
    assert "no findings" in run("lint", corridor / "plan.json").stdout
    plan = Plan.load(corridor / "plan.json")
    cut = SinkWindow(sink=64, window=LengthLaw(a=-500, b=1.0))
    module = plan.base_model.modules[0]
    assignments = plan.assignments | {module: (cut.label,) * len(plan.assignments[module])}
    used = {name for names in assignments.values() for name in names}
    rules = {name: rule for name, rule in {**plan.rules, cut.label: cut}.items() if name in used}
    plan.model_copy(update={"assignments": assignments, "rules": rules}).save(tmp_path / "bad.json")
    assert "must not be negative" in " ".join(run("lint", tmp_path / "bad.json", code=1).stdout.split())
    (finding,) = json.loads(run("lint", tmp_path / "bad.json", "--json", code=1).stdout)["findings"]
    assert finding["check"] == "length_law"
