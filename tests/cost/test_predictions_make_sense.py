"""What no prediction may say, whatever the device: less than arithmetic or memory allow, or less for more work."""

from itertools import pairwise

import pytest

from sparsesearch.bench.model_predicted import base_model_of
from sparsesearch.cost import cost_model_names, load_cost_model
from sparsesearch.cost.layer_costs import LayerCosts
from sparsesearch.cost.predict import Prediction, predict
from sparsesearch.cost.roofline import DATASHEETS, Datasheet
from sparsesearch.model_shapes import model_shape
from sparsesearch.plan import Plan, uniform_plan
from sparsesearch.rules import LengthLaw, Rule
from sparsesearch.rules.pooled_topk import PooledTopk
from sparsesearch.rules.sink_window import SinkWindow
from sparsesearch.workload import Workload

SHAPE = model_shape("llama3-8b")
WINDOWS = [SinkWindow(sink=64, window=LengthLaw(a=tokens)) for tokens in (128, 1024, 8192)]
CHOSEN = [PooledTopk(sink=64, keep=LengthLaw(b=share)) for share in (0.05, 0.2, 0.5)]
NOISE = 0.005
"""By which neighbouring points of a measured curve may fall."""


def plan_of(rule: Rule) -> Plan:
    return uniform_plan(base_model_of(SHAPE.name), rule, block_tokens=64, lengths_tokens=(4096,))


@pytest.fixture(params=[name for name in cost_model_names() if isinstance(load_cost_model(name), LayerCosts)])
def costs(request: pytest.FixtureRequest) -> LayerCosts:
    found = load_cost_model(request.param)
    assert isinstance(found, LayerCosts)
    return found


def sheet_of(costs: LayerCosts) -> Datasheet:
    return DATASHEETS[costs.name.rpartition(":")[2]]


def least_s(found: Prediction, sheet: Datasheet) -> tuple[float, float]:
    """No less than the products' operations at the peak; and per token, the weights and half of what is cached at the bandwidth."""
    work = found.workload
    weights = SHAPE.num_layers * SHAPE.layer_matmul_parameters
    flops = 2 * work.batch * work.prompt_tokens * weights
    nbytes = 2 * (weights + SHAPE.head_parameters) + 0.5 * found.kv_bytes
    return flops / sheet.half_flop_per_s, nbytes / sheet.bytes_per_s


def rising(seconds: list[float | None]) -> bool:
    known = [value for value in seconds if value is not None]
    return len(known) == len(seconds) and all(a <= b * (1 + NOISE) for a, b in pairwise(known))


@pytest.mark.parametrize("rule", [None, WINDOWS[1], CHOSEN[1]], ids=["dense", "window", "chosen"])
def test_longer_prompts_and_larger_batches_take_longer_and_no_less_than_is_possible(
    costs: LayerCosts, rule: Rule | None
) -> None:
    plan = None if rule is None else plan_of(rule)
    by_length = [predict(plan, SHAPE, Workload(n, 256), costs) for n in (1, 63, 64, 1000, 4096, 32_768)]
    by_batch = [predict(plan, SHAPE, Workload(2048, 256, batch), costs) for batch in (1, 2, 15, 16, 17, 64)]
    for found in (by_length, by_batch):
        assert rising([one.ttft_s for one in found])
        assert rising([one.tpot_s for one in found])
        assert rising([one.kv_bytes for one in found])
        assert rising([one.peak_bytes for one in found])
        for one in found:
            ttft_s, tpot_s = least_s(one, sheet_of(costs))
            assert one.ttft_s >= ttft_s
            assert one.tpot_s is not None
            assert one.tpot_s >= tpot_s


@pytest.mark.parametrize("rules", [WINDOWS, CHOSEN], ids=["windows", "chosen"])
def test_more_tiles_and_more_cached_keys_take_longer(costs: LayerCosts, rules: list[Rule]) -> None:
    found = [predict(plan_of(rule), SHAPE, Workload(16_384, 256, batch=4), costs) for rule in rules]
    dense = predict(None, SHAPE, Workload(16_384, 256, batch=4), costs)
    assert rising([one.density for one in found])
    assert rising([sum(layer.attention_s for layer in one.layers) for one in found])
    assert rising([one.tpot_s for one in (*found, dense)])
    assert rising([one.kv_bytes for one in (*found, dense)])
