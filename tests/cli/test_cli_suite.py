"""Tasks and streamed profiles on the command line."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparsesearch.evaluate import Metrics

SMALL = (
    "--lengths",
    "300",
    "--num-sequences",
    "3",
    "--num-needles",
    "2",
    "--timing-rounds",
    "0",
    "--task-sequences",
    "2",
)


@pytest.mark.slow
def test_eval_and_check_task_by_task(run: Any, run_json: Any, corridor: Path, tmp_path: Path) -> None:
    plan, metrics = corridor / "plan.json", tmp_path / "metrics.json"
    shown = run("eval", plan, *SMALL, "--suite", "needle,tracking", "--format", "sentence", "-o", metrics).stdout
    assert "retained" in shown
    assert "format sentence" in shown
    found = Metrics.load(metrics)
    assert found.suite is not None
    assert list(found.tasks[300]) == list(found.suite.tasks) == ["needle", "tracking"]
    checked = run_json(
        "check", plan, "--baseline", metrics, "--num-sequences", "2", "--num-needles", "2", "--recovery", "0.01"
    )
    assert {"task needle", "task tracking"} <= {row["figure"] for row in checked["rows"]}


def test_dense_alone_needs_a_model(run: Any, run_json: Any) -> None:
    assert "--model" in run("eval", *SMALL, code=2).stderr
    found = run_json("eval", "--model", "needle-7m", *SMALL, "--suite", "needle")
    assert list(found["tasks"]["300"]["needle"]) == ["dense"]


def test_refusals(run: Any, corridor: Path) -> None:
    assert "multikey" in run("eval", corridor / "plan.json", *SMALL, "--suite", "multikei", code=1).stderr
    options = ("--space", corridor / "space.yaml", "--stream", "--device-map", "auto")
    assert "--device-map" in run("profile", "needle-7m", *options, code=2).stderr
    assert "GGUF" in run("profile", "weights.gguf", "--space", corridor / "space.yaml", "--stream", code=1).stderr


def test_tasks_are_listed(run: Any, run_json: Any) -> None:
    listed = run_json("tasks")
    assert "kv_recall" in listed["suites"]["retrieval"]
    assert "kv_recall" in run("tasks").stdout


@pytest.mark.slow
def test_a_streamed_profile_is_the_resident_one(run: Any, corridor: Path, tmp_path: Path) -> None:
    options = ("--space", corridor / "space.yaml", "--lengths", "160,256", "--num-samples", "2", "--num-probes", "1")
    run("profile", "needle-7m", *options, "--stream", "-o", tmp_path / "streamed")
    for length in (160, 256):
        truth = load_file(corridor / "profile" / f"scores-{length}.safetensors")
        found = load_file(tmp_path / "streamed" / f"scores-{length}.safetensors")
        assert found.keys() == truth.keys()
        for name, value in truth.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4 * float(value.abs().max()), msg=name)
