"""The whole comparison on a tiny model, with a clock that counts computed tiles; and the parts of a timed evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparsesearch.bench.families import random_samples
from sparsesearch.calibration import Calibration
from sparsesearch.comparison import TileShares
from sparsesearch.cost import load_cost_model
from sparsesearch.cost.base import DecodeWork, UnitWork
from sparsesearch.cost.predict import predict_layers
from sparsesearch.equal_latency import compare
from sparsesearch.equal_latency.compare import compare_at_latency
from sparsesearch.equal_latency.ladders import SearchedLadder, ladders
from sparsesearch.equal_latency.menus import ANSWERS, MENUS, Menu, family_ladders
from sparsesearch.equal_latency.record import EqualLatency
from sparsesearch.equal_latency.settle import Replay, Setting
from sparsesearch.equal_latency.shared_choices import SharedChoices
from sparsesearch.equal_latency.standings import Standing, chosen
from sparsesearch.equal_latency.unit_prices import bound_for, replayed
from sparsesearch.errors import SpecError, UnsupportedModelError
from sparsesearch.evaluate.head import Head
from sparsesearch.evaluate.predicted import predicted_seconds
from sparsesearch.evaluate.timing import Stopwatch, prefill_seconds
from sparsesearch.model_shapes import heads_alone
from sparsesearch.plan import Plan, uniform_plan
from sparsesearch.profiling.proxies import length_terms
from sparsesearch.profiling.record import Profile
from sparsesearch.profiling.run import Request, profile_model
from sparsesearch.report.equal_latency import equal_latency_plot
from sparsesearch.rules import LengthLaw, Rule
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.sink_window import SinkWindow
from sparsesearch.rules.zero import Zero
from sparsesearch.runtime.fingerprint import describe
from sparsesearch.runtime.live import AppliedPlan, apply
from sparsesearch.scoring import Question, score_table
from sparsesearch.search.budget import Budget
from sparsesearch.search_space import SearchSpace
from sparsesearch.workload import Workload

LENGTH = 512


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    config = transformers.AutoConfig.for_model(
        "llama", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=64, max_position_embeddings=1024, initializer_range=0.2, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def profile(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    samples = random_samples(64, LENGTH, 1, seed=0)
    request = Request(describe(model, "tiny"), SearchSpace.load("mixture"), {LENGTH: Calibration(samples, "random")}, 1)
    return profile_model(model, request, tmp_path_factory.mktemp("profile") / "profile")


def window(model: PreTrainedModel, tokens: int) -> Plan:
    rule = SinkWindow(sink=64, window=LengthLaw(a=tokens))
    return uniform_plan(describe(model, "tiny"), rule, block_tokens=64, lengths_tokens=(LENGTH,))


class CountedTiles:
    """Time is 0.2 + 0.8 times the share of tiles: what the cost model says of this tiny model does not matter."""

    def __init__(self, *_: Any) -> None:
        self.calls = 0

    def __call__(self, plans: Mapping[str, Plan | None], **_: Any) -> dict[str, tuple[float, ...]]:
        self.calls += 1
        return {name: (0.2 + 0.8 * self.share(plan),) * 3 for name, plan in plans.items()}

    @staticmethod
    def share(plan: Plan | None) -> float:
        return 1.0 if plan is None else TileShares(plan, LENGTH).mean([rule for _, _, rule in plan.heads()]) or 0.0


class TilePrices:
    """Seconds are tiles."""

    name, device, measured, decode_call_s = "tiles", "none", False, 0.0

    def latency_s(self, works: Sequence[UnitWork]) -> np.ndarray:
        dense = [work.query_heads * work.query_blocks * (work.query_blocks + 1) / 2 for work in works]
        return np.array(
            [w.tiles if w.kind == "tiles" else d * (w.kind == "dense") for w, d in zip(works, dense, strict=True)]
        )

    def decode_latency_s(self, works: Sequence[DecodeWork]) -> np.ndarray:
        return np.zeros(len(works))


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
        assert set(entry.excess) == {"kl", "kl_answer", "needle_error", "heldout_loss"}
    assert row["mixture"].excess["kl"].mean == 0.0
    own, theirs = row["mixture"].quality.kl_text.mean, row["MoA"].quality.kl_text.mean
    assert row["MoA"].excess["kl"].mean == pytest.approx(theirs - own, abs=1e-12)
    found.save(tmp_path / "found.json")
    assert EqualLatency.load(tmp_path / "found.json") == found
    assert equal_latency_plot(found).startswith("<svg")


def test_a_record_is_saved_as_it_grows_and_begins_the_next_run(
    model: PreTrainedModel, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks: list[CountedTiles] = []
    monkeypatch.setattr(compare, "Stopwatch", lambda *_: clocks.append(CountedTiles()) or clocks[-1])
    judged = random_samples(64, LENGTH, 2, seed=1)
    setting = Setting((0.6, 0.5), ("mixture", "uniform window"), rounds=1, final_rounds=1, tolerance=0.05)
    costs, grown = load_cost_model("roofline:h100"), list[EqualLatency]()
    found = compare_at_latency(model, profile, setting, costs, judged[:1], judged[1:], saved=grown.append)
    assert [list(record.targets) for record in grown] == [["0.6"], ["0.6", "0.5"]]
    assert grown[-1] == found
    again = compare_at_latency(model, profile, setting, costs, judged[:1], judged[1:], begun=found)
    assert clocks[1].calls < clocks[0].calls, "budgets start where they ended"
    assert again.bounds(0.5) == found.bounds(0.5)
    assert found.bounds(0.3) == {}


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
    assert set(own.tried) <= {*(menu.label for menu in MENUS), "MoA"}
    assert "all rules" in own.tried
    assert ("MoA" in own.tried) == (row["MoA"].share <= 0.6 * 1.05), "what is slower is not taken"
    assert own.menu in own.tried
    assert list(row) == ["mixture", "MoA", "uniform window"]
    assert set(row["MoA"].tried) <= {"MoA"}
    assert row["uniform window"].menu is None
    assert row["uniform window"].tried == {}
    again = compare_at_latency(model, profile, setting, costs, judged[:1], judged[1:], choose_on=judged[:1])
    seen = again.targets["0.6"]
    if "MoA" in seen["mixture"].tried:  # judged on what it chose on, it cannot lose to a rival that it could take
        kl = {name: entry.quality.kl_text.mean + 0.1 * entry.quality.kl_answer.mean for name, entry in seen.items()}
        assert kl["mixture"] <= kl["MoA"] + 1e-9


def test_steps_improve_every_family_within_its_own_space(
    model: PreTrainedModel, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "Stopwatch", CountedTiles)
    judged, fresh = random_samples(64, LENGTH, 2, seed=1), random_samples(64, LENGTH, 3, seed=2)
    setting = Setting((0.7,), ("mixture", "MoA", "uniform window"), rounds=1, final_rounds=1, tolerance=0.1, steps=1)
    costs = TilePrices()
    row = compare_at_latency(model, profile, setting, costs, judged[:1], judged[1:], choose_on=fresh).targets["0.7"]
    ours, theirs = row["mixture"], row["MoA"]
    assert row["MoA"].share <= 0.77, "else it is not improved"
    stepped = {family: [name for name in row[family].tried if name.startswith("step 1, price")] for family in row}
    assert len(stepped["mixture"]) >= 2
    assert len(stepped["MoA"]) >= 2
    assert not set(stepped["mixture"]) & set(stepped["MoA"])
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


@pytest.mark.parametrize("family", ["mixture", "DuoAttention"])
def test_a_ladder_knows_its_own_plans_again(profile: Profile, family: str) -> None:
    found = ladders(profile, [family, "MoA"], Workload(LENGTH, batch=8), TilePrices())
    ladder = found[family]
    assert isinstance(ladder, SearchedLadder)
    for bound in (max(0.5, ladder.lowest), 0.9):
        plan = ladder.at(bound)
        choice = ladder.choice_of(plan)
        assert choice is not None
        assert ladder.bound_of(choice) <= bound * (1 + 1e-6)
        around = ladder.around(np.where(np.arange(len(ladder.columns)) == choice[:, None], 0.0, 1.0), "stay")
        assert around.at(bound).assignments == plan.assignments
    taken = ladder.choice_of(found["MoA"].at(0.7))
    assert (taken is None) == (family == "DuoAttention"), "a space that lacks a rule says so"


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"a": (0.9, 0.9), "b": (0.5, 0.8)}, "b"),
        ({"a": (0.9, 0.9), "b": (1.1, 0.1)}, "a"),
        ({"a": (0.9, 1.5), "b": (1.2, 0.1)}, "rival"),
        ({"a": (1.1, 0.1)}, "rival"),
    ],
)
def test_nothing_is_taken_that_a_rival_beats_in_one_way(parts: dict[str, tuple[float, float]], expected: str) -> None:
    """Losses over all positions and at answers; the rival's are 1 and 1, so it can always be taken itself."""
    assert chosen_among(parts, {"rival": (1.0, 1.0)}) == expected


