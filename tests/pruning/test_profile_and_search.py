"""Menus, measured corrections, the search over sublayers, and compensation."""

from itertools import pairwise
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from pruning_models import CLASSES, batches_for, tiny_model

from sparsesearch.cut import Compensation
from sparsesearch.errors import ArtifactError, BudgetInfeasibleError, SpecError
from sparsesearch.plan import Plan
from sparsesearch.pruning.compensate import compensate
from sparsesearch.pruning.live import narrowed
from sparsesearch.pruning.menus import CRITERIA, Criterion
from sparsesearch.pruning.moments import collect
from sparsesearch.pruning.prices import SublayerSize, flops, memory_bytes, params
from sparsesearch.pruning.profile_run import PruningRequest, profile_pruning
from sparsesearch.pruning.quality import dense_rows, mean_distance
from sparsesearch.pruning.record import PruningProfile
from sparsesearch.pruning.search import PruningQuestion, find_cut, pruning_table, uniform_cut
from sparsesearch.pruning.validation import validate_criteria
from sparsesearch.runtime.sublayers import layers_of
from sparsesearch.search.budget import Budget, parse_budgets
from sparsesearch.search.exhaustive import solve_exhaustive
from sparsesearch.search.solve import solve
from sparsesearch.search_space import PruningMenu

MENU = PruningMenu(channel_multiple=16, measured_options=2)


