"""A layer as the calls that a processor makes for it."""

from dataclasses import replace

import pytest

from sparsesearch.block_mask import BlockGrid
from sparsesearch.cost import CostModel, load_cost_model
from sparsesearch.cost.layer_calls import CallCosts, calls_of
from sparsesearch.cost.predict import predict_layers
from sparsesearch.model_shapes import ModelShape, heads_alone
from sparsesearch.plan import BaseModelInfo, Plan
from sparsesearch.rules import Rule
from sparsesearch.rules.base import LengthLaw
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.pooled_topk import PooledTopk
from sparsesearch.rules.reuse import Reuse
from sparsesearch.rules.sink_window import SinkWindow
from sparsesearch.workload import Workload

WINDOW = SinkWindow(sink=64, window=LengthLaw(a=128))
CHOSEN = PooledTopk(keep=LengthLaw(b=0.25))
HEADS = 8


def processor() -> CallCosts:
    model = load_cost_model("cpu")
    assert isinstance(model, CallCosts)
    return model


def planned(rules: list[Rule]) -> tuple[Plan, ModelShape]:
    info = BaseModelInfo(
        name_or_path="x",
        model_type="llama",
        modules=("a",),
        num_heads=(HEADS,),
        num_kv_heads=(HEADS,),
        head_dim=(32,),
    )
    labels = tuple(rule.label for rule in rules)
    plan = Plan(
        base_model=info, block_tokens=64, unit="query_head", lengths_tokens=(1024,),
        rules={rule.label: rule for rule in [Dense(), *rules] if rule.label in labels}, assignments={"a": labels},
    )  # fmt: skip
    return plan, heads_alone("x", info.geometry)


def share_of_dense(rules: list[Rule], tokens: int, batch: int = 1) -> float:
    plan, shape = planned(rules)
    (own,), (dense,) = (
        predict_layers(each, shape, Workload(tokens, batch=batch), processor()) for each in (plan, None)
    )
    return (own.attention_s + own.index_s) / (dense.attention_s + dense.index_s)


def test_heads_of_one_rule_share_a_call() -> None:
    grid = BlockGrid(1024, 1024, 64)
    rules: list[Rule] = [WINDOW, Dense(), CHOSEN, WINDOW]
    calls = calls_of(rules, rules, grid, 32)
    assert [(call.kind, call.query_heads, call.estimator) for call in calls] == [
        ("tiles", 2, None), ("dense", 1, None), ("tiles", 1, "pooled_topk"),
    ]  # fmt: skip
    assert calls[0].tiles == 2 * float(WINDOW.select(grid).sum())
    (reused,) = calls_of([Reuse(layer=0)], [CHOSEN], grid, 32)
    assert reused == replace(calls[2], estimator=None)


def test_a_layer_is_the_sum_of_its_calls_for_every_sequence() -> None:
    rules: list[Rule] = [WINDOW] * 5 + [CHOSEN] * 2 + [Dense()]
    plan, shape = planned(rules)
    costs = processor()
    (layer,) = predict_layers(plan, shape, Workload(1024, batch=3), costs)
    calls = calls_of(rules, rules, BlockGrid(1024, 1024, 64), 32)
    assert layer.attention_s + layer.index_s == pytest.approx(3 * sum(costs.call_latency_s(call) for call in calls))
    assert layer.index_s > 0
    assert layer.decode_attention_s == 0
    (decoding,) = predict_layers(plan, shape, Workload(1024, 64, batch=3), costs, dtype_bytes=4)
    assert decoding.decode_attention_s > 0
    assert 0 < layer.density < 1


@pytest.mark.parametrize(("tokens", "gains"), [(256, False), (4096, True)])
def test_short_prompts_stay_dense_on_the_shipped_processor(tokens: int, gains: bool) -> None:
    assert (share_of_dense([WINDOW] * HEADS, tokens) < 1) is gains
    assert (share_of_dense([CHOSEN] * HEADS, tokens) < 1) is gains


def test_many_rules_in_a_layer_cost_what_they_share_no_more() -> None:
    """Eight windows of eight lengths are eight calls: at 512 tokens that is slower than dense, and one call for all is not."""
    windows: list[Rule] = [SinkWindow(sink=64, window=LengthLaw(a=64.0 * (2 + index))) for index in range(HEADS)]
    assert share_of_dense([windows[0]] * HEADS, 512) < 1 < share_of_dense(windows, 512)


def test_a_model_that_prices_units_alone_is_no_call_model() -> None:
    class UnitsAlone:
        name, device, measured, decode_call_s = "x", "x", True, 0.0
        step_choices = frozenset[str]()

        def unit_latency_s(self, work: object) -> float:
            return 1.0

        latency_s = decode_latency_s = unit_latency_s

    assert isinstance(UnitsAlone(), CostModel)
    assert not isinstance(UnitsAlone(), CallCosts)
