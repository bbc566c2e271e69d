"""Plans with reuse, from profile to replay, on a tiny model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sparsesearch
from sparsesearch.calibration import Calibration, Sample
from sparsesearch.cost import UnitWork
from sparsesearch.errors import BudgetInfeasibleError, SpecError
from sparsesearch.evaluate.density import TileCount, achieved_density, counting
from sparsesearch.index_reuse import overlap_path, reused_in_decoding, search_reuse
from sparsesearch.plan import Plan
from sparsesearch.profiling.reuse import ReuseScores, map_heads, score_reuse
from sparsesearch.profiling.reuse_menu import reuse_menu
from sparsesearch.profiling.run import Request, profile_model
from sparsesearch.reuse_lanes import ReuseQuestion, lanes_of, resources
from sparsesearch.rules.dense import Dense
from sparsesearch.runtime.cache_keyword import CACHE_KEYWORD
from sparsesearch.runtime.fingerprint import describe
from sparsesearch.search.budget import Budget
from sparsesearch.search_space import SearchSpace

LENGTH = 160
SPACE = """
name: test
source: tests
description: one window, one estimator
block_tokens: 16
unit: query_head
candidates:
  - {kind: sink_window, sink: 16, window: [16, 64]}
  - {kind: pooled_topk, keep: {b: [0.2, 0.4]}, sink: 16}
  - {kind: fixed_blocks, keep: 0.4}
