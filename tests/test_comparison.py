"""diff and explain: which heads changed, and what a head does."""

import numpy as np
import pytest
from embedded_model import INFO, plan_of

from sparsesearch.comparison import diff
from sparsesearch.cut import Cut, LayerCut
from sparsesearch.errors import PlanMismatchError, SpecError
from sparsesearch.explanation import HeadExplanation, PlanExplanation, explain
from sparsesearch.plan import Plan
from sparsesearch.rules.base import LengthLaw
from sparsesearch.rules.pooled_topk import PooledTopk
from sparsesearch.rules.sink_window import SinkWindow
from sparsesearch.rules.zero import Zero
from sparsesearch.scores import ScoreTable
from sparsesearch.shapes import units_of
from sparsesearch.step_schedule import StepSchedule

WINDOW = SinkWindow(sink=0, window=LengthLaw(a=64))  # the diagonal: 8 of 36 tiles at 512
WIDER = SinkWindow(sink=64, window=LengthLaw(a=128))
DYNAMIC = PooledTopk(keep=LengthLaw(b=0.25))


def test_a_plan_equals_itself() -> None:
    found = diff(plan_of({(0, 0): WINDOW}), plan_of({(0, 0): WINDOW}))
    assert found.identical
    assert found.changes == found.moves == found.other_fields == ()


def test_diff_names_each_head_that_changed() -> None:
    found = diff(plan_of({(0, 0): WINDOW, (1, 5): WINDOW}), plan_of({(0, 0): WIDER, (7, 7): Zero(), (7, 6): Zero()}))
    assert not found.identical
    assert [(change.module, change.head, change.before, change.after) for change in found.changes] == [
        (INFO.modules[0], 0, WINDOW.label, WIDER.label),
        (INFO.modules[1], 5, WINDOW.label, "dense"),
        (INFO.modules[7], 6, "dense", "zero"),
        (INFO.modules[7], 7, "dense", "zero"),
    ]
    assert found.moves == (("dense", "zero", 2), ("sink_window", "dense", 1), ("sink_window", "sink_window", 1))
    assert found.length_tokens == 512
    assert found.num_heads == 64
    assert found.changes[0].density_before == pytest.approx(8 / 36)
    assert found.density == (pytest.approx((62 + 2 * 8 / 36) / 64), pytest.approx((61 + 21 / 36) / 64))


def test_density_is_unknown_where_the_data_decide() -> None:
    found = diff(plan_of({}), plan_of({(0, 0): DYNAMIC}))
    assert found.density == (1.0, None)
    assert found.changes[0].density_after is None


def test_diff_says_what_else_differs() -> None:
    found = diff(plan_of({}), plan_of({}, block_tokens=128))
    assert found.other_fields == (("block_tokens", "64", "128"),)
    assert not found.identical


def test_rules_of_decoding_steps_and_removals_are_seen() -> None:
    place = {(5, 5): WINDOW}  # so that every plan has the rule
    decode = {INFO.modules[2]: ("dense", *[WINDOW.label] * 7)}
    schedule = StepSchedule.of(4, [(0, 2, {INFO.modules[0]: (WINDOW.label,) * 8})])
    cut = Cut(
        layers={1: LayerCut(num_heads=8, num_kv_heads=4, num_channels=96, removed_heads=(2, 3), removed_channels=(5,))}
    )
    plain = plan_of(place)
    for changed, name, summary in (
        (plan_of(place, decode=decode), "decode", "7 of 64 query heads follow another rule"),
        (plan_of(place, schedule=schedule), "schedule", "4 in 1 ranges"),
        (plan_of(place, pruning=cut), "pruning", "2 query heads and 1 FFN channels go, from 1 layers"),
    ):
        found = diff(plain, changed)
        assert not found.identical
        assert [(field, after) for field, _, after in found.other_fields] == [(name, summary)]
        whole = explain(changed)
        assert isinstance(whole, PlanExplanation)
        assert whole.parts == ((name, summary),)
    assert explain(plain).parts == ()  # type: ignore[union-attr]
    head = explain(plan_of(place, decode=decode), "2:1")
    assert isinstance(head, HeadExplanation)
    assert (head.rule, head.decode_rule, head.removed) == ("dense", WINDOW.label, False)
    assert explain(plan_of(place, pruning=cut), "1:3").removed  # type: ignore[union-attr]
    assert not explain(plan_of(place, pruning=cut), "1:4").removed  # type: ignore[union-attr]


def test_plans_for_different_models_are_not_compared() -> None:
    other = INFO.model_copy(update={"num_kv_heads": (2,) * 8})
    with pytest.raises(PlanMismatchError, match="must be for the same model"):
        diff(plan_of({}), plan_of({}, base_model=other))


def test_explain_a_plan() -> None:
    found = explain(plan_of({(0, 0): WINDOW, (0, 1): WINDOW, (7, 7): Zero()}))
    assert isinstance(found, PlanExplanation)
    assert found.kinds == (("dense", 61), ("sink_window", 2), ("zero", 1))
    assert found.densities == {256: pytest.approx((61 + 2 * 4 / 10) / 64), 512: pytest.approx((61 + 2 * 8 / 36) / 64)}
    assert found.layers[0][2] == (("dense", 6), ("sink_window", 2))
    assert len(found.dense_heads) == 61
    assert f"{INFO.modules[0]}:0" not in found.dense_heads


