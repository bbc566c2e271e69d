"""What a decoded token reads under rules that choose, and what cost models make of it."""

from dataclasses import replace

import pytest
import torch

from sparsesearch.block_mask import BlockGrid
from sparsesearch.cost import DecodeWork, load_cost_model
from sparsesearch.cost.base import StepChoice
from sparsesearch.cost.device.model import DeviceCostModel
from sparsesearch.cost.device.sibling import sibling_table
from sparsesearch.cost.device.table import Correction, DecodeCost, PairPoints, Points, StepChoiceCost
from sparsesearch.cost.predict import predict
from sparsesearch.cost.roofline import roofline
from sparsesearch.cost.step_work import cached_tokens, head_works, unpriced
from sparsesearch.cost.table import Curve, TableCostModel
from sparsesearch.errors import SpecError
from sparsesearch.rules import LengthLaw, Rule, rule_kinds
from sparsesearch.rules.bounds_topk import BoundsTopk
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.sink_window import SinkWindow
from sparsesearch.rules.skip_softmax import SkipSoftmax
from tests.cost.device_tables import device_table
from tests.cost.test_predict import SMALL, WORK, plan_of
from tests.cost.test_table import table

QUEST = BoundsTopk(keep=LengthLaw(a=512))
CHOICE = StepChoice("bounds_topk", 8192, 64)
STEPS = {
    "step_choices": (
        StepChoiceCost(
            kind="bounds_topk",
            heads=32,
            points=Points(amounts=(64, 1024), seconds=(5e-6, 1e-5)),
            many_heads=256,
            many_points=Points(amounts=(64, 1024), seconds=(8e-6, 3e-5)),
        ),
    ),
    "step_joining_s": Correction(amounts=(1, 8), values=(1e-5, 2.5e-5)),
    "paged_decode": tuple(
        DecodeCost(
            head_dim=d,
            curves=(PairPoints(pairs=32, points=Points(amounts=(1e6, 1e9), seconds=(1.2e-5, 3e-4))),),
            pair_s=1e-7,
            call_s=1e-5,
            byte_s=3e-13,
        )
        for d in (64, 128)
    ),
}
KNOWS, ASKS_NOT = DeviceCostModel(device_table(**STEPS)), DeviceCostModel(device_table())
DECODING = [rule for kind in rule_kinds().values() for rule in kind.examples() if rule.decodes and not rule.reuses]


