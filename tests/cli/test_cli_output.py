"""What the commands print: pure JSON on request, tables that fit the terminal, listings, options from a file."""

import importlib
import json
import re
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.cells import cell_len

from sparsesearch.plan import Plan
from sparsesearch.presets import preset_names
from sparsesearch.rules import rule_kinds
from sparsesearch.runtime.families import supported_families


def test_rules_lists_every_rule_file(run: Any, run_json: Any) -> None:
    listed = run_json("rules")
    assert [row["kind"] for row in listed] == sorted(rule_kinds())
    assert all(row["source"] and row["what"] for row in listed)
    shown = run("rules").stdout
    assert all(kind in shown for kind in rule_kinds())


def test_spaces_lists_every_shipped_space(run: Any, run_json: Any) -> None:
    listed = run_json("spaces")
    assert [row["name"] for row in listed] == preset_names("search_spaces")
    assert all(row["candidates"] > 1 or row["removals"] for row in listed)
    assert "duo_attention" in run("spaces").stdout


def test_models_lists_the_embedded_model_and_families(run: Any, run_json: Any) -> None:
    assert run_json("models") == {"embedded": preset_names("models"), "families": list(supported_families())}
    assert "llama" in run("models").stdout


def test_doctor_names_versions_and_what_is_missing(run: Any, run_json: Any) -> None:
    found = run_json("doctor")
    assert {"sparsesearch", "torch", "transformers", "gpu"} <= set(found)
    assert "torch" in run("doctor").stdout


@pytest.mark.parametrize("artifact", ["plan", "metrics", "rules"])
def test_schema_is_json(run: Any, artifact: str) -> None:
    assert isinstance(json.loads(run("schema", artifact).stdout), dict)


def test_dry_run_says_what_it_takes_and_writes_nothing(run: Any, run_json: Any, tmp_path: Path) -> None:
    command = ("profile", "needle-7m", "--lengths", "256,1024", "--dry-run", "-o", tmp_path / "profile")
    small = run_json(*command)
    large = run_json(*command, "--num-samples", "24")
    assert small["parameters"] == 6951168
    assert small["lengths_tokens"] == [256, 1024]
    assert large["disk_mib"] == pytest.approx(4 * small["disk_mib"], rel=0.1)
    assert large["time_s_on_this_cpu"] > small["time_s_on_this_cpu"] > 0
    shown = run(*command)
    assert "peak memory mib" in shown.stdout
    assert not shown.stderr, "seconds of work need no advice"
    assert "hours: run it on a GPU" in run(*command, "--num-samples", "100000").stderr
    assert not (tmp_path / "profile").exists()


def test_version_of_options_in_a_file(corridor: Path, run: Any, tmp_path: Path) -> None:
    """--config gives defaults, --set wins over it, the command line over both."""
    config = tmp_path / "options.yaml"
    config.write_text(yaml.safe_dump({"search": {"budget": ["density=0.6"], "unit": "kv_group", "answer-weight": 3}}))
    search = ("search", corridor / "profile")

    run("--config", config, *search, "-o", tmp_path / "file.json")
    plan = Plan.load(tmp_path / "file.json")
    assert (plan.budgets[0].bound, plan.unit, plan.provenance["answer_weight"]) == (0.6, "kv_group", 3.0)

    run("--config", config, "--set", "search.budget=density=0.5", *search, "-o", tmp_path / "set.json")
    assert Plan.load(tmp_path / "set.json").budgets[0].bound == 0.5

    command = ("--config", config, "--set", "search.budget=density=0.5", *search, "--budget", "density=0.4")
    run(*command, "--unit", "query_head", "-o", tmp_path / "line.json")
    plan = Plan.load(tmp_path / "line.json")
    assert (plan.budgets[0].bound, plan.unit, plan.provenance["answer_weight"]) == (0.4, "query_head", 3.0)