def test_text_counts_first_where_different_rivals_lead() -> None:
    rivals = {"text": (0.5, 2.0), "answers": (2.0, 0.5)}
    assert chosen_among({"a": (0.5, 1.0), "b": (0.4, 1.5), "c": (0.6, 0.1)}, rivals) == "a"


def chosen_among(parts: Mapping[str, tuple[float, float]], rivals: Mapping[str, tuple[float, float]]) -> str:
    rung: Any = None

    def standings(given: Mapping[str, tuple[float, float]]) -> list[Standing]:
        return [Standing(name, rung, rung, torch.tensor([text + at]), text) for name, (text, at) in given.items()]

    theirs = standings(rivals)
    return chosen([*standings(parts), *theirs], theirs).label


def test_the_mixture_for_answers_is_static_and_keeps_more_answers(profile: Profile) -> None:
    workload, costs = Workload(LENGTH, batch=8), TilePrices()
    found = family_ladders(profile, ["MoA", ANSWERS, "mixture"], workload, costs)
    assert list(found) == ["MoA", ANSWERS, "mixture"]
    terms = length_terms(profile, LENGTH, "query_head").proxies["answer"]

    def answer_loss(family: str) -> float:
        ladder = found[family]
        assert isinstance(ladder, SearchedLadder)
        choice = ladder.choice_of(ladder.at(0.8))
        assert choice is not None
        return float(terms[np.arange(len(choice)), np.array(ladder.columns)[choice]].sum())

    assert answer_loss(ANSWERS) <= answer_loss("mixture")
    plan = found[ANSWERS].at(0.8)
    assert not any(rule.dynamic or rule.needs_calibration or rule.rest != "drop" for rule in plan.rules.values())


