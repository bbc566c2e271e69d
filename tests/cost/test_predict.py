"""Predictions of whole workloads: what adds up, what shrinks under a plan, what is refused."""

from dataclasses import replace

import pytest

from sparsesearch.block_mask import BlockGrid
from sparsesearch.cost import load_cost_model
from sparsesearch.cost.base import DecodeWork
from sparsesearch.cost.device.model import DeviceCostModel
from sparsesearch.cost.device.table import DenseCost, Points
from sparsesearch.cost.layer_parts import decode_rest_s, parts_s, prefill_rest_s
from sparsesearch.cost.layer_schedule import choice_of
from sparsesearch.cost.predict import decode_works, predict, predict_layers
from sparsesearch.cost.roofline import roofline
from sparsesearch.errors import PlanMismatchError, SpecError
from sparsesearch.model_shapes import MODEL_SHAPES, ModelShape, model_shape, shape_of_config
from sparsesearch.plan import BaseModelInfo, Plan
from sparsesearch.rules.base import LengthLaw, Rule
from sparsesearch.rules.bounds_topk import BoundsTopk
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.mean_value import MeanValue
from sparsesearch.rules.pooled_topk import PooledTopk
from sparsesearch.rules.reuse import Reuse
from sparsesearch.rules.sink_window import SinkWindow
from sparsesearch.rules.skip_softmax import SkipSoftmax
from sparsesearch.rules.zero import Zero
from sparsesearch.workload import Workload
from tests.cost.device_tables import device_table

COSTS = DeviceCostModel(device_table())
SMALL = ModelShape("small", "llama", 2, 512, 1024, 8, 2, 64, 1000, True, 1e4, 1 << 20)
WINDOW = SinkWindow(sink=128, window=LengthLaw(a=512))
WORK = Workload(prompt_tokens=8192, generate_tokens=100, batch=2)


def plan_of(*heads: Rule, shape: ModelShape = SMALL, block_tokens: int = 128) -> Plan:
    """The same heads in every layer."""
    geometry = shape.geometry
    base = BaseModelInfo(
        name_or_path=shape.name, model_type="llama", modules=geometry.modules, num_heads=geometry.num_heads,
        num_kv_heads=geometry.num_kv_heads, head_dim=geometry.head_dim,
    )  # fmt: skip
    return Plan(
        base_model=base,
        block_tokens=block_tokens,
        unit="query_head",
        lengths_tokens=(8192,),
        rules={rule.label: rule for rule in heads},
        assignments={module: tuple(rule.label for rule in heads) for module in geometry.modules},
    )


def test_a_dense_plan_is_dense() -> None:
    assert predict(plan_of(*[Dense()] * 8), SMALL, WORK, COSTS) == predict(None, SMALL, WORK, COSTS)


def test_layers_without_sparse_heads_take_what_the_models_own_attention_takes() -> None:
    """Measured over query-key pairs of all heads and sequences; the tile kernel serves layers with a sparse head alone."""
    curve = DenseCost(head_dim=64, points=Points(amounts=(1e6, 1e12), seconds=(1e-5, 10.0)))
    costs = DeviceCostModel(device_table(dense=(curve,)))
    short = curve.model_copy(update={"points": Points(amounts=(1e6, 1e12), seconds=(1e-9, 1e-3))})
    few_heads = DeviceCostModel(device_table(dense=(short,)))
    assert predict(None, SMALL, WORK, few_heads) == predict(None, SMALL, WORK, COSTS)  # never less than a replay
    pairs = 2 * 8 * 8192 * 8193 / 2
    assert predict(None, SMALL, WORK, costs).layers[0].attention_s == pytest.approx(curve.points.at(pairs))
    assert predict(plan_of(*[Dense()] * 8), SMALL, WORK, costs) == predict(None, SMALL, WORK, costs)
    mixed = plan_of(WINDOW, *[Dense()] * 7)
    assert predict(mixed, SMALL, WORK, costs).layers == predict(mixed, SMALL, WORK, COSTS).layers
    assert costs.own_dense_s(pairs, 128) == pytest.approx(2 * curve.points.at(pairs))


