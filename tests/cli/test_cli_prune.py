"""Removals through the command line, on the embedded model: profile, search, apply, heal, and what each prints."""

import filecmp
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsesearch.plan import Plan
from sparsesearch.pruning.heal import HealReport
from sparsesearch.runtime.loading import load_model

pytestmark = pytest.mark.slow

STOCK = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert "sparsesearch" not in sys.modules
print(json.dumps(model.generate(torch.arange(5, 15)[None], max_new_tokens=8, do_sample=False).tolist()))
"""


def test_profile_search_apply_heal(run: Any, run_json: Any, tmp_path: Path) -> None:
    profile, plan, out = tmp_path / "profile", tmp_path / "plan.json", tmp_path / "out"
    found = run_json(
        "profile", "needle-7m", "--space", "pruning", "-o", profile, "--lengths", "64", "--num-samples", "2"
    )
    assert found["distance"] == "kl"
    found = run_json("search", profile, "--budget", "params=0.8x", "--refit-samples", "4", "-o", plan)
    (record,) = found["budgets"]
    assert record["predicted"]["1024"] <= 0.8
    assert Plan.load(plan).pruning is not None
    written = run_json("apply", plan, "needle-7m", "-o", out)
    layers = 8 * (2 * 256 * 8 * 32 + 2 * 256 * 4 * 32 + 3 * 256 * 704)
    removed = written["base_parameters"] - written["parameters"]
    assert 0.19 * layers <= removed <= 0.3 * layers
    _require_smaller(out, tmp_path / "dense", removed / written["base_parameters"])
    _require_the_same_again(out, tmp_path / "again")
    run_json("apply", plan, "needle-7m", "--logical", "-o", tmp_path / "zeros")
    stock = subprocess.run(
        [sys.executable, "-c", STOCK, tmp_path / "zeros"], check=True, capture_output=True, text=True
    ).stdout
    assert json.loads(stock) == _generated(tmp_path / "zeros")
    healed = ("--teacher", "needle-7m", "--steps", "2", "--length", "64", "--batch", "1", "--num-sequences", "2")
    healed += ("--generated", "2")
    assert run_json("heal", out, *healed, "-o", tmp_path / "healed")["steps"] == 2
    assert (
        "learned"
        in run(
            "search", profile, "--budget", "params=0.8", "--criterion", "learned", "-o", plan, "--overwrite", code=1
        ).stderr
    )
    infeasible = run("search", profile, "--budget", "params=0.0001x", "-o", tmp_path / "none.json", code=3).stderr
    assert "the smallest feasible value is params=0.00" in " ".join(infeasible.split())
    rate = run("heal", out, "--teacher", "needle-7m", "--learning-rate", "-1", "-o", tmp_path / "no", code=2)
    assert "positive" in rate.stderr


def test_healing_that_held_out_data_contradict_is_said_aloud(run: Any, tmp_path: Path, monkeypatch: Any) -> None:
    found = HealReport(50, 50, {0: 0.2, 50: 0.1}, 0.2, 0.3, 2.0, 2.1, 2.2, -1.0, improved=False)
    monkeypatch.setattr("sparsesearch.pruning.heal.heal_checkpoint", lambda *args, **kwargs: found)
    heal = ("heal", tmp_path / "small", "--teacher", "needle-7m", "-o", tmp_path / "healed")
    told = run(*heal)
    assert "further from its teacher" in " ".join(told.stderr.split())
    assert "warning" not in told.stdout
    record = json.loads(run(*heal, "--json").stdout)
    assert (record["improved"], record["validation"]["50"]) == (False, 0.1)


def _generated(place: Path) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(place)
    found: torch.Tensor = model.generate(torch.arange(5, 15)[None], max_new_tokens=8, do_sample=False)
    assert found.shape == (1, 18)
    return found.tolist()


def _require_smaller(out: Path, dense: Path, share: float) -> None:
    """The whole directory is smaller than the dense model's by the share of parameters that went, within 1 %."""
    model, tokenizer = load_model("needle-7m", dtype="bfloat16")
    model.save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    before, after = (sum(file.stat().st_size for file in place.iterdir()) for place in (dense, out))
    assert 1 - after / before == pytest.approx(share, abs=0.01)


def _require_the_same_again(out: Path, again: Path) -> None:
    """Saved once more, a pruned checkpoint keeps its files and says the same."""
    AutoModelForCausalLM.from_pretrained(out).save_pretrained(again)
    AutoTokenizer.from_pretrained(out).save_pretrained(again)
    for name in ("model.safetensors", "config.json"):
        assert filecmp.cmp(out / name, again / name, shallow=False), name
    assert _generated(out) == _generated(again)