"""


def samples(count: int = 2) -> tuple[Sample, ...]:
    generator = torch.Generator().manual_seed(3)
    mask = torch.zeros(LENGTH, dtype=torch.bool)
    mask[-4:] = True
    return tuple(Sample(torch.randint(0, 64, (LENGTH,), generator=generator), mask, "tests") for _ in range(count))


@pytest.fixture
def asked(tiny: Any, tmp_path: Path) -> tuple[Any, Any]:
    """A model whose layers are alike, so that reuse is worth something, and its profile."""
    model = tiny("llama", num_hidden_layers=4)
    for layer in range(1, 4):
        for name in ("q_proj", "k_proj"):
            own, first = (getattr(model.model.layers[at].self_attn, name).weight for at in (layer, 0))
            own.data.copy_(0.9 * first.data + 0.1 * own.data)
    space = SearchSpace.parse(SPACE, where="tests")
    request = Request(describe(model, "tiny"), space, {LENGTH: Calibration(samples(), "tests")}, num_probes=2)
    return model, profile_model(model, request, tmp_path / "profile")


@pytest.mark.parametrize("unit", ["layer", "kv_group"])
def test_reuse_within_a_budget(asked: tuple[Any, Any], unit: Any, tmp_path: Path) -> None:
    model, profile = asked
    menu = reuse_menu(profile, [0.3], span=3, unit=unit)
    question = ReuseQuestion(menu, budgets=(Budget("density", 0.7),))
    plan, rounds = search_reuse(model, question, {LENGTH: samples()}, passes=2)
    assert 1 <= len(rounds) <= 2
    assert rounds[0].under == "dense"
    assert plan.certificate is not None
    assert plan.certificate.gap <= 1e-4
    assert plan.budgets[0].predicted[str(LENGTH)] <= 0.7 + 1e-9
    best = min(rounds, key=lambda one: one.joint)
    assert plan.provenance["pass_kept"] == rounds.index(best) + 1
    count = TileCount()
    with counting(plan, count), sparsesearch.apply(model, plan), torch.no_grad():
        for sample in samples():
            model(sample.input_ids[None], use_cache=False)
    if rounds.index(best) == 0:  # under dense the tiles of later layers are those of dense inputs
        assert achieved_density(plan, LENGTH, count) == pytest.approx(plan.budgets[0].predicted[str(LENGTH)], abs=0.05)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_reuse_only_lowers_the_predicted_loss(asked: tuple[Any, Any]) -> None:
    """More choices never lose: the same budget with and without anything to reuse."""
    model, profile = asked
    losses = []
    for span in (1, 3):
        menu = reuse_menu(profile, [0.3], span=span, unit="kv_group")
        question = ReuseQuestion(menu, budgets=(Budget("density", 0.5),))
        plan, _ = search_reuse(model, question, {LENGTH: samples()}, passes=1)
        assert plan.certificate is not None
        losses.append(plan.certificate.loss)
    assert losses[1] <= losses[0] * (1 + 1e-4)


@pytest.mark.parametrize(("objective", "limits"), [("hylra", {"threshold": 0.6}), ("rals", {"max_refreshes": 1})])
def test_published_objectives(asked: tuple[Any, Any], objective: Any, limits: dict[str, Any]) -> None:
    model, profile = asked
    menu = reuse_menu(profile, [0.3], span=3, unit="layer")
    plan, rounds = search_reuse(model, ReuseQuestion(menu, objective, **limits), {LENGTH: samples()}, passes=3)
    kinds = [{rule.kind for rule in plan.module_rules(module)} for module in plan.base_model.modules]
    assert kinds[0] == {"dense_source"}
    assert all(kind in ({"dense_source"}, {"reuse"}) for kind in kinds)
    assert plan.provenance["refreshing_layers"] == sum(kind == {"dense_source"} for kind in kinds)
    if objective == "rals":
        assert plan.provenance["refreshing_layers"] <= 2
    else:
        assert plan.provenance["least_overlap"] >= 0.6
    assert len(rounds) <= 3
    with sparsesearch.apply(model, plan), torch.no_grad():
        assert model(samples()[0].input_ids[None]).logits.isfinite().all()


def test_overlaps_are_merged_over_groups(asked: tuple[Any, Any]) -> None:
    _, profile = asked
    menu = reuse_menu(profile, [0.3], span=3, unit="layer")
    overlap = np.zeros((4, 3, 4, 2))
    overlap[0, 0, 1:] = [[0.9, 0.7], [0.9, 0.5], [0.9, 0.1]]
    scores = ReuseScores(*(np.zeros((4, 2, 6)) for _ in range(3)), *(overlap for _ in range(5)))
    assert overlap_path(ReuseQuestion(menu, "hylra", threshold=0.7), scores).source.tolist() == [0, 0, 0, 3]


def test_questions_that_cannot_be_are_refused(asked: tuple[Any, Any]) -> None:
    model, profile = asked
    menu = reuse_menu(profile, [0.3], span=3, unit="kv_group")
    with pytest.raises(SpecError, match="--budget"):
        ReuseQuestion(menu)
    with pytest.raises(SpecError, match="per layer"):
        ReuseQuestion(menu, "hylra")
    with pytest.raises(SpecError, match="density"):
        ReuseQuestion(menu, budgets=(Budget("kv_fraction", 0.5),))
    with pytest.raises(
        BudgetInfeasibleError, match=r"no plan fits density=0\.01: .* are density=0\.\d+\. Raise the budget"
    ):
        search_reuse(model, ReuseQuestion(menu, budgets=(Budget("density", 0.01),)), {LENGTH: samples()}, passes=1)


class DearChoosing:
    """Attention by tiles; choosing them costs as much as dense attention."""

    name, device, measured, decode_call_s = "dear", "none", False, 0.0

    def unit_latency_s(self, work: UnitWork) -> float:
        blocks = -(-work.kv_len // work.block_tokens)
        dense = work.query_heads * blocks * (blocks + 1) / 2
        tiles = {"dense": dense, "tiles": work.tiles}.get(work.kind, 0.0)
        return tiles + (dense if work.estimator in ("pooled_topk", "dense_source") else 0.0)

    def latency_s(self, works: Sequence[UnitWork]) -> np.ndarray:
        return np.array([self.unit_latency_s(work) for work in works])

    def decode_latency_s(self, works: object) -> np.ndarray:
        raise NotImplementedError


def test_seconds_of_choosing_are_saved_by_reuse_alone(asked: tuple[Any, Any]) -> None:
    """Tiles cost the same whoever chose them, so a density budget cannot see what a reuse saves; seconds can."""
    model, profile = asked
    menu = reuse_menu(profile, [0.3], span=3, unit="kv_group")
    heads = map_heads(model, menu, samples())
    scores = {LENGTH: score_reuse(model, menu, heads, samples())}
    asked_for = ReuseQuestion(menu, budgets=(Budget("latency", 0.7), Budget("density", 0.9)), cost_model=DearChoosing())
    assert resources(asked_for, (LENGTH,)) == [("latency", LENGTH), ("density", LENGTH)]
    lane = lanes_of(asked_for, heads, scores, {LENGTH: (1.0, 1.0)})[0]
    dynamic = [place for place, rule in enumerate(menu.rules) if rule.kind == "pooled_topk"]
    static = [place for place, rule in enumerate(menu.rules) if rule.kind == "sink_window"]
    dense = lane.cost[:, 0]
    assert np.allclose(dense[:, 0], dense[:, 1]), "a dense head's seconds are its tiles here"
    assert np.allclose(lane.cost[:, dynamic, 0], lane.cost[:, dynamic, 1] + dense[:, None, 0])
    assert np.allclose(lane.cost[:, static, 0], lane.cost[:, static, 1])
    assert np.allclose(lane.reuse_cost[..., 0], lane.reuse_cost[..., 1]), "a reuse chooses nothing"
    plan, _ = search_reuse(model, asked_for, {LENGTH: samples()}, passes=1)
    assert {record.metric for record in plan.budgets} == {"latency", "density"}
    assert plan.budgets[0].cost_model == "dear"
    assert all(value <= record.bound * (1 + 1e-9) for record in plan.budgets for value in record.predicted.values())
    with pytest.raises(SpecError, match="--cost-model"):
        ReuseQuestion(menu, budgets=(Budget("latency", 0.5),))


def test_decoded_tokens_reuse_where_the_source_can_choose_for_them(asked: tuple[Any, Any]) -> None:
    """HyLRA's dense layers leave a selection for every token; generated tokens then attend to that only."""
    model, profile = asked
    menu = reuse_menu(profile, [0.2], span=3, unit="layer")
    plan, _ = search_reuse(model, ReuseQuestion(menu, "hylra", threshold=0.0), {LENGTH: samples()}, passes=1)
    both = reused_in_decoding(plan)
    kinds = [{(rule.kind, rule.decodes) for rule in both.module_rules(module)} for module in both.base_model.modules]
    assert kinds == [{("dense_source", True)}, *[{("reuse", True)}] * 3]
    assert Plan.from_dict(both.to_dict(), source="tests").assignments == both.assignments
    ids = samples()[0].input_ids[None]
    outputs = {}
    for name, one in (("prompt", plan), ("both", both)):
        with torch.no_grad(), sparsesearch.apply(model, one):
            first = model(ids)
            cache = {CACHE_KEYWORD: first[CACHE_KEYWORD]}
            outputs[name] = first.logits, model(ids[:, :1], **cache).logits
    assert torch.equal(outputs["prompt"][0], outputs["both"][0])
    assert not torch.allclose(outputs["prompt"][1], outputs["both"][1], atol=1e-3)
    windows = plan.model_copy(
        update={"assignments": dict.fromkeys(plan.assignments, ("dense",) * 4), "rules": {"dense": Dense()}}
    )
    with pytest.raises(SpecError, match="none does"):
        reused_in_decoding(windows)
