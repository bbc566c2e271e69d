"""The whole corridor through the command line, on the embedded model at short lengths."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest
import torch
from transformers import AutoModelForCausalLM

from sparsesearch.block_mask import BlockGrid
from sparsesearch.cost import load_cost_model
from sparsesearch.cost.table import TableCostModel
from sparsesearch.evaluate import Metrics
from sparsesearch.plan import Plan, uniform_plan
from sparsesearch.presets import preset_path
from sparsesearch.profiling.record import Profile
from sparsesearch.rules import LengthLaw
from sparsesearch.rules.pooled_topk import PooledTopk

EVAL = ("--lengths", "256", "--num-sequences", "6", "--num-needles", "4")


@pytest.fixture(scope="module")
def metrics(corridor: Path, run_json: Any) -> dict[str, Any]:
    """What eval prints for the shared plan; the file is kept beside it."""
    out = corridor / "metrics.json"
    return dict(run_json("eval", corridor / "plan.json", *EVAL, "--timing-rounds", "1", "-o", out))


def test_a_profile_says_what_was_measured(corridor: Path) -> None:
    manifest = Profile.load(corridor / "profile").manifest
    assert manifest.lengths == (160, 256)
    assert len(manifest.candidates) == 8
    assert manifest.base_model.name_or_path == "needle-7m"


def test_search_keeps_every_budget_and_prints_what_it_wrote(corridor: Path, run_json: Any, tmp_path: Path) -> None:
    out, front = tmp_path / "plan.json", tmp_path / "front.csv"
    found = run_json("search", corridor / "profile", "--budget", "density=30%", "-o", out, "--pareto", front)
    plan = Plan.load(out)
    assert found["sha256"] == plan.sha256
    assert sum(found["rules"].values()) == 64
    assert found["gap"] <= 1e-4
    (budget,) = found["budgets"]
    assert budget["bound"] == 0.3
    assert set(budget["predicted"]) == {"160", "256"}
    assert max(budget["predicted"].values()) <= 0.3
    losses = [float(row["loss"]) for row in csv.DictReader(front.read_text().splitlines())]
    assert len(losses) >= 20
    assert losses == sorted(losses, reverse=True), "more budget never loses more"


def test_the_same_search_writes_the_same_bytes(corridor: Path, run: Any, tmp_path: Path) -> None:
    run("search", corridor / "profile", "--budget", "density=0.35", "-o", tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (corridor / "plan.json").read_bytes()


def test_cache_budget_per_kv_group(corridor: Path, run_json: Any, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    found = run_json("search", corridor / "profile", "--budget", "kv_fraction=0.5", "--unit", "kv_group", "-o", out)
    assert max(found["budgets"][0]["predicted"].values()) <= 0.5
    plan, grid = Plan.load(out), BlockGrid(256, 256, 32)
    for module in plan.base_model.modules:
        kept = [rule.kept_tokens(grid) for rule in plan.module_rules(module)]
        assert kept[::2] == kept[1::2], "two query heads share a KV head's cache"


def test_latency_budget_through_the_shipped_cpu_table(corridor: Path, run_json: Any, tmp_path: Path) -> None:
    budget = ("--budget", "latency=0.7x", "--device", "cpu")
    found = run_json("search", corridor / "profile", *budget, "-o", tmp_path / "plan.json")
    (record,) = found["budgets"]
    assert record["cost_model"] == "cpu"
    assert max(record["predicted"].values()) <= 0.7


def test_several_budgets_hold_together(corridor: Path, run_json: Any, tmp_path: Path) -> None:
    budgets = ("--budget", "density=0.5", "--budget", "kv_fraction=0.6", "--unit", "kv_group")
    found = run_json("search", corridor / "profile", *budgets, "-o", tmp_path / "plan.json")
    assert {record["metric"]: record["bound"] for record in found["budgets"]} == {"density": 0.5, "kv_fraction": 0.6}
    assert all(max(record["predicted"].values()) <= record["bound"] for record in found["budgets"])


def test_a_refined_plan_is_never_worse_than_the_search_on_what_was_replayed(
    corridor: Path, run: Any, tmp_path: Path
) -> None:
    out = tmp_path / "refined.json"
    chosen = ("--refine-on", "text", "--refine-sequences", "3")
    run("search", corridor / "profile", "--budget", "density=0.35", "--refine", "2", *chosen, "-o", out)
    assert Plan.load(out).provenance["refined_on"].startswith("text, calibration, 3 x ")
    trials = Plan.load(out).provenance["refinement"]
    assert trials[0]["origin"] == "search"
    accepted = [trial["objective"] for trial in trials if trial["accepted"]]
    assert accepted[0] == trials[0]["objective"]
    assert accepted == sorted(accepted, reverse=True)


def test_apply_then_verify_then_load(corridor: Path, run: Any, run_json: Any, tmp_path: Path) -> None:
    out = tmp_path / "patched"
    written = run_json("apply", corridor / "plan.json", "needle-7m", "-o", out)
    plan = Plan.load(corridor / "plan.json")
    assert written["plan_sha256"] == plan.sha256
    assert written["rules"] == plan.kind_counts()
    found = run_json("verify", out)
    assert found["problems"] == []
    assert found["prefill_error"] <= found["tolerance"]
    assert found["heads_patched"] == 64 - plan.kind_counts().get("dense", 0)
    ids, dense_path = torch.arange(200)[None] + 5, preset_path("models", "needle-7m")
    with torch.no_grad():
        patched, dense = (AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (out, dense_path))
    assert not torch.equal(patched, dense), "the checkpoint runs its plan"
    assert "is sound" in run("verify", out).stdout


def test_the_gate_compares_a_patched_checkpoint_with_dense(corridor: Path, run_json: Any, tmp_path: Path) -> None:
    """It carries the plan: taken as the dense model, it would differ from itself in nothing, and pass."""
    run_json("apply", corridor / "plan.json", "needle-7m", "-o", tmp_path / "patched")
    gate = (
        "check",
        corridor / "plan.json",
        "--lengths",
        "160",
        "--num-sequences",
        "3",
        "--num-needles",
        "1",
        "--max-kl",
        "1e-4",
    )
    base, patched = (run_json(*gate, "--model", model, code=4) for model in ("needle-7m", tmp_path / "patched"))
    assert patched == base


def test_verify_finds_weights_that_changed(corridor: Path, run: Any, tmp_path: Path) -> None:
    run("apply", corridor / "plan.json", "needle-7m", "-o", tmp_path / "patched")
    weights = tmp_path / "patched" / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-20000:] = bytes(20000)
    weights.unlink()  # a hard link to the base
    weights.write_bytes(changed)
    result = run("verify", tmp_path / "patched", code=1)
    assert "is NOT sound" in result.stdout
    assert "not those the plan was made for" in result.stderr


def test_eval_measures_dense_and_plan(corridor: Path, metrics: dict[str, Any]) -> None:
    cells = metrics["results"]["256"]
    assert set(cells) == {"dense", "plan"}
    assert cells["dense"]["kl_text"]["mean"] == 0
    assert cells["plan"]["kl_text"]["mean"] > 0
    assert cells["plan"]["prefill_s"] > 0
    assert cells["plan"]["density"] <= 0.35
    assert metrics["model"] == "needle-7m", "a name, not a path of this machine"
    assert Metrics.load(corridor / "metrics.json").model_dump(mode="json") == metrics


def test_eval_of_several_plans_names_them_by_file(corridor: Path, run: Any, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    run("search", corridor / "profile", "--budget", "density=0.6", "-o", other)
    shown = run("eval", corridor / "plan.json", other, "--num-sequences", "3", "--timing-rounds", "0").stdout
    assert all(name in shown for name in ("dense", "plan", "other"))
    assert all(f"{length} tokens, 3 sequences" in shown for length in (160, 256)), "the plans' lengths, however short"


def test_what_the_devices_own_cost_model_does_not_know_is_said_and_not_predicted(
    corridor: Path, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rule of one's own is judged before anybody has calibrated it; a cost model that was asked for must know it."""
    known = load_cost_model("cpu")
    assert isinstance(known, TableCostModel)
    without = replace(known, table=known.table.model_copy(update={"estimators": {}}))
    monkeypatch.setattr("sparsesearch.cost.shipped.shipped_for", lambda _: without)
    monkeypatch.setattr("sparsesearch.cost.load_cost_model", lambda _: without)
    chooses, info = PooledTopk(keep=LengthLaw(b=0.4)), Plan.load(corridor / "plan.json").base_model
    uniform_plan(info, chooses, block_tokens=32, lengths_tokens=(160,)).save(tmp_path / "own.json")
    arguments = ("eval", tmp_path / "own.json", "--num-sequences", "1", "--timing-rounds", "1")
    shown = run(*arguments)
    assert "plan" in shown.stdout
    assert "nothing is predicted: cost model cpu must know what 'pooled_topk' costs" in shown.stderr
    assert "sparsesearch calibrate" in run(*arguments, "--cost-model", "cpu", code=1).stderr


