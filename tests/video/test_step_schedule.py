"""Step ranges in plans: what holds when, size on disk, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from sparsesearch.errors import ArtifactError, SpecError
from sparsesearch.layout import video_layout
from sparsesearch.plan import BaseModelInfo, Plan
from sparsesearch.rules import LengthLaw
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.sink_window import SinkWindow
from sparsesearch.rules.zero import Zero
from sparsesearch.step_schedule import StepSchedule

WINDOW = SinkWindow(sink=64, window=LengthLaw(a=128))
INFO = BaseModelInfo(
    name_or_path="tiny", model_type="wan", modules=("a", "b"), num_heads=(2, 1), num_kv_heads=(2, 1), head_dim=(8, 8)
)


def plan(**changes: Any) -> Plan:
    schedule = StepSchedule.of(
        10,
        [
            (0, 2, {}),
            (2, 6, {"a": ("zero", "dense"), "b": (WINDOW.label,)}),
            (8, 10, {"a": (WINDOW.label, WINDOW.label)}),
        ],
    )
    content: dict[str, Any] = {
        "base_model": INFO,
        "block_tokens": 64,
        "unit": "query_head",
        "lengths_tokens": (128,),
        "rules": {rule.label: rule for rule in (Dense(), Zero(), WINDOW)},
        "assignments": {"b": ("zero",)},
        "schedule": schedule,
        "layout": video_layout(2, 8, 8),
    }
    return Plan.model_validate({**content, **changes})


def test_each_step_has_its_assignments() -> None:
    kinds = [[rule.kind for _, _, rule in plan().at_step(step).heads()] for step in range(10)]
    dense, early, between, late = (
        ["dense"] * 3,
        ["zero", "dense", "sink_window"],
        ["dense", "dense", "zero"],
        ["sink_window"] * 2 + ["dense"],
    )
    assert kinds == [dense] * 2 + [early] * 4 + [between] * 2 + [late] * 2
    assert plan().at_step(3).schedule is None
    with pytest.raises(SpecError, match="0 to 9"):
        plan().at_step(10)


def test_other_step_counts_are_mapped_by_share() -> None:
    schedule = plan().schedule
    assert schedule is not None
    assert [schedule.range_index(i, 5) for i in range(5)] == [0, 1, 1, None, 2]
    assert [schedule.range_index(i, 20) for i in range(0, 20, 2)] == [0, 0, 1, 1, 1, 1, None, None, 2, 2]
    assert schedule.step(0, 1) == 5


def test_refresh_steps() -> None:
    schedule = StepSchedule(num_steps=50, rules=(), ranges=(), refresh=(10, 30))
    assert [i for i in range(50) if schedule.refreshes(i)] == [0, 10, 30]
    assert [i for i in range(10) if schedule.refreshes(i, 10)] == [0, 2, 6]
    always = StepSchedule(num_steps=4, rules=(), ranges=())
    assert all(always.refreshes(i) for i in range(4))
    assert "refresh" not in always.model_dump(mode="json")


def test_without_a_schedule_every_step_is_the_plan() -> None:
    bare = plan(schedule=None, layout=None)
    assert bare.at_step(7) is bare
    assert {"schedule", "layout"}.isdisjoint(bare.to_dict())


def test_round_trip(tmp_path: Path) -> None:
    plan().save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan()
    assert again.sha256 == plan().sha256


def test_hunyuan_size_fits_in_two_megabytes(tmp_path: Path) -> None:
    """50 steps x 60 layers x 24 heads, 8 rules, every step its own range."""
    rules = [Dense(), *(SinkWindow(sink=64, window=LengthLaw(a=64.0 * n)) for n in range(1, 8))]
    modules = tuple(
        [f"transformer_blocks.{i}.attn" for i in range(20)] + [f"single_transformer_blocks.{i}.attn" for i in range(40)]
    )
    info = INFO.model_copy(
        update={"modules": modules, "num_heads": (24,) * 60, "num_kv_heads": (24,) * 60, "head_dim": (128,) * 60}
    )
    steps = [
        (s, s + 1, {m: tuple(rules[(s + i + h) % 8].label for h in range(24)) for i, m in enumerate(modules)})
        for s in range(50)
    ]
    made = plan(
        base_model=info,
        rules={r.label: r for r in rules},
        assignments={},
        schedule=StepSchedule.of(50, steps),
        layout=None,
    )
    made.save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").stat().st_size < 2e6
    assert made.at_step(7).rule(modules[3], 5) == rules[(7 + 3 + 5) % 8]


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([(0, 3, {}), (2, 4, {})], "ascend"),
        ([(0, 11, {})], "ascend"),
        ([(3, 3, {})], "first < end"),
    ],
)
def test_bad_ranges(ranges: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepSchedule.of(10, ranges)


@pytest.mark.parametrize(
    ("choices", "message"),
    [({"a": "0 9"}, "rules 0 to"), ({"a": "0"}, "one per query head"), ({"c": "0"}, "lacks"), ({"a": "0 x"}, "'x'")],
)
def test_bad_choices(choices: dict[str, str], message: str) -> None:
    content = plan().to_dict()
    content["schedule"]["ranges"][1]["choices"] = choices
    with pytest.raises(ArtifactError, match=message):
        Plan.from_dict(content, source="plan.json")


def test_bad_refresh() -> None:
    with pytest.raises(ValueError, match="refresh must hold"):
        StepSchedule(num_steps=4, rules=(), ranges=(), refresh=(3, 1))