def profiled(model, folder, **changes):
    batches = batches_for(model)
    request = PruningRequest("tiny", MENU, batches, batches[:1], {"data": "random"}, num_probes=2, **changes)
    return profile_pruning(model, request, folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    model = tiny_model("llama")
    return model, profiled(model, tmp_path_factory.mktemp("llama"), learn_masks=6)


@pytest.mark.parametrize("family", sorted(CLASSES))
def test_every_family_profiles_searches_and_is_repaired(family, tmp_path):
    model = tiny_model(family)
    profile = profiled(model, tmp_path)
    assert profile.manifest.causal == (family not in ("bert", "vit"))
    assert profile.manifest.distance == ("cosine" if family == "bert" else "kl")
    plan = find_cut(profile, PruningQuestion((Budget("params", 0.7),), (33,), compensation=None))
    batches = batches_for(model)
    dense = dense_rows(model, batches)
    with narrowed(model, plan.pruning):
        plain = mean_distance(model, batches, dense)
    with narrowed(model, plan.pruning, compensate(model, plan.pruning, batches)):
        assert mean_distance(model, batches, dense) < plain
    assert mean_distance(model, batches, dense) == 0.0, "the model is as before"


def test_moments_are_those_of_plain_code(llama):
    model, _ = llama
    batches = batches_for(model)
    found = collect(model, batches, num_probes=2)
    layer = layers_of(model)[1]
    seen = []
    handle = layer.projection(layer.feed_forward.out).register_forward_hook(lambda m, args, out: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    x = torch.cat([part.flatten(0, 1) for part in seen]).double()
    own = found[f"{layer.path}.{layer.feed_forward.out}"]
    torch.testing.assert_close(own.second_moment, x.t() @ x / len(x), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(own.mean, x.mean(0), rtol=1e-4, atol=1e-6)


def test_menus_start_whole_end_empty_and_stay_in_order(llama):
    _, profile = llama
    for criterion in (*CRITERIA, "learned", "measured"):
        for index, kind in profile.sublayers():
            menu = profile.options(index, kind, criterion)
            assert menu[0].removed == ()
            assert menu[0].loss == 0
            assert len(menu[-1].removed) == (4 if kind == "attention" else 48)
            if kind == "feed_forward":
                assert [48 - len(option.removed) for option in menu] == [48, 32, 16, 0]
    sizes = {len(option.removed) for option in profile.options(0, "attention", "reconstruction")}
    assert sizes == {0, 2, 3, 4}, "whole, one group or one head of each, one head of one group, none"


def test_measured_losses_replace_predicted_ones_where_they_were_measured(llama):
    _, profile = llama
    for index, kind in profile.sublayers():
        places, losses = profile.measured(index, kind)
        menu = profile.options(index, kind, "measured")
        np.testing.assert_allclose([menu[place].loss for place in places], losses, rtol=1e-9)


def test_the_search_is_exact_on_its_table(llama):
    _, profile = llama
    question = PruningQuestion((Budget("params", 0.7), Budget("memory", 0.8)), (64,), "reconstruction")
    whole = pruning_table(profile, question).scores
    # the first four units alone, so that every plan can be tried
    small = type(whole)(
        whole.units[:4], whole.candidates, whole.lengths, whole.loss[:4],
        {metric: cost[:4] for metric, cost in whole.costs.items()}, 0, whole.valid[:4],
    )  # fmt: skip
    assert solve(small, question.budgets, gap_target=0).loss == pytest.approx(
        solve_exhaustive(small, question.budgets).loss, rel=1e-9
    )


def test_prices_are_the_models_own(llama):
    model, profile = llama
    shape, layer = profile.manifest.layers[0], layers_of(model)[0]
    attention = sum(layer.projection(name).weight.numel() for name in (*layer.attention.into, layer.attention.out))
    ffn = sum(layer.projection(name).weight.numel() for name in (*layer.feed_forward.into, layer.feed_forward.out))
    whole, wide = SublayerSize(heads=4, kv_heads=2), SublayerSize(channels=48)
    assert (params(shape, whole), params(shape, wide)) == (attention, ffn)
    assert flops(shape, wide, 7, causal=True) == 2 * 7 * ffn
    assert flops(shape, whole, 3, causal=True) == 2 * 3 * attention + 4 * 6 * 32
    assert memory_bytes(shape, whole, 5, causal=True, dtype_bytes=2) == 2 * (attention + 2 * 2 * 8 * 5)


@pytest.mark.parametrize("budget", ["params=0.8x", "flops=0.7", "memory=0.75,params=0.8", "latency=0.8x"])
def test_budgets_hold_and_plans_survive_their_file(llama, budget, tmp_path):
    from sparsesearch.cost import load_cost_model

    _, profile = llama
    where = Compensation(data="text", length_tokens=32, num_samples=2, seed=0, bias=True)
    cost_model = load_cost_model("roofline:h100") if "latency" in budget else None
    question = PruningQuestion(parse_budgets(budget), (64, 256), cost_model=cost_model, compensation=where)
    plan = find_cut(profile, question)
    for record in plan.budgets:
        assert max(record.predicted.values()) <= record.bound + 1e-9
    assert plan.certificate.gap <= 1e-4
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_plans_without_removals_keep_their_bytes(llama):
    _, profile = llama
    plan = find_cut(profile, PruningQuestion((Budget("params", 0.9),), (64,)))
    assert "pruning" in plan.to_dict()
    assert "pruning" not in plan.model_copy(update={"pruning": None}).to_dict()


def test_a_uniform_cut_takes_the_same_width_everywhere(llama):
    _, profile = llama
    plan = uniform_cut(profile, PruningQuestion((Budget("params", 0.8),), (64,), "magnitude"))
    assert len({len(own.removed_channels) for own in plan.pruning.layers.values()}) == 1
    assert not any(own.removed_heads for own in plan.pruning.layers.values())
    with pytest.raises(BudgetInfeasibleError, match="uniform"):
        uniform_cut(profile, PruningQuestion((Budget("params", 0.1),), (64,), "magnitude"))


def test_what_cannot_be_asked_is_refused(llama, tmp_path):
    model, profile = llama
    with pytest.raises(SpecError, match="cost model"):
        find_cut(profile, PruningQuestion((Budget("latency", 0.8),), (64,)))
    with pytest.raises(SpecError, match="density"):
        find_cut(profile, PruningQuestion((Budget("density", 0.8),), (64,)))
    with pytest.raises(SpecError, match="magnitude"):
        find_cut(profile, PruningQuestion((Budget("params", 0.8),), (64,), "magnitudes"))
    with pytest.raises(ArtifactError, match="must not hold"):
        profiled(model, profile.folder)
    (tmp_path / "pruning.json").write_bytes((profile.folder / "pruning.json").read_bytes())
    (tmp_path / "pruning.safetensors").write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match="damaged"):
        PruningProfile.load(tmp_path)


def test_criteria_are_ranked_against_the_truth(llama):
    model, profile = llama
    found = validate_criteria(model, profile, batches_for(model, seed=5), num_plans=10)
    assert set(found.tau) == {*CRITERIA, "learned", "measured"}
    assert found.tau["measured"]["single"] == pytest.approx(1.0)
    assert found.tau["reconstruction"]["single"] > 0.3
    assert found.tau["reconstruction"]["whole"] > 0.3
    assert {"params", "distance"} == set(found.whole[0])


def test_sums_of_scores_need_no_steps(llama):
    _, profile = llama
    for index, kind in profile.sublayers():
        if kind == "feed_forward":
            for criterion in ("magnitude", "sparse_then_prune"):
                menu = profile.options(index, kind, criterion)
                single = dict(zip((len(o.removed) for o in menu), (o.loss for o in menu), strict=True))
                assert all(set(small.removed) <= set(large.removed) for small, large in pairwise(menu))
                assert list(single.values()) == sorted(single.values())
                rates = [menu[i + 1].loss - menu[i].loss for i in range(len(menu) - 1)]
                assert rates == sorted(rates), "each further step costs more than the one before"


def test_the_command_line_offers_every_criterion():
    """The CLI imports the library inside its commands only, so it writes the names out."""
    from sparsesearch_cli.search import search

    choices, _ = get_args(get_type_hints(search, include_extras=True)["criterion"])
    assert set(get_args(choices)) == {"measured", *get_args(Criterion)}