@pytest.mark.usefixtures("metrics")
def test_check_passes_against_its_own_baseline(corridor: Path, run: Any, run_json: Any, tmp_path: Path) -> None:
    gate = ("--baseline", corridor / "metrics.json", "--recovery", "0.5", *EVAL[2:])
    found = run_json("check", corridor / "plan.json", *gate)
    assert found["passed"]
    assert len(found["rows"]) == 6
    result = run("check", corridor / "plan.json", *gate, "--annotations", "--junit", tmp_path / "junit.xml")
    assert "::notice file=" in result.stdout
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot().find("testsuite")
    assert suite is not None
    assert suite.get("failures") == "0"


@pytest.mark.usefixtures("metrics")
def test_check_fails_a_deliberately_worse_plan(corridor: Path, run: Any, run_json: Any, tmp_path: Path) -> None:
    worse = tmp_path / "worse.json"
    run("search", corridor / "profile", "--budget", "density=0.05", "-o", worse)
    gate = ("check", worse, "--baseline", corridor / "metrics.json", "--recovery", "0.95", *EVAL[2:])
    result = run(*gate, "--annotations", "--junit", tmp_path / "junit.xml", code=4)
    assert "REGRESSED" in result.stdout
    assert "::error file=" in result.stdout
    assert "bounds do not hold" in result.stderr
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot().find("testsuite")
    assert suite is not None
    assert int(str(suite.get("failures"))) >= 3
    found = run_json(*gate, code=4)
    assert not found["passed"]
    assert {"KL to dense"} <= {row["figure"] for row in found["rows"] if row["verdict"] == "REGRESSED"}


