"""The parts of a timed evaluation: the stopwatch, attention by itself, predictions beside it."""

import pytest
import torch
import transformers
from tiny_comparison import LENGTH, window
from transformers import PreTrainedModel

from sparsesearch.bench.families import random_samples
from sparsesearch.cost import load_cost_model
from sparsesearch.cost.table import TableCostModel
from sparsesearch.errors import UnsupportedModelError
from sparsesearch.evaluate import timing
from sparsesearch.evaluate.head import Head
from sparsesearch.evaluate.predicted import predicted_seconds
from sparsesearch.evaluate.timing import Stopwatch, prefill_seconds
from sparsesearch.plan import Plan
from sparsesearch.runtime.live import AppliedPlan, apply


def test_a_plan_is_put_together_once_however_often_it_is_timed(model: PreTrainedModel) -> None:
    prompt = random_samples(64, LENGTH, 1, seed=2)[0].input_ids[None]
    put: list[Plan] = []

    def counting(live: PreTrainedModel, plan: Plan) -> AppliedPlan:
        put.append(plan)
        return apply(live, plan)

    stopwatch, narrow, wide = Stopwatch(Head(model), prompt, counting), window(model, 64), window(model, 256)
    times = stopwatch({"dense": None, "narrow": narrow, "wide": wide}, rounds=3, part="attention")
    assert {name: len(runs) for name, runs in times.items()} == {"dense": 3, "narrow": 3, "wide": 3}
    counted: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            timing._Variant,
            "seconds",
            lambda own, part: float(counted.append("dense" if own._plan is None else "plan") or len(counted)),
        )
        runs = stopwatch({"dense": None, "narrow": narrow, "wide": wide}, rounds=1, dense_runs=2)
    assert counted == ["dense", "plan", "dense", "plan"]
    assert runs == {"dense": (2.0,), "narrow": (2.0,), "wide": (4.0,)}
    stopwatch({"narrow": narrow}, rounds=2)
    assert put == [narrow, wide]
    stopwatch({"wide": wide}, rounds=1, part="attention")
    assert put == [narrow, wide, wide], "what a call does not name is not kept"


def test_attention_is_a_part_of_the_prefill(model: PreTrainedModel) -> None:
    prompt = random_samples(64, LENGTH, 1, seed=2)[0].input_ids[None]
    plans = {"dense": None, "window": window(model, 64)}
    before = dict(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS)
    attention = prefill_seconds(Head(model), prompt, plans, rounds=3, apply=apply, part="attention")
    whole = prefill_seconds(Head(model), prompt, plans, rounds=3, apply=apply)
    assert dict(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS) == before
    for name in plans:
        assert len(attention[name]) == len(whole[name]) == 3
        assert 0 < min(attention[name]) < max(whole[name])


def test_attention_that_no_interface_knows_cannot_be_timed(model: PreTrainedModel) -> None:
    kept = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with pytest.raises(UnsupportedModelError, match="attn_implementation='sdpa'"):
            prefill_seconds(
                Head(model),
                torch.zeros(1, 8, dtype=torch.long),
                {"dense": None},
                rounds=1,
                apply=apply,
                part="attention",
            )
    finally:
        model.set_attn_implementation(kept)


def test_predictions_of_either_kind_of_cost_model(model: PreTrainedModel) -> None:
    variants = {"dense": None, "window": window(model, 64)}
    cpu = load_cost_model("cpu")
    assert isinstance(cpu, TableCostModel)
    of_calls = TableCostModel(cpu.table.model_copy(update={"layers": None}))
    attention = predicted_seconds(model, variants, 4096, of_calls)
    assert all(set(found) == {"attention_s"} for found in attention.values())
    for costs in (cpu, load_cost_model("h200")):
        found = predicted_seconds(model, variants, 4096, costs)
        assert all(0 < one["attention_s"] < one["prefill_s"] for one in found.values())
        assert found["window"]["attention_s"] < found["dense"]["attention_s"]
    assert predicted_seconds(model, {"dense": None}, 4096, load_cost_model("cpu")) == {}