@pytest.mark.parametrize("rule", DECODING, ids=lambda rule: rule.label)
@pytest.mark.parametrize("kv_len", [1, 63, 64, 200, 1000])
def test_a_step_reads_no_more_than_it_says(rule: Rule, kv_len: int) -> None:
    """And a budget in blocks reads exactly that: the newest block counts the keys it holds."""
    generator = torch.Generator().manual_seed(kv_len)
    q, k = (torch.randn(3, n, 8, generator=generator) for n in (1, kv_len))
    for law_len in {kv_len, max(1, kv_len // 2)}:
        grid = BlockGrid(1, kv_len, 64, law_len=law_len)
        tiles = rule.select(grid, q, k).expand(3, 1, grid.num_k_blocks)
        sizes = torch.tensor([min(64, kv_len - 64 * block) for block in range(grid.num_k_blocks)])
        read = (tiles[:, 0] * sizes).sum(-1)
        assert (read <= rule.step_tokens(grid)).all()
        if isinstance(rule, BoundsTopk):
            assert (read == rule.step_tokens(grid)).all()


def test_heads_that_choose_read_for_themselves() -> None:
    grid = BlockGrid(1, 8192, 64)
    works = head_works(
        (Dense(), QUEST, QUEST, SinkWindow(sink=64, window=LengthLaw(a=64))), grid, head_dim=64, batch=2, dtype_bytes=2
    )
    assert works == (DecodeWork(8192, 64, 2, 2), DecodeWork(512, 64, 2, 2, 2, CHOICE))
    assert works[1].kv_bytes == 2 * 2 * 512 * 64 * 2 * 2
    assert works[1].bounds_bytes == 2 * 128 * 64 * 2 * 2
    assert works[1].reading_all == DecodeWork(8192, 64, 2, 2)
    assert cached_tokens((QUEST, QUEST), grid) == 8192 + 128
    assert cached_tokens((Dense(), SkipSoftmax(decode_scale=1)), grid) == 8192
    with pytest.raises(SpecError, match="cached_tokens must not be negative"):
        StepChoice("bounds_topk", -1, 64)


def test_a_layer_pays_for_its_choices_once_per_rule_and_for_pages_per_head() -> None:
    own = DecodeWork(512, 64, 4, 2, 2, CHOICE)
    heads = 2 * 4 * 8
    read_s = STEPS["paged_decode"][0].at(8 * own.kv_bytes, heads)
    assert KNOWS.decode_attention_s([own] * 8) == pytest.approx(STEPS["step_choices"][0].seconds(128, heads) + read_s)
    window = DecodeWork(640, 64, 4, 2)
    mixed_s = KNOWS.decode_attention_s([own] * 4 + [window] * 4)
    parts = STEPS["step_choices"][0].seconds(128, 32) + STEPS["paged_decode"][0].at(4 * own.kv_bytes, 32)
    assert mixed_s == pytest.approx(parts + KNOWS.decode_attention_s([window] * 4) + 1.5e-5)
    smaller = replace(own, kv_tokens=256)
    two_rules = KNOWS.decode_attention_s([own] * 4 + [smaller] * 4)
    choices = 2 * STEPS["step_choices"][0].seconds(128, 32)
    assert two_rules == pytest.approx(choices + STEPS["paged_decode"][0].at(4 * own.kv_bytes * 1.5, heads))


def test_a_unit_pays_its_share() -> None:
    (seconds,) = KNOWS.decode_latency_s([DecodeWork(512, 64, 4, 2, 2, CHOICE)])
    share = STEPS["step_choices"][0].seconds(128, 64) * 4 / 32
    assert seconds == pytest.approx(share + 2 * 512 * 64 * 2 * 2 * 4 * 3e-13 + 8 * 1e-7)


@pytest.mark.parametrize("model", [ASKS_NOT, TableCostModel(table())], ids=["device", "cpu"])
def test_without_a_price_every_key_is_read(model: DeviceCostModel | TableCostModel) -> None:
    dtype_bytes = 4 if isinstance(model, TableCostModel) else 2
    own = DecodeWork(512, 64, 4, 2, dtype_bytes, CHOICE)
    assert model.decode_latency_s([own]) == pytest.approx(model.decode_latency_s([own.reading_all]))
    assert unpriced((QUEST, Dense(), SkipSoftmax(prefill_scale=1)), model) == ("bounds_topk",)
    if isinstance(model, DeviceCostModel):
        assert model.decode_attention_s([own] * 2) == model.decode_attention_s([own.reading_all] * 2)


def test_a_processor_pays_per_query_head_and_cached_key() -> None:
    curve = Curve(head_dim=32, tokens=(1000, 10_000), seconds=(0.5, 5.0))
    model = TableCostModel(table().model_copy(update={"step_choices": {"bounds_topk": (curve,)}}))
    work = DecodeWork(1000, 32, 2, 3, 4, StepChoice("bounds_topk", 2000, 64))
    assert model.decode_latency_s([work]) == pytest.approx([2 * 3 * (1.0 + 1000 * 0.001 + 1.0)])
    assert model.step_choices == {"bounds_topk"}


def test_a_roofline_reads_bounds_and_pages() -> None:
    own = DecodeWork(512, 64, 4, 2, 2, CHOICE)
    model = roofline("h100")
    assert model.decode_latency_s([own]) == pytest.approx([(own.kv_bytes + own.bounds_bytes) / 3.35e12])
    looks_at_all = replace(own, choice=replace(CHOICE, kind="skip_softmax"))
    assert model.decode_latency_s([looks_at_all]) == model.decode_latency_s([own.reading_all])


def test_predictions_say_what_has_no_price_and_the_cache_stays_whole() -> None:
    dense, plan = predict(None, SMALL, WORK, KNOWS), plan_of(*[QUEST] * 8, block_tokens=64)
    priced, unpriced_ = (predict(plan, SMALL, WORK, costs) for costs in (KNOWS, ASKS_NOT))
    assert priced.unpriced_choices == ()
    assert unpriced_.unpriced_choices == ("bounds_topk",)
    assert unpriced_.decode_attention_s == pytest.approx(dense.decode_attention_s)
    long = replace(WORK, prompt_tokens=1 << 16)
    chosen, whole = (predict(own, SMALL, long, KNOWS).decode_attention_s for own in (plan, None))
    assert chosen < whole
    blocks = -(-(WORK.prompt_tokens + WORK.generate_tokens) // 64)
    assert priced.kv_bytes == pytest.approx(dense.kv_bytes * (1 + blocks / 8292))
    assert predict(plan, SMALL, replace(WORK, generate_tokens=0), ASKS_NOT).unpriced_choices == ()


def test_another_memory_changes_what_choosing_and_pages_read() -> None:
    shipped = load_cost_model("h200")
    assert isinstance(shipped, DeviceCostModel)
    fields = {name: getattr(KNOWS.table, name) for name in STEPS}
    slower = DeviceCostModel(sibling_table(shipped.table.model_copy(update=fields), "h100"))
    own = DecodeWork(512, 64, 4, 2, 2, CHOICE)
    assert slower.decode_latency_s([own])[0] > KNOWS.decode_latency_s([own])[0]
    assert slower.step_choices == {"bounds_topk"}