def test_the_parts_add_up() -> None:
    found = predict(None, SMALL, WORK, COSTS)
    rows = WORK.batch * WORK.prompt_tokens
    rest_s = prefill_rest_s(SMALL, COSTS, rows=rows, batch=WORK.batch)
    linear_s, pointwise_s = parts_s(SMALL, COSTS, rows=rows, last_rows=WORK.batch)
    assert rest_s == pytest.approx(linear_s + 0.8 * pointwise_s)  # halfway between relief at 4k and 64k rows
    assert found.ttft_s == pytest.approx(rest_s + sum(layer.attention_s for layer in found.layers))
    head = DecodeWork(8242, 64, 4, 2)
    step_s = 2 * COSTS.decode_attention_s([head, head])
    assert found.decode_attention_s == pytest.approx(step_s)
    assert found.tpot_s == pytest.approx(step_s + decode_rest_s(SMALL, COSTS, batch=2))
    assert decode_rest_s(SMALL, COSTS, batch=2) > sum(parts_s(SMALL, COSTS, rows=2, last_rows=2))
    assert (
        found.kv_bytes == 2 * 2 * 2 * 8292 * 64 * 2 * 2
    )  # layers, KV heads, keys and values, tokens, size, bytes, batch
    assert found.weight_bytes == 2 * SMALL.num_parameters
    assert found.peak_bytes > found.weight_bytes + found.kv_bytes
    assert found.density == 1.0


def test_linear_layers_are_seven_per_layer_and_the_last() -> None:
    """Every product of the model, at the roofline: 2 FLOPs per weight and row."""
    costs = roofline("h100")
    rows = 1 << 20  # arithmetic binds everywhere
    seconds = sum(parts_s(model_shape("llama3-8b"), costs, rows=rows, last_rows=0))
    shape = model_shape("llama3-8b")
    products_s = 2 * rows * shape.num_layers * shape.layer_matmul_parameters / 989.4e12
    moved = rows * (2 * 4096 * 2 + 2 * 4096 * 3 + 5120 * 2 + 4096 * 2 + 14336 * 3) * shape.num_layers + rows * 4096 * 2
    assert seconds == pytest.approx(products_s + 2 * moved / 3.35e12 + shape.head_parameters * 2 / 3.35e12, rel=1e-6)


def test_a_plan_takes_less_of_everything_it_saves() -> None:
    dense, sparse = (predict(plan, SMALL, WORK, COSTS) for plan in (None, plan_of(*[WINDOW] * 8)))
    assert sparse.density == pytest.approx(sum(min(5, row + 1) for row in range(64)) / (64 * 65 / 2), rel=0.02)
    assert sparse.attention_s < 0.4 * dense.attention_s
    assert dense.ttft_s - sparse.ttft_s == pytest.approx(dense.attention_s - sparse.attention_s)
    assert sparse.kv_bytes == pytest.approx(640 / 8292 * dense.kv_bytes)
    assert sparse.tpot_s is not None
    assert dense.tpot_s is not None
    assert sparse.tpot_s < dense.tpot_s
    assert sparse.weight_bytes == dense.weight_bytes


def test_a_kv_head_keeps_what_its_neediest_query_head_reads() -> None:
    rules = (WINDOW, WINDOW, Dense(), WINDOW, Zero(), Zero(), WINDOW, MeanValue())
    works = decode_works(rules, 128, SMALL, WORK, 8300, 2)
    assert [work.kv_tokens for work in works] == [8300, 640]
    assert {(work.query_heads, work.batch, work.head_dim) for work in works} == {(4, 2, 64)}


def test_heads_without_tiles_compute_none_and_dynamic_ones_pay_for_their_choice() -> None:
    topk = PooledTopk(keep=LengthLaw(b=0.1), sink=128)
    idle, chosen = (
        predict(plan_of(*[rule] * 7, Dense()), SMALL, replace(WORK, generate_tokens=0), COSTS)
        for rule in (Zero(), topk)
    )
    assert idle.density == pytest.approx(1 / 8)
    assert idle.tpot_s is None
    assert all(layer.index_s == 0 for layer in idle.layers)
    both = COSTS.estimator_s("pooled_topk", 8192, 2 * 7)  # the heads of both sequences choose in one call
    assert [layer.index_s for layer in chosen.layers] == pytest.approx([both] * 2)
    assert 0.9 * (0.1 * 7 + 1) / 8 < chosen.density < 1.3 * (0.1 * 7 + 1) / 8
    mean = predict(plan_of(*[MeanValue()] * 7, Dense()), SMALL, WORK, COSTS)
    assert mean.attention_s > idle.attention_s