@pytest.mark.usefixtures("metrics")
def test_report_is_one_page_that_needs_no_network(corridor: Path, run: Any, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    run("report", corridor / "plan.json", corridor / "metrics.json", "--profile", corridor / "profile", "-o", page)
    text = page.read_text()
    assert text.lstrip().lower().startswith("<!doctype html>")
    assert "<svg" in text
    assert not any(mark in text for mark in ("src=\"http", "href=\"http", "url(http", "@import"))  # fmt: skip


@pytest.mark.usefixtures("metrics")
def test_report_refuses_the_metrics_of_another_plan(corridor: Path, run: Any, tmp_path: Path) -> None:
    other, page = tmp_path / "other.json", tmp_path / "report.html"
    run("search", corridor / "profile", "--budget", "density=0.6", "-o", other)
    told = " ".join(run("report", other, corridor / "metrics.json", "-o", page, code=5).stderr.split())
    for plan in (other, corridor / "plan.json"):
        assert Plan.load(plan).sha256[:12] in told
    assert not page.exists()
    judged = Plan.load(corridor / "plan.json").model_copy(update={"quality": {"recorded": "afterwards"}})
    judged.save(tmp_path / "judged.json")
    run("report", tmp_path / "judged.json", corridor / "metrics.json", "-o", page)


def test_diff_counts_heads(corridor: Path, run: Any, run_json: Any, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    run("search", corridor / "profile", "--budget", "density=0.6", "-o", other)
    found = run_json("diff", corridor / "plan.json", other)
    a, b = Plan.load(corridor / "plan.json"), Plan.load(other)
    differing = sum(x != y for (_, _, x), (_, _, y) in zip(a.heads(), b.heads(), strict=True))
    assert len(found["changes"]) == differing > 0
    assert f"{differing} of 64 heads differ" in run("diff", corridor / "plan.json", other).stdout
    assert "the plans run the same: all 64 heads" in run("diff", other, other).stdout


def test_explain_plan_and_head(corridor: Path, run: Any, run_json: Any) -> None:
    plan = Plan.load(corridor / "plan.json")
    whole = run_json("explain", corridor / "plan.json")
    assert dict(whole["kinds"]) == plan.kind_counts()
    head = run_json("explain", corridor / "plan.json", "model.layers.3.self_attn:7", "--profile", corridor / "profile")
    assert head["rule"] == plan.rule("model.layers.3.self_attn", 7).label
    assert len(head["alternatives"]) == 8
    assert sum(one["chosen"] for one in head["alternatives"]) == 1
    shown = run("explain", corridor / "plan.json", "3:7", "--profile", corridor / "profile").stdout
    assert head["rule"] in shown
    assert "alternatives" in shown


@pytest.mark.parametrize(("artifact", "name"), [("plan", "plan.json"), ("metrics", "metrics.json")])
@pytest.mark.usefixtures("metrics")
def test_files_satisfy_the_exported_schema(corridor: Path, run: Any, artifact: str, name: str) -> None:
    schema = json.loads(run("schema", artifact).stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    content = json.loads((corridor / name).read_text())
    jsonschema.validate(content, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**content, "surprise": 1}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**content, "format": "other"}, schema)


def test_a_plans_schema_knows_every_rule_and_no_other(corridor: Path, run: Any) -> None:
    schema = json.loads(run("schema", "plan").stdout)
    content = json.loads((corridor / "plan.json").read_text())
    content["rules"]["dense"] = {"kind": "denser"}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, schema)


def test_validate_proxy_prints_a_row_per_proxy(corridor: Path, run_json: Any) -> None:
    found = run_json("validate-proxy", corridor / "profile", "--num-plans", "10", "--num-sequences", "2")
    assert len(found["plans"]) == 10
    assert set(found["tau"]["combined"]) == {"kl_text", "kl_answer", "needle"}
    assert found["tau"]["combined"]["kl_text"] > 0.3, "the proxy ranks plans, even over ten of them"
