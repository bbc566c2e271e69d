"""The whole comparison on a tiny model, with a clock that counts computed tiles."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_comparison import LENGTH, CountedTiles, TilePrices, window
from transformers import PreTrainedModel

from sparsesearch.bench.families import random_samples
from sparsesearch.cost import load_cost_model
from sparsesearch.equal_latency import compare, steps
from sparsesearch.equal_latency.compare import compare_at_latency
from sparsesearch.equal_latency.menus import ANSWERS, MENUS
from sparsesearch.equal_latency.record import EqualLatency
from sparsesearch.equal_latency.settle import Setting
from sparsesearch.errors import SpecError
from sparsesearch.plan import Plan
from sparsesearch.profiling.record import Profile
from sparsesearch.report.equal_latency import equal_latency_plot
from sparsesearch.runtime.live import AppliedPlan, apply


def test_families_meet_and_are_compared_pairwise(
    model: PreTrainedModel, profile: Profile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(compare, "Stopwatch", CountedTiles)
    judged = random_samples(64, LENGTH, 4, seed=1)
    setting = Setting((0.6,), ("mixture", "MoA", "uniform window"), rounds=1, final_rounds=3, tolerance=0.05)
    found = compare_at_latency(model, profile, setting, load_cost_model("roofline:h100"), judged[:2], judged[2:])
    row = found.targets["0.6"]
    assert list(row) == list(found.families) == ["mixture", "MoA", "uniform window"]
    assert row["mixture"].at_target
    for entry in row.values():
        assert entry.share >= 0.6 * 0.95, "nobody gets an easier target than the first"
        assert set(entry.excess) == {"kl", "kl_answer", "loss", "needle_error", "heldout_loss"}
        parts = (entry.excess[name].mean for name in ("kl", "kl_answer", "loss"))
        assert next(parts) + 0.1 * next(parts) == pytest.approx(next(parts), abs=1e-12)
    assert row["mixture"].excess["kl"].mean == 0.0
    own, theirs = row["mixture"].quality.kl_text.mean, row["MoA"].quality.kl_text.mean
    assert row["MoA"].excess["kl"].mean == pytest.approx(theirs - own, abs=1e-12)
    found.save(tmp_path / "found.json")
    assert EqualLatency.load(tmp_path / "found.json") == found
    assert equal_latency_plot(found).startswith("<svg")


TWO_TARGETS = Setting((0.6, 0.5), ("mixture", "uniform window"), rounds=1, final_rounds=1, tolerance=0.05)


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> list[CountedTiles]:
    """The stopwatch of every comparison of the test, in order."""
    made: list[CountedTiles] = []
    monkeypatch.setattr(compare, "Stopwatch", lambda *_: made.append(CountedTiles()) or made[-1])
    return made


def test_a_record_is_saved_as_it_grows_and_begins_the_next_run(
    model: PreTrainedModel, profile: Profile, clocks: list[CountedTiles]
) -> None:
    judged = random_samples(64, LENGTH, 2, seed=1)
    costs, grown, settled = load_cost_model("roofline:h100"), list[EqualLatency](), dict[float, dict[str, str]]()

    def keep(target: float, plans: Mapping[str, Plan]) -> None:
        assert len(grown) == len(settled), "before they are judged"
        settled[target] = {family: plan.sha256 for family, plan in plans.items()}

    found = compare_at_latency(
        model, profile, TWO_TARGETS, costs, judged[:1], judged[1:], settled=keep, saved=grown.append
    )
    assert settled == {
        float(at): {family: entry.plan_sha256 for family, entry in row.items()} for at, row in found.targets.items()
    }
    assert [list(record.targets) for record in grown] == [["0.6"], ["0.6", "0.5"]]
    assert grown[-1] == found
    looser = replace(TWO_TARGETS, tolerance=0.051)
    again = compare_at_latency(model, profile, looser, costs, judged[:1], judged[1:], begun=found)
    assert 0 < clocks[1].calls < clocks[0].calls, "budgets start where they ended"
    ends = [[entry.plan_sha256 for entry in one.targets["0.5"].values()] for one in (found, again)]
    assert ends[0] == ends[1]
    assert found.bounds(0.3) == {}


def test_an_interrupted_comparison_goes_on_after_its_last_whole_target(
    model: PreTrainedModel, profile: Profile, clocks: list[CountedTiles]
) -> None:
    judged = random_samples(64, LENGTH, 2, seed=1)
    costs, grown = load_cost_model("roofline:h100"), list[EqualLatency]()

    def interrupted(record: EqualLatency) -> None:
        grown.append(record)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare_at_latency(model, profile, TWO_TARGETS, costs, judged[:1], judged[1:], saved=interrupted)
    whole = compare_at_latency(model, profile, TWO_TARGETS, costs, judged[:1], judged[1:])
    rest = compare_at_latency(model, profile, TWO_TARGETS, costs, judged[:1], judged[1:], begun=grown[0])
    assert clocks[2].calls == clocks[1].calls - clocks[0].calls > 0, "the first target is not timed again"
    assert rest == whole
    compare_at_latency(model, profile, TWO_TARGETS, costs, judged[:1], judged[1:], begun=whole)
    assert clocks[3].calls == 0


def test_the_family_on_trial_chooses_among_parts_of_its_space_and_its_rivals(
    model: PreTrainedModel, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "Stopwatch", CountedTiles)
    judged, fresh = random_samples(64, LENGTH, 2, seed=1), random_samples(64, LENGTH, 2, seed=2)
    setting = Setting((0.6,), ("mixture", "MoA", "uniform window"), rounds=1, final_rounds=1, tolerance=0.05)
    costs = load_cost_model("roofline:h100")
    found = compare_at_latency(model, profile, setting, costs, judged[:1], judged[1:], choose_on=fresh)
    row = found.targets["0.6"]
    own = row["mixture"]
    assert set(own.tried) <= {*(menu.label for menu in MENUS), "as MoA"}
    assert "all rules" in own.tried
    assert ("as MoA" in own.tried) >= (row["MoA"].share <= 0.6 * 1.05), (
        "where a rival is as fast, its plan can be taken"
    )
    assert own.menu in own.tried
    assert list(row) == ["mixture", "MoA", "uniform window"]
    assert set(row["MoA"].tried) <= {"MoA"}
    assert row["uniform window"].menu is None
    assert row["uniform window"].tried == {}
    again = compare_at_latency(model, profile, setting, costs, judged[:1], judged[1:], choose_on=judged[:1])
    seen = again.targets["0.6"]
    if seen["MoA"].share <= 0.6 * 1.05:  # judged on what it chose on, it cannot lose to a rival that it could take
        kl = {name: entry.quality.kl_text.mean + 0.1 * entry.quality.kl_answer.mean for name, entry in seen.items()}
        assert kl["mixture"] <= kl["MoA"] + 1e-9


def test_steps_improve_every_family_within_its_own_space(
    model: PreTrainedModel, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "Stopwatch", CountedTiles)
    monkeypatch.setattr(steps, "BISECTIONS", 2)
    monkeypatch.setattr(steps, "SHARES", (0.1, 0.3))
    judged, fresh = random_samples(64, LENGTH, 2, seed=1), random_samples(64, LENGTH, 2, seed=2)
    families = ("mixture", ANSWERS, "MoA", "uniform window")
    setting = Setting((0.7,), families, rounds=1, final_rounds=1, tolerance=0.1, steps=1)
    costs = TilePrices()
    row = compare_at_latency(model, profile, setting, costs, judged[:1], judged[1:], choose_on=fresh).targets["0.7"]
    ours, theirs = row["mixture"], row["MoA"]
    assert row["MoA"].share <= 0.77, "else it is not improved"
    stepped = {family: [name for name in row[family].tried if name.startswith("step 1, ")] for family in row}
    assert len(stepped["mixture"]) >= 2
    assert len(stepped["MoA"]) >= 2
    assert len(stepped[ANSWERS]) >= 2
    assert not set(stepped["mixture"]) & (set(stepped["MoA"]) | set(stepped[ANSWERS]))
    assert stepped["uniform window"] == []
    assert ours.menu in ours.tried
    assert set(theirs.rules) <= {"dense", "sink_window"}
    assert theirs.tried[theirs.menu or ""] <= theirs.tried["MoA"]
    assert ours.share <= 0.77, "a step never takes more than the target's time"
    assert 0.63 <= theirs.share <= 0.77


def test_steps_without_sequences_to_judge_on_are_refused(model: PreTrainedModel, profile: Profile) -> None:
    judged, setting = random_samples(64, LENGTH, 2, seed=1), Setting((0.6,), ("mixture", "MoA"), steps=1)
    with pytest.raises(SpecError, match="choose_on"):
        compare_at_latency(model, profile, setting, load_cost_model("roofline:h100"), judged[:1], judged[1:])


def test_a_plan_is_put_together_once_for_all_that_judges_it(model: PreTrainedModel) -> None:
    put: list[Plan] = []

    def counting(live: PreTrainedModel, plan: Plan) -> AppliedPlan:
        put.append(plan)
        return apply(live, plan)

    kept, prompt = compare._Kept(counting), random_samples(64, LENGTH, 1, seed=2)[0].input_ids[None]
    narrow, wide = window(model, 64), window(model, 256)
    seen = []
    for plan in (narrow, wide, narrow):
        with kept(model, plan), torch.no_grad():
            seen.append(model(prompt).logits)
    assert put == [narrow, wide]
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": (1.5,)}, "between 0 and 1"),
        ({"families": ("mixture",)}, "at least two"),
        ({"rounds": 0}, "rounds >= 1"),
    ],
)
def test_settings_that_say_nothing_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Setting(**change)