def test_a_list_in_the_file_is_what_commas_are_on_the_command_line(run: Any, tmp_path: Path) -> None:
    config = tmp_path / "options.yaml"
    config.write_text("profile:\n  lengths: [256, 1024]\n  dry_run: true\n  json: true\n")
    found = json.loads(run("--config", config, "profile", "needle-7m").stdout)
    assert found["lengths_tokens"] == [256, 1024]


@pytest.mark.parametrize("columns", [80, 120])
def test_tables_fit_the_terminal(corridor: Path, run: Any, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for command in (
        ("rules",),
        ("spaces",),
        ("explain", corridor / "plan.json"),
        ("explain", corridor / "plan.json", "0:0", "--profile", corridor / "profile"),
        ("diff", corridor / "plan.json", corridor / "plan.json"),
    ):
        assert max(cell_len(line) for line in run(*command).stdout.splitlines()) <= columns


@pytest.mark.parametrize(
    "command", ["", "quickstart", "profile", "search", "check", "eval", "apply", "verify", "report", "calibrate"]
)
def test_every_option_has_help(run: Any, command: str) -> None:
    """An option without a description is followed by the next option or by nothing."""
    text = run(*command.split(), "--help").stdout
    options = text[text.index("Options:") :].splitlines()[1:]
    for line, following in zip(options, [*options[1:], ""], strict=True):
        if line.strip().startswith("--"):
            described = len(line.strip().split("  ", 1)) > 1 or (following and not following.strip().startswith("-"))
            assert described, line


def test_options_for_one_purpose_stand_under_a_heading(run: Any) -> None:
    options, *headed = re.split(r"\n\n(?=\S[^\n]*:\n)", run("search", "--help").stdout.split("Options:")[1])
    named = {part.partition(":\n")[0]: set(re.findall(r"^  (--[a-z-]+)", part, re.MULTILINE)) for part in headed}
    assert named["For diffusers pipelines"] == {"--max-ranges"}
    assert named["For plans that remove"] == {"--criterion", "--refit-samples", "--uniform", "--lengths"}
    assert "--budget" in options
    assert "--workload" not in options


def test_calibrate_writes_a_cost_model_that_search_can_use(corridor: Path, run: Any, tmp_path: Path) -> None:
    out = tmp_path / "here.json"
    shown = run("calibrate", "--quick", "-o", out).stdout
    assert "tiles" in shown
    plan = tmp_path / "plan.json"
    run("search", corridor / "profile", "--budget", "latency=0.8", "--device", out, "-o", plan)
    assert max(Plan.load(plan).budgets[0].predicted.values()) <= 0.8
    refused = run("calibrate", "--device", "cuda", "-o", tmp_path / "gpu.json", code=1)
    assert "roofline" in refused.stderr


def test_a_missing_extra_is_named(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    needs_it = ("diffusers.", "sparsesearch.quickstart_video", "sparsesearch.runtime.diffusion.")
    for name in [name for name in sys.modules if name.startswith(needs_it)]:
        monkeypatch.delitem(sys.modules, name)
    result = run("quickstart", "--video", "-o", str(tmp_path / "out"), code=1)
    assert "pip install 'sparsesearch[diffusers]'" in result.stderr


def test_a_log_gets_a_line_of_progress_every_half_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a terminal hours of work are not silent, and seconds of work are."""
    (script,) = entry_points(group="console_scripts", name="sparsesearch")
    render = importlib.import_module(script.module.replace(".main", ".render"))
    clock = iter([0.0, 0.0, 20.0, 32.0, 40.0, 70.0])
    monkeypatch.setattr(render, "monotonic", lambda: next(clock))
    with render.progress_bar() as progress:
        for done in (0, 1, 2, 3):
            progress("score", done, 10)
        progress("merge [2]", 5, 5)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == ["score: 2 of 10 after 32 s, about 128 s left", "merge [2]: 5 of 5 after 0 s"]
