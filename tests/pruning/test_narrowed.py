"""Narrower layers compute what zeroed ones do, and leave no trace."""

import copy

import pytest
import torch
from pruning_models import CLASSES, batches_for, ragged_cut, tiny_model, zeroed
from pydantic import ValidationError

from sparsesearch.cut import LayerCut
from sparsesearch.errors import PlanMismatchError, UnsupportedModelError
from sparsesearch.plan import Plan
from sparsesearch.pruning.apply import PrunedApply
from sparsesearch.pruning.live import narrowed
from sparsesearch.pruning.profile_run import describe_layers
from sparsesearch.pruning.quality import output_rows
from sparsesearch.runtime.sublayers import layers_of


@pytest.mark.parametrize("family", sorted(CLASSES))
@torch.no_grad()
def test_narrow_equals_zeroed_and_is_undone(family):
    model = tiny_model(family)
    (batch, *_) = batches_for(model)
    cut, by_hand = ragged_cut(model), copy.deepcopy(model)
    zeroed(by_hand, cut)
    dense, expected = output_rows(model, batch)[0], output_rows(by_hand, batch)[0]
    names, parameters = [name for name, _ in model.named_modules()], model.num_parameters()
    with narrowed(model, cut):
        found = output_rows(model, batch)[0]
        assert model.num_parameters() < parameters
    # sums of up to 48 terms in another order
    tolerance = 48 * torch.finfo(torch.float32).eps * float(expected.abs().max()) * 8
    assert float((found - expected).abs().max()) <= tolerance
    assert float((found - dense).abs().max()) > 100 * tolerance
    assert torch.equal(output_rows(model, batch)[0], dense)
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("family", ["bert", "vit", "llama"])
@torch.no_grad()
def test_a_plan_that_only_removes_runs_on_every_kind_of_model(family):
    model = tiny_model(family)
    cut, (batch, *_) = ragged_cut(model), batches_for(model)
    plan = Plan(
        base_model=describe_layers(model, "tiny"), block_tokens=16, unit="query_head", lengths_tokens=(64,), rules={},
        assignments={}, pruning=cut,
    )  # fmt: skip
    with narrowed(model, cut):
        expected = output_rows(model, batch)[0]
    with PrunedApply([])(model, plan):
        assert torch.equal(output_rows(model, batch)[0], expected)


def test_a_cut_of_another_model_is_refused_untouched():
    model, other = tiny_model("llama"), tiny_model("llama", intermediate_size=40)
    before = [name for name, _ in other.named_modules()]
    with pytest.raises(PlanMismatchError, match="48 FFN channels"), narrowed(other, ragged_cut(model)):
        pass
    assert [name for name, _ in other.named_modules()] == before


def test_groups_must_stay_equally_wide():
    with pytest.raises(ValidationError, match="same number of query heads"):
        LayerCut(num_heads=4, num_kv_heads=2, num_channels=8, removed_heads=(0,))
    cut = LayerCut(num_heads=4, num_kv_heads=2, num_channels=8, removed_heads=(0, 1))
    assert (cut.kept_heads, cut.kept_groups) == ((2, 3), (1,))
    assert LayerCut(num_heads=4, num_kv_heads=2, num_channels=8, removed_heads=(0, 2)).kept_groups == (0, 1)


def test_fused_projections_are_refused_by_name(tiny):
    with pytest.raises(UnsupportedModelError, match="GPT2"):
        layers_of(tiny("gpt2"))