def test_diff_of_schedules_is_by_range() -> None:
    def scheduled(rule: str) -> Plan:
        ranges = [
            (0, 1, {INFO.modules[0]: (WINDOW.label,) * 8}),
            (1, 4, {INFO.modules[0]: ("dense", rule, *["dense"] * 6)}),
        ]
        return plan_of({(3, 3): WINDOW, (4, 4): Zero()}, schedule=StepSchedule.of(4, ranges))

    found = diff(scheduled(WINDOW.label), scheduled("zero"))
    (change,) = found.changes
    assert (change.module, change.head, change.steps) == (INFO.modules[0], 1, "1-3")
    assert (change.before, change.after) == (WINDOW.label, "zero")
    assert found.num_heads == 2 * 64
    assert not found.identical
    assert diff(scheduled("zero"), scheduled("zero")).identical


def test_steps_of_a_schedule_are_explained_range_by_range() -> None:
    first, second = INFO.modules[0], INFO.modules[1]
    ranges = [(0, 1, {first: (WINDOW.label,) * 8}), (1, 3, {first: ("dense",) * 8, second: ("zero",) * 8})]
    plan = plan_of(
        {(0, 0): WINDOW, (1, 0): Zero()}, schedule=StepSchedule.of(4, ranges)
    )  # the last step: the plan's own table
    whole = explain(plan)
    assert isinstance(whole, PlanExplanation)
    windows, silent, own = (56 + 8 * 8 / 36) / 64, 56 / 64, (62 + 8 / 36) / 64
    assert [label for label, _, _ in whole.steps] == ["0-0", "1-2", "others"]
    assert [share for _, share, _ in whole.steps] == [pytest.approx(share) for share in (windows, silent, own)]
    assert whole.steps[1][2] == (("dense", 56), ("zero", 8))
    assert whole.densities[512] == pytest.approx((windows + 2 * silent + own) / 4)
    assert dict(whole.kinds) == {"dense": 56 + 56 + 62, "sink_window": 9, "zero": 9}
    assert len(whole.dense_heads) == 6 * 8, "the heads that no range makes sparse"
    head = explain(plan, "0:3")
    assert isinstance(head, HeadExplanation)
    assert head.rule == WINDOW.label
    assert [(label, rule) for label, rule, _ in head.steps] == [
        ("0-0", WINDOW.label),
        ("1-2", "dense"),
        ("others", "dense"),
    ]
    assert head.steps[0][2] == pytest.approx(8 / 36)


@pytest.mark.parametrize("where", ["model.layers.3.self_attn:2", "3:2", "layers.3.self_attn:2"])
def test_a_head_is_found_by_path_end_of_path_or_number(where: str) -> None:
    found = explain(plan_of({(3, 2): WIDER, (3, 3): Zero()}), where)
    assert isinstance(found, HeadExplanation)
    assert (found.module, found.head, found.rule) == (INFO.modules[3], 2, WIDER.label)
    assert found.shares_kv_with == ((3, "zero"),)
    assert found.densities == {256: pytest.approx(9 / 10), 512: pytest.approx(21 / 36)}
    assert ("sink", "64", "tokens at the start that stay visible") in found.parameters
    assert "StreamingLLM" in found.source
    assert found.meaning.startswith("The first `sink` tokens")
    assert found.alternatives == ()


def _scores(plan: Plan) -> ScoreTable:
    units = units_of(plan.base_model.geometry, "query_head")
    loss = np.tile([0.0, 3.0, 1.0], (64, 1))
    cost = np.tile(np.array([36.0, 9.0, 18.0])[:, None], (64, 1, 1))
    return ScoreTable(
        units,
        ("dense", "fixed_blocks(keep=0.25)", WIDER.label),
        (512,),
        loss,
        {"density": cost},
        0,
        np.ones((64, 3), dtype=bool),
    )


def test_alternatives_come_from_the_scores_best_first() -> None:
    plan = plan_of({(3, 2): WIDER})
    found = explain(plan, "3:2", scores=_scores(plan))
    assert isinstance(found, HeadExplanation)
    assert [(a.rule.split("(")[0], a.loss, a.cost["density"], a.chosen) for a in found.alternatives] == [
        ("dense", 0.0, 1.0, False),
        ("sink_window", 1.0, 0.5, True),
        ("fixed_blocks", 3.0, 0.25, False),
    ]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("self_attn:1", "name one module. model.layers.0.self_attn, model.layers.1.self_attn"),
        ("model.layers.9.self_attn:1", r"Did you mean 'model\.layers\."),
        ("3", "must be module:head"),
        ("3:8", "must name a query head of model.layers.3.self_attn: 0 to 7"),
        ("3:-1", "0 to 7"),
        ("8:0", "must be module:head and name one module"),
    ],
)
def test_wrong_addresses_say_what_is_right(where: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        explain(plan_of({}), where)
