"""The first command a user runs, with as little evaluation as it allows."""

import signal
from pathlib import Path
from typing import Any

import pytest

from sparsesearch import quickstart
from sparsesearch.artifacts import sha256_file
from sparsesearch.evaluate import Metrics
from sparsesearch.plan import Plan
from sparsesearch.presets import preset_path


@pytest.mark.slow
@pytest.mark.usefixtures("heeded")
def test_quickstart_leaves_everything_and_says_what_it_found(
    run_json: Any, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quickstart, "TIMED_LENGTH_TOKENS", 512)  # 4096 take half a minute
    out = tmp_path / "quickstart"
    with monkeypatch.context() as patch:
        patch.setattr(quickstart, "refine", lambda *_, **__: signal.raise_signal(signal.SIGINT))
        assert "interrupted" in run("quickstart", "-o", out, "--evaluations", "0", code=130).stderr
    assert (out / "profile").exists()
    found = run_json("quickstart", "-o", out, "--evaluations", "0", "--num-sequences", "1")
    variants = {"dense", "uniform_window", "plan"}
    for figure in ("needle_accuracy", "heldout_loss", "kl_to_dense", "prefill_s"):
        assert set(found[figure]) == variants, figure
    assert found["density"] <= 0.26, "dynamic rules choose at run time, so the share is measured, not exact"
    assert found["density_uniform_window"] >= 0.25
    assert found["gap"] <= 1e-4
    assert found["kl_to_dense"]["dense"] == 0
    assert found["kl_to_dense"]["plan"] < found["kl_to_dense"]["uniform_window"]
    assert found["num_sequences"] == 1
    assert "shipped reference profile" in found["profile"], "what was not measured here is said"

    plan = Plan.load(out / "sparse_plan.json")
    assert plan.quality["kl_to_dense"] == found["kl_to_dense"]
    assert set(Metrics.load(out / "metrics.json").plans) == variants - {"dense"}
    assert "<svg" in (out / "report.html").read_text()
    reference = preset_path("profiles", "needle-7m")
    for file in reference.iterdir():
        assert sha256_file(out / "profile" / file.name) == sha256_file(file)
    assert run_json("verify", out / "patched")["problems"] == []
    assert "holds report.html" in run("quickstart", "-o", out, code=1).stderr
