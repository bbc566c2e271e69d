"""Removals through the command line, on the embedded model: profile, search, apply, heal, and what each prints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparsesearch.plan import Plan

pytestmark = pytest.mark.slow


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
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.generate(torch.arange(5, 15)[None], max_new_tokens=3).shape == (1, 13)
    healed = ("--teacher", "needle-7m", "--steps", "2", "--length", "64", "--batch", "1", "--num-sequences", "2")
    assert run_json("heal", out, *healed, "-o", tmp_path / "healed")["steps"] == 2
    assert (
        "learned"
        in run(
            "search", profile, "--budget", "params=0.8", "--criterion", "learned", "-o", plan, "--overwrite", code=1
        ).stderr
    )
