"""Plans beside their baselines: what is measured is what the plans are, and equal times are compared at equal times."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "pruning"))
from pruning_models import batches_for, tiny_model

from sparsesearch.bench.cuts import (
    CUTS_ONLY,
    JOINT,
    MODES,
    RULES_ONLY,
    CutBench,
    CutRow,
    at_equal_time,
    measure_cuts,
    record_of,
    rival_plans,
)
from sparsesearch.bench.priced_here import PricedHere
from sparsesearch.cost import load_cost_model
from sparsesearch.cost.table import TableCostModel
from sparsesearch.cut import Compensation
from sparsesearch.errors import SpecError
from sparsesearch.pruning.live import narrowed
from sparsesearch.pruning.prices import SublayerSize, dense_work, projection_s
from sparsesearch.pruning.profile_run import PruningRequest, profile_pruning
from sparsesearch.pruning.quality import dense_rows, mean_distance
from sparsesearch.pruning.record import LayerShape
from sparsesearch.pruning.search import PruningQuestion
from sparsesearch.search.budget import Budget
from sparsesearch.search_space import PruningMenu


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    model = tiny_model("llama")
    batches = batches_for(model)
    menu = PruningMenu(channel_multiple=16, measured_options=1)
    request = PruningRequest("tiny", menu, batches, batches[:1], {"data": "random"}, num_probes=2)
    return model, profile_pruning(model, request, tmp_path_factory.mktemp("cuts"))


def test_rows_say_what_is_left_and_how_far_it_is_from_dense(profiled):
    model, profile = profiled
    refit = Compensation(data="text", length_tokens=33, num_samples=3, seed=0, bias=True)
    question = PruningQuestion((Budget("params", 0.75),), (33,), "reconstruction", compensation=refit)
    plans = {(name, "params=0.75"): plan for name, plan in rival_plans(profile, question).items()}
    assert len(plans) == 8 + len(MODES)
    held_out = batches_for(model)  # what plans are refitted on: random tokens teach nothing about others
    bench = CutBench(held_out, batches_for(model), held_out[0], timed_tokens=33, rounds=2)
    rows = {row.plan: row for row in measure_cuts(model, profile, plans, bench)}
    assert all(row.params <= 0.75 and row.flops < 1 and row.forward_s > 0 for row in rows.values())
    assert rows["searched"].distance < rows["searched, not refitted"].distance
    bare = "uniform magnitude, not refitted"
    dense = dense_rows(model, held_out)
    with narrowed(model, plans[(bare, "params=0.75")].pruning):
        assert rows[bare].distance == pytest.approx(mean_distance(model, held_out, dense), rel=1e-6)
    record = record_of(model, profile, list(rows.values()), judged_on="cpu", timed_on=None, seed=3)
    assert record["rows"][0]["plan"] == "searched"
    origin = record["provenance"]
    assert (origin["device"][:4], origin["timed_on"], origin["seed"]) == ("cpu ", None, 3)


def test_only_named_baselines_and_no_unknown_ones(profiled):
    _, profile = profiled
    question = PruningQuestion((Budget("params", 0.75),), (33,), "reconstruction")
    assert list(rival_plans(profile, question, names=["magnitude"])) == ["magnitude"]
    with pytest.raises(SpecError, match="magnitude"):
        rival_plans(profile, question, names=["magnitudes"])


def test_every_named_mode_is_a_plan_of_its_own_and_learned_masks_only_where_there_are_some(profiled, tmp_path):
    model, bare = profiled
    batches, menu = batches_for(model), PruningMenu(channel_multiple=16, measured_options=1)
    request = PruningRequest("tiny", menu, batches, batches[:1], {"data": "random"}, num_probes=2, learn_masks=4)
    question = PruningQuestion((Budget("params", 0.75),), (33,), "reconstruction")
    plans = rival_plans(profile_pruning(model, request, tmp_path), question, names=[*MODES, "learned"])
    assert [plan.pruning.scoring["criterion"] for plan in plans.values()] == [*MODES, "learned"]
    with pytest.raises(SpecError, match="learned"):
        rival_plans(bare, question, names=["learned"])


def test_kinds_are_compared_at_the_joint_plans_time():
    def row(plan, seconds, distance):
        return CutRow(plan, "latency", 1.0, 1.0, distance, None, seconds, 1.0)

    rows = [
        row(JOINT, 2.0, 0.1), row(CUTS_ONLY, 1.0, 0.4), row(CUTS_ONLY, 3.0, 0.1), row(RULES_ONLY, 2.5, 0.2), row(RULES_ONLY, 4.0, 0.1)
    ]  # fmt: skip
    (found,) = at_equal_time(rows)
    assert found[CUTS_ONLY] == pytest.approx(0.2)
    assert found[RULES_ONLY] is None, "that kind was never so fast"


def test_products_are_timed_here_and_attention_is_scaled_to_them():
    base = load_cost_model("cpu")
    priced = PricedHere(base, num_heads=4, head_dim=32, tokens=128)
    assert priced.linear_s(128, 64, 32) > 0
    assert priced.linear_s(128, 64, 32) == priced.linear_s(128, 64, 32), "timed once"
    assert priced.linear_s(128, 64, 32) != base.linear_s(128, 64, 32), "not what the table says"
    one, two = (dense_work(tokens, 32, 1) for tokens in (128, 256))
    ratio = priced.unit_latency_s(two) / priced.unit_latency_s(one)
    assert ratio == pytest.approx(base.unit_latency_s(two) / base.unit_latency_s(one))
    assert priced.latency_s([one, two]).tolist() == pytest.approx([priced.unit_latency_s(w) for w in (one, two)])


def test_a_table_of_attention_alone_prices_products_by_its_rate():
    known = load_cost_model("cpu")
    older = TableCostModel(known.table.model_copy(update={"layers": None}))
    shape = LayerShape(num_heads=4, num_kv_heads=2, head_dim=32, num_channels=256, hidden=128, into_feed_forward=2, biased=False)  # fmt: skip
    size = SublayerSize(heads=4, kv_heads=2, channels=256)
    assert 0 < projection_s(shape, size, 64, older) != projection_s(shape, size, 64, known)
    assert projection_s(shape, size, 128, older) == pytest.approx(2 * projection_s(shape, size, 64, older))
