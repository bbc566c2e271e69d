"""The plan: what it may say, what is refused, and that it comes back byte for byte."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from sparsesearch.artifacts import write_json
from sparsesearch.block_mask import BlockGrid
from sparsesearch.errors import ArtifactError, SpecError
from sparsesearch.evaluate import Metrics
from sparsesearch.plan import FORMAT, SCHEMA_VERSION, BaseModelInfo, Plan, uniform_plan
from sparsesearch.rules import LengthLaw, rule_kinds
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.sink_window import SinkWindow
from sparsesearch.rules.zero import Zero
from sparsesearch.runtime.fingerprint import describe

GOLDEN = Path(__file__).parent / "golden" / "v1"
INFO = BaseModelInfo(
    name_or_path="two-layers",
    model_type="llama",
    modules=("layers.0.attn", "layers.1.attn"),
    num_heads=(4, 2),
    num_kv_heads=(2, 1),
    head_dim=(16, 32),
)
WINDOW = SinkWindow(sink=64, window=LengthLaw(a=128, b=0.25))


def small(**changes: Any) -> Plan:
    content = {
        "base_model": INFO,
        "block_tokens": 64,
        "unit": "query_head",
        "lengths_tokens": (1024,),
        "rules": {rule.label: rule for rule in (Dense(), Zero(), WINDOW)},
        "assignments": {"layers.1.attn": (WINDOW.label, "zero")},
        **changes,
    }
    return Plan.model_validate(content)


def every_rule() -> Plan:
    """One head per example of every rule."""
    rules = {rule.label: rule for kind in rule_kinds().values() if not kind.reuses for rule in kind.examples()}
    info = INFO.model_copy(update={"modules": ("attn",), "num_heads": (len(rules),), "num_kv_heads": (1,), "head_dim": (8,)})  # fmt: skip
    return small(base_model=info, rules=rules, assignments={"attn": tuple(rules)})


def test_heads_without_an_assignment_are_dense() -> None:
    plan = small()
    assert plan.rule("layers.0.attn", 3) == Dense()
    assert plan.rule("layers.1.attn", 0) == WINDOW
    assert plan.module_rules("layers.1.attn") == (WINDOW, Zero())
    assert plan.kind_counts() == {"dense": 4, "sink_window": 1, "zero": 1}
    assert [(module, head) for module, head, _ in plan.heads()] == [
        *(("layers.0.attn", head) for head in range(4)),
        *(("layers.1.attn", head) for head in range(2)),
    ]


@pytest.mark.parametrize("plan", [small(), every_rule()], ids=["small", "every rule"])
def test_a_saved_plan_comes_back(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert again.sha256 == plan.sha256
    assert [type(rule) for _, _, rule in again.heads()] == [type(rule) for _, _, rule in plan.heads()]
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "plan.json").read_bytes()
    assert Plan.from_dict(plan.to_dict(), source="memory") == plan


def test_the_digest_tells_plans_apart_and_ignores_order() -> None:
    plan = small()
    turned = small(rules=dict(reversed(plan.rules.items())))
    assert turned.sha256 == plan.sha256
    assert small(block_tokens=32).sha256 != plan.sha256
    assert small(assignments={}).sha256 != plan.sha256


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"assignments": {"layers.2.attn": ("zero",)}}, "assignments name module 'layers.2.attn', which base_model"),
        ({"assignments": {"layers.1.attn": ("zero",)}}, "must have 2 rules, one per query head, but has 1"),
        ({"assignments": {"layers.1.attn": ("zero", "none")}}, "names rule 'none', which `rules` lacks"),
        ({"block_tokens": 0}, "block_tokens must be greater than or equal to 1, but got 0"),
        ({"unit": "head"}, "unit must be 'query_head' or 'kv_group'"),
        ({"surprise": 1}, "there is no 'surprise'"),
        ({"blok_tokens": 1}, "Did you mean 'block_tokens'"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused_with_its_file(
    changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    write_json(tmp_path / "plan.json", {**small().to_dict(), **changes}, format=FORMAT, schema_version=SCHEMA_VERSION)
    with pytest.raises(ArtifactError, match=r"plan\.json: .*Make the plan again") as caught:
        Plan.load(tmp_path / "plan.json")
    assert sentence in str(caught.value)


def test_an_unknown_rule_is_refused_with_a_hint() -> None:
    content = small().to_dict()
    content["rules"]["zero"] = {"kind": "zeros"}
    with pytest.raises(SpecError, match=r"^here: .*unknown rule kind 'zeros'\. Did you mean 'zero'"):
        Plan.from_dict(content, source="here")


def test_a_missing_field_is_named() -> None:
    content = small().to_dict()
    del content["base_model"]
    with pytest.raises(ArtifactError, match="'base_model' must be given, but is missing"):
        Plan.from_dict(content, source="here")


def test_the_uniform_plan_gives_every_head_one_rule() -> None:
    plan = uniform_plan(INFO, WINDOW, block_tokens=64, lengths_tokens=(1024, 2048))
    assert {rule for _, _, rule in plan.heads()} == {WINDOW}
    assert plan.kind_counts() == {"sink_window": 6}


def test_plans_are_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        small().block_tokens = 32  # type: ignore[misc]


def test_a_described_model_has_its_geometry(tiny: Callable[..., PreTrainedModel]) -> None:
    info = describe(tiny("llama"), "tiny")
    assert info.geometry.total_heads == 8
    assert info.num_kv_heads == (2, 2)
    assert describe(tiny("llama"), "tiny").weights_sha256 == info.weights_sha256
    other = tiny("llama")
    with torch.no_grad():
        next(other.parameters()).mul_(1.5)
    assert describe(other, "tiny").weights_sha256 != info.weights_sha256


def test_files_of_the_first_schema_stay_readable(tmp_path: Path) -> None:
    """Frozen files: whoever changes a format must keep these readable or raise the major version."""
    plan = Plan.load(GOLDEN / "sparse_plan.json")
    assert plan.kind_counts() == {"dense": 1, "fixed_blocks": 1, "mean_value": 1, "pooled_topk": 1, "sink_window": 2, "vertical_slash": 1, "zero": 1}  # fmt: skip
    assert plan.certificate is not None
    assert plan.budgets[0].metric == "density"
    grid = BlockGrid(200, 200, plan.block_tokens)
    for _, _, rule in plan.heads():
        if not rule.dynamic:
            assert rule.select(grid).shape == (4, 4)
    metrics = Metrics.load(GOLDEN / "metrics.json")
    assert metrics.variants == ("dense", "plan")
    shutil.copy(GOLDEN / "sparse_plan.json", tmp_path / "plan.json")
    plan.save(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads((tmp_path / "plan.json").read_text())