def test_a_menu_says_what_it_leaves_out() -> None:
    labels = [menu.label for menu in MENUS]
    assert len(set(labels)) == len(MENUS)
    rules = {rule.label: rule for rule in SearchSpace.load("mixture").candidates}
    quiet = Menu(silent_heads=False)
    assert not quiet.allows(rules["zero"])
    assert quiet.allows(rules["fixed_blocks(keep=0.1)"])
    assert not Menu(bitmaps=False).allows(rules["fixed_blocks(keep=0.1)"])


def test_a_layer_pays_for_choosing_once(profile: Profile) -> None:
    """Whatever heads choose, their shares add up to the layer's call; a layer where none chooses asks the first one for all of it."""
    costs, workload = load_cost_model("h200"), Workload(LENGTH, batch=2)
    question = Question((Budget("latency", 1.0),), cost_model=costs, workloads=(workload,))
    table = score_table(profile, question)
    shared = SharedChoices.of(profile, question, table)
    assert shared is not None
    column = table.candidates.index(next(label for label in table.candidates if label.startswith("vertical_slash")))
    static = [kind is None for kind in shared.kinds]
    usual = costs.estimator_s("vertical_slash", LENGTH, 8 * 2) / 8
    choice = np.zeros(8, dtype=int)
    choice[:3] = column  # three heads of the first layer
    extra = shared.charged(table, choice).costs["latency"] - table.costs["latency"]
    assert not extra[:, static].any()
    assert extra[:3, column, 0] + usual == pytest.approx(costs.estimator_s("vertical_slash", LENGTH, 3 * 2) / 3)
    assert extra[4:, column, 0] + usual == pytest.approx(costs.estimator_s("vertical_slash", LENGTH, 2))


