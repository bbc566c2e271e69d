"""`sparsesearch convert` on the embedded model, and a converted plan that runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsesearch
from sparsesearch.plan import Plan


def test_a_minference_file_becomes_a_plan_that_runs(run: Any, run_json: Any, tmp_path: Path, needle_7m: Any) -> None:
    heads, layers = needle_7m.config.num_attention_heads, needle_7m.config.num_hidden_layers
    foreign = [{str(head): ["vertical_and_slash", 64, 64, 0.5] for head in range(heads)}] * layers
    (tmp_path / "in.json").write_text(json.dumps(foreign))
    out = tmp_path / "plan.json"
    written = run_json("convert", tmp_path / "in.json", "--from", "minference", "--model", "needle-7m", "-o", out)
    assert written["rules"] == {"vertical_slash": heads * layers}
    ids = torch.randint(0, needle_7m.config.vocab_size, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense = needle_7m(ids).logits
        with sparsesearch.apply(needle_7m, Plan.load(out)):
            sparse = needle_7m(ids).logits
    assert sparse.isfinite().all()
    assert not torch.equal(sparse, dense)
    run("convert", out, "--to", "minference", "-o", tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == foreign


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--from", "minference", "-o", "{tmp}/plan.json"], 1, "name it with --model"),
        (["--from", "minference", "--model", "needle-7m", "-o", "{tmp}/taken.json"], 1, "must not exist yet"),
        (["--from", "minference", "--model", "needle-7m", "-o", "{tmp}/plan.json"], 5, "query heads for needle-7m"),
        (["--from", "mimference", "-o", "{tmp}/plan.json"], 2, "mimference"),
    ],
)
def test_what_is_refused(run: Any, tmp_path: Path, arguments: list[str], code: int, sentence: str) -> None:
    for name in ("in.json", "taken.json"):
        (tmp_path / name).write_text("[{}]")
    result = run("convert", tmp_path / "in.json", *(part.format(tmp=tmp_path) for part in arguments), code=code)
    assert sentence in " ".join(result.stderr.split())
