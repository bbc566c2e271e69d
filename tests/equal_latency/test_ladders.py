"""Ladders, the parts of a space, and what heads cost in them."""

from dataclasses import replace

import numpy as np
import pytest
from tiny_comparison import LENGTH, TilePrices

from sparsesearch.cost import load_cost_model
from sparsesearch.cost.predict import predict_layers
from sparsesearch.equal_latency.ladders import SearchedLadder, ladders
from sparsesearch.equal_latency.menus import ANSWERS, MENUS, Menu, family_ladders
from sparsesearch.equal_latency.replay import Replay
from sparsesearch.equal_latency.shared_choices import SharedChoices
from sparsesearch.equal_latency.unit_prices import bound_for, replayed
from sparsesearch.model_shapes import heads_alone
from sparsesearch.plan import uniform_plan
from sparsesearch.profiling.proxies import length_terms
from sparsesearch.profiling.record import Profile
from sparsesearch.rules import LengthLaw, Rule
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.sink_window import SinkWindow
from sparsesearch.rules.zero import Zero
from sparsesearch.scoring import Question, score_table
from sparsesearch.search.budget import Budget
from sparsesearch.search_space import SearchSpace
from sparsesearch.workload import Workload


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
        around = ladder.around(np.where(np.arange(len(ladder.columns)) == choice[:, None], 0.0, 1.0), "stay", 1.0)
        assert around.at(bound).assignments == plan.assignments
    taken = ladder.choice_of(found["MoA"].at(0.7))
    assert (taken is None) == (family == "DuoAttention"), "a space that lacks a rule says so"


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