def test_heads_cost_their_share_of_a_replayed_layer(profile: Profile) -> None:
    """Prices of a plan whose heads all follow one static rule add up to what its replayed layers take beyond empty ones."""
    costs, workload = load_cost_model("h200"), Workload(LENGTH, batch=8)
    question = Question((Budget("latency", 1.0),), cost_model=costs, workloads=(workload,))
    plain = score_table(profile, question)
    priced = replayed(profile, question, plain)
    info = profile.manifest.base_model
    shape = heads_alone("tiny", info.geometry)

    def seconds(rule: Rule) -> float:
        plan = uniform_plan(info, rule, block_tokens=64, lengths_tokens=(LENGTH,))
        return sum(layer.attention_s for layer in predict_layers(plan, shape, workload, costs))

    for label in ("sink_window(sink=64,window=128)", "tri_shape(sink=64,window=64,last=128)"):
        column = priced.candidates.index(label)
        (rule,) = (one for one in profile.manifest.candidates if one.label == label)
        assert priced.costs["latency"][:, column].sum() == pytest.approx(seconds(rule) - seconds(Zero()))
    wide = SinkWindow(sink=0, window=LengthLaw(a=LENGTH))
    assert priced.costs["latency"][:, 0].sum() == pytest.approx(seconds(wide) - seconds(Zero())), "dense beside sparse"
    assert (priced.costs["density"] == plain.costs["density"]).all()
    bitmaps = [index for index, label in enumerate(priced.candidates) if label.startswith("fixed_blocks")]
    more = (priced.costs["latency"] - plain.costs["latency"])[:, bitmaps]
    windows = [index for index, label in enumerate(priced.candidates) if label.startswith("sink_window")]
    known = (priced.costs["latency"] - plain.costs["latency"])[:, windows]
    assert known.min() <= more.min() <= more.max() <= known.max()
    assert replayed(profile, replace(question, cost_model=TilePrices()), plain) is plain
    bound = bound_for(profile, question, priced, 3.0)
    assert bound is not None
    whole = seconds(Dense())
    assert seconds(Zero()) + bound * priced.costs["latency"][:, 0].sum() == pytest.approx(3.0 * whole)
    assert bound_for(profile, replace(question, cost_model=TilePrices()), plain, 0.5) is None


def test_replayed_shares_fall_with_the_budget_and_start_near_the_target(profile: Profile) -> None:
    costs = load_cost_model("h200")
    workload = Workload(LENGTH, batch=8)
    replay = Replay(profile, workload, costs)
    ladder = ladders(profile, ["uniform window"], workload, costs)["uniform window"]
    shares = [replay(ladder.at(bound)) for bound in (0.125, 0.5, 1.0)]
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1]
    assert ladder.at(0.5) is not ladder.at(0.25)


def test_a_plan_is_put_together_once_however_often_it_is_timed(model: PreTrainedModel) -> None:
    prompt = random_samples(64, LENGTH, 1, seed=2)[0].input_ids[None]
    put: list[Plan] = []

    def counting(live: PreTrainedModel, plan: Plan) -> AppliedPlan:
        put.append(plan)
        return apply(live, plan)

    stopwatch, narrow, wide = Stopwatch(Head(model), prompt, counting), window(model, 64), window(model, 256)
    times = stopwatch({"dense": None, "narrow": narrow, "wide": wide}, rounds=3, part="attention")
    assert {name: len(runs) for name, runs in times.items()} == {"dense": 3, "narrow": 3, "wide": 3}
    stopwatch({"narrow": narrow}, rounds=2)
    assert put == [narrow, wide]
    stopwatch({"wide": wide}, rounds=1, part="attention")
    assert put == [narrow, wide, wide], "what a call does not name is not kept"


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
    summed = predicted_seconds(model, variants, 4096, load_cost_model("cpu"))
    replayed = predicted_seconds(model, variants, 4096, load_cost_model("h200"))
    assert all(set(found) == {"attention_s"} for found in summed.values())
    assert all(0 < found["attention_s"] < found["prefill_s"] for found in replayed.values())
    for found in (summed, replayed):
        assert found["window"]["attention_s"] < found["dense"]["attention_s"]
    assert predicted_seconds(model, {"dense": None}, 4096, load_cost_model("cpu")) == {}


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