@pytest.mark.parametrize(
    "rule",
    [BoundsTopk(keep=LengthLaw(a=256)), SkipSoftmax(decode_scale=10), PooledTopk(keep=LengthLaw(a=8192))],
    ids=lambda rule: rule.kind,
)
def test_a_rule_that_leaves_the_prompt_dense_pays_for_no_choice(rule: Rule) -> None:
    """On a device and as the calls of a processor; others do pay."""
    for costs in (COSTS, load_cost_model("cpu")):
        layer = predict_layers(plan_of(*[rule] * 8), SMALL, WORK, costs, dtype_bytes=4)[0]
        assert (layer.density, layer.index_s) == (1.0, 0.0)
        other = PooledTopk(keep=LengthLaw(b=0.25))
        chosen = predict_layers(plan_of(*[other] * 8), SMALL, WORK, costs, dtype_bytes=4)[0]
        assert chosen.density < 0.5
        assert chosen.index_s > 0


def test_a_head_that_reuses_computes_its_sources_tiles_and_pays_for_no_choice() -> None:
    topk, reuse = PooledTopk(keep=LengthLaw(b=0.1), sink=128), Reuse(layer=0)
    plan = plan_of(*[topk] * 8)
    rules = {rule.label: rule for rule in (topk, reuse)}
    second = {SMALL.geometry.modules[1]: (reuse.label,) * 8}
    plan = plan.model_copy(update={"rules": rules, "assignments": plan.assignments | second})
    first, reused = predict(plan, SMALL, WORK, COSTS).layers
    assert reused.density == first.density
    assert reused.attention_s == first.attention_s
    assert first.index_s > reused.index_s == 0


def test_decoding_follows_the_rules_of_its_phase() -> None:
    plan = plan_of(*[Dense()] * 8)
    window = dict.fromkeys(SMALL.geometry.modules, (WINDOW.label,) * 8)
    both = plan.model_copy(update={"rules": {**plan.rules, WINDOW.label: WINDOW}, "decode": window})
    dense, mixed = (predict(each, SMALL, WORK, COSTS) for each in (plan, both))
    assert mixed.ttft_s == dense.ttft_s
    assert mixed.kv_bytes == pytest.approx(640 / 8292 * dense.kv_bytes)


def test_a_dynamic_choice_has_its_budget() -> None:
    grid = BlockGrid(4096, 4096, 128)
    tiles = choice_of(PooledTopk(keep=LengthLaw(a=512), sink=128), grid)
    assert tiles.sum(-1).tolist() == [min(row + 1, 4) for row in range(32)]


def test_long_batches_run_one_sequence_after_another() -> None:
    one = predict(None, SMALL, Workload(1 << 17), COSTS)
    four = predict(None, SMALL, Workload(1 << 17, batch=4), COSTS)
    assert four.attention_s == pytest.approx(4 * one.attention_s)


def test_another_models_plan_is_refused() -> None:
    with pytest.raises(PlanMismatchError, match=r"32 layers of 32 heads.*but is small"):
        predict(plan_of(*[WINDOW] * 8), model_shape("llama3-8b"), WORK, COSTS)


def test_shapes_from_configs() -> None:
    shape = MODEL_SHAPES["llama3-8b"]
    config = shape.config_settings() | {"model_type": "llama"}
    assert shape_of_config(config, "llama3-8b") == shape
    assert shape_of_config({"text_config": config, "model_type": "mllama"}, "llama3-8b") == shape
    without = {name: value for name, value in config.items() if name not in ("head_dim", "num_key_value_heads")}
    assert shape_of_config(without, "x").num_kv_heads == 32
    assert shape_of_config(without, "x").head_dim == 128
    with pytest.raises(SpecError, match="must state intermediate_size"):
        shape_of_config({name: value for name, value in config.items() if name != "intermediate_size"}, "x")
