"""What the README tells a reader to type works as it stands there."""

import importlib.util
import re
import runpy
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from pydantic import Field

import sparsesearch
from sparsesearch.block_mask import BlockGrid
from sparsesearch.evaluate import Metrics
from sparsesearch.presets import preset_path
from sparsesearch.profiling.record import Profile
from sparsesearch.rules import Rule

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def block(start: str) -> str:
    """The fenced Python block that holds a text."""
    (found,) = (code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if start in code)
    return str(found)


def test_the_python_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needle_7m: Any) -> None:
    """Paths are strings there, as readers write them."""
    sparsesearch.Plan.load(str(preset_path("profiles", "needle-7m-plan"))).save(str(tmp_path / "plan.json"))
    sparsesearch.export(sparsesearch.Plan.load(str(tmp_path / "plan.json")), "needle-7m", str(tmp_path / "patched"))
    monkeypatch.chdir(tmp_path)
    prompt = "torch.arange(200)[None], max_new_tokens=2, do_sample=False"
    script = tmp_path / "reader.py"
    script.write_text(block("from_pretrained").replace("...", prompt))
    names = runpy.run_path(str(script), {"dense_model": needle_7m, "torch": torch})
    assert names["model"].config.attn_implementation == "sparsesearch"


def test_profiles_and_metrics_open_by_a_string() -> None:
    assert Profile.load(str(preset_path("profiles", "needle-7m"))).manifest.lengths
    assert Metrics.load(str(preset_path("profiles", "needle-7m-metrics"))).lengths_tokens


def test_the_rule_recipe_is_a_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rule, "registry", dict(Rule.registry))
    file = tmp_path / "dilated.py"  # a rule is named by its file
    file.write_text(block("class Dilated"))
    spec = importlib.util.spec_from_file_location("sparsesearch.rules.dilated", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    module.__dict__.update(ClassVar=ClassVar, Literal=Literal, Field=Field, Rule=Rule)  # what every rule file imports
    spec.loader.exec_module(module)
    rule = Rule.registry["dilated"].examples()[1]
    assert rule.label == "dilated(step=3)"
    grid = BlockGrid(200, 330, 32)
    kept = rule.select(grid)
    for row in range(grid.num_q_blocks):
        own = row + grid.first_q_block
        assert kept[row].nonzero().flatten().tolist() == [j for j in range(own + 1) if (own - j) % 3 == 0]
