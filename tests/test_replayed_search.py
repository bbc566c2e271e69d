"""Budgets in seconds hold when the schedule is replayed, on the shipped profile and the measured H200."""

from dataclasses import replace
from functools import cache

import pytest

from sparsesearch import calibration
from sparsesearch.cost import load_cost_model
from sparsesearch.cost.device.model import DeviceCostModel
from sparsesearch.cost.predict import predict
from sparsesearch.errors import BudgetInfeasibleError, SpecError
from sparsesearch.model_shapes import ModelShape, heads_alone
from sparsesearch.plan import Plan
from sparsesearch.planning import Question, find_choice
from sparsesearch.presets import preset_path
from sparsesearch.pricing import shape_of
from sparsesearch.profiling.record import Profile
from sparsesearch.refinement import refine
from sparsesearch.replayed_search import search_plan
from sparsesearch.runtime.loading import load_model
from sparsesearch.search.budget import parse_budgets
from sparsesearch.shapes import ModelGeometry
from sparsesearch.workload import Workload


@cache
def opened() -> tuple[Profile, DeviceCostModel, ModelShape]:
    profile, costs = Profile.load(preset_path("profiles", "needle-7m")), load_cost_model("h200")
    assert isinstance(costs, DeviceCostModel)
    shape = shape_of(profile.manifest.base_model)
    assert shape is not None
    return profile, costs, shape


def question(text: str, workload: Workload, **more: object) -> Question:
    return Question(parse_budgets(text), cost_model=opened()[1], workloads=(workload,), dtype_bytes=2, **more)  # type: ignore[arg-type]


def attention_share(plan: Plan, workload: Workload) -> float:
    """Predicted anew, without the search."""
    _, costs, shape = opened()
    return predict(plan, shape, workload, costs).attention_s / predict(None, shape, workload, costs).attention_s


@pytest.mark.parametrize("bound", [0.4, 0.5, 0.8])
def test_latency_by_replay_keeps_the_budget_and_uses_it(bound: float) -> None:
    profile, _, _ = opened()
    workload = Workload(2048, batch=16)
    plan = search_plan(profile, question(f"latency={bound}x", workload))
    (record,) = plan.budgets
    assert record.replayed["workload"] == pytest.approx(attention_share(plan, workload), rel=1e-9)
    assert 0.97 * bound <= record.replayed["workload"] <= bound * (1 + 1e-9)


@pytest.mark.parametrize("bound", [0.6, 0.9])
def test_on_a_processor_the_calls_keep_the_budget_and_no_head_falls_silent(bound: float) -> None:
    """Priced as a call of its own every window costs more than it saves at 1024 tokens, and only silence would help."""
    profile, _, _ = opened()
    costs = load_cost_model("cpu")
    asked = Question(parse_budgets(f"latency={bound}x"), cost_model=costs, workloads=(Workload(1024),), dtype_bytes=4)
    plan = search_plan(profile, asked)
    (record,) = plan.budgets
    assert 0.97 * bound <= record.replayed["workload"] <= bound * (1 + 1e-9)
    rules = [rule for module in plan.base_model.modules for rule in plan.module_rules(module)]
    assert not any(rule.rest == "zero" for rule in rules)


def test_sums_alone_would_break_the_budget() -> None:
    """Otherwise there would be nothing to correct."""
    profile, _, _ = opened()
    workload = Workload(2048, batch=16)
    asked = question("latency=0.5x", workload)
    plain = search_plan(profile, asked).provenance["replayed_passes"][0]
    assert plain["bounds_moved_by"] == [1.0]
    assert plain["replayed_over_bound"][0] > 1.05


def test_no_layer_is_slower_than_dense() -> None:
    profile, costs, shape = opened()
    for workload in (Workload(2048), Workload(2048, batch=16)):
        plan = search_plan(profile, question("latency=0.95x", workload))
        own, dense = (predict(each, shape, workload, costs).layers for each in (plan, None))
        for mine, theirs in zip(own, dense, strict=True):
            assert mine.attention_s + mine.index_s <= theirs.attention_s * (1 + 1e-9)


def test_both_phases_of_a_whole_model() -> None:
    profile, costs, shape = opened()
    workload = Workload(2048, 64, batch=16)
    plan = search_plan(profile, question("ttft=0.9x,tpot=0.99x", workload, granularity="kv_group", shape=shape))
    own, dense = (predict(each, shape, workload, costs) for each in (plan, None))
    assert own.tpot_s is not None
    assert dense.tpot_s is not None
    assert own.ttft_s <= 0.9 * dense.ttft_s * (1 + 1e-9)
    assert own.tpot_s <= 0.99 * dense.tpot_s * (1 + 1e-9)
    assert plan.budgets[0].replayed["2048"] == pytest.approx(own.ttft_s / dense.ttft_s, rel=1e-9)


def test_a_plan_survives_the_disk(tmp_path: object) -> None:
    profile, _, _ = opened()
    plan = search_plan(profile, question("latency=0.5x", Workload(2048, batch=16)))
    assert Plan.from_dict(plan.to_dict(), source="test") == plan


def test_without_seconds_it_is_the_plain_search() -> None:
    profile, _, _ = opened()
    asked = Question(parse_budgets("density=0.3"))
    plan, (table, solution) = search_plan(profile, asked), find_choice(profile, asked)
    assert plan.certificate is not None
    assert plan.certificate.loss == solution.loss
    assert "replayed_passes" not in plan.provenance
    assert not plan.budgets[0].replayed
    assert table.dense_index == 0


def test_what_no_plan_can_reach_is_refused() -> None:
    profile, _, shape = opened()
    with pytest.raises(
        BudgetInfeasibleError, match=r"no plan fits ttft=0\.2: the smallest feasible value is ttft=0\.8[78]"
    ):
        search_plan(profile, question("ttft=0.2x", Workload(2048, batch=16), shape=shape))
    alone = Question(parse_budgets("latency=0.01x"), cost_model=opened()[1])
    with pytest.raises(BudgetInfeasibleError, match=r"keeps latency=0\.01 when .* needs latency=0\.") as caught:
        search_plan(profile, alone)
    reached = parse_budgets(str(caught.value).split("needs ")[1].split(". ")[0])
    assert search_plan(profile, replace(alone, budgets=reached)).budgets[0].replayed


def test_layers_of_different_heads_have_no_schedule() -> None:
    with pytest.raises(SpecError, match="same heads"):
        heads_alone("x", ModelGeometry(("a", "b"), (4, 2), (2, 2), (8, 8)))


def test_a_refined_plan_keeps_its_seconds_under_the_replayed_schedule() -> None:
    profile, _, _ = opened()
    model, tokenizer = load_model("needle-7m")
    samples = calibration.load("needle", tokenizer, length_tokens=256, num_samples=2, seed=1).samples
    workload = Workload(2048, batch=16)
    plan, trials = refine(model, profile, question("latency=0.5x", workload), samples, evaluations=5)
    assert len(trials) >= 3
    (record,) = plan.budgets
    assert record.replayed["workload"] == pytest.approx(attention_share(plan, workload), rel=1e-9)
    assert record.replayed["workload"] <= 0.5 * (1 + 1e-9)
    assert plan.provenance["refinement"] == [trial.__dict__ for trial in trials]
