"""Scores of a reuse equal the oracle's, and maps point where the mass lies."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import sparsesearch
from sparsesearch.block_mask import BlockGrid
from sparsesearch.calibration import Calibration, Sample
from sparsesearch.errors import SpecError
from sparsesearch.kernels.reference import tile_attention
from sparsesearch.plan import Plan
from sparsesearch.profiling.layer_inputs import layer_inputs
from sparsesearch.profiling.record import Profile
from sparsesearch.profiling.reuse import HeadMap, map_heads, score_reuse
from sparsesearch.profiling.reuse_menu import ReuseMenu, reuse_menu
from sparsesearch.profiling.run import Request, profile_model
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.reuse import Reuse
from sparsesearch.runtime.fingerprint import describe
from sparsesearch.search_space import SearchSpace

LENGTH = 150
SPACE = """
name: test
source: tests
description: a few
block_tokens: 16
unit: query_head
candidates:
  - {kind: sink_window, sink: 16, window: 48}
  - {kind: pooled_topk, keep: {b: 0.3}, sink: 16}
  - {kind: fixed_blocks, keep: 0.4}
"""


def samples(count: int = 2) -> tuple[Sample, ...]:
    generator = torch.Generator().manual_seed(7)
    mask = torch.zeros(LENGTH, dtype=torch.bool)
    mask[-4:] = True
    return tuple(Sample(torch.randint(0, 64, (LENGTH,), generator=generator), mask, "tests") for _ in range(count))


@pytest.fixture
def profiled(tiny: Any, tmp_path: Path) -> tuple[PreTrainedModel, Profile]:
    model = tiny("llama", num_hidden_layers=3)
    space = SearchSpace.parse(SPACE, where="tests")
    request = Request(describe(model, "tiny"), space, {LENGTH: Calibration(samples(), "tests")}, num_probes=2)
    return model, profile_model(model, request, tmp_path / "profile")


@pytest.mark.parametrize("unit", ["layer", "kv_group"])
def test_scores_equal_the_oracle(profiled: tuple[PreTrainedModel, Profile], unit: Any) -> None:
    model, profile = profiled
    menu = reuse_menu(profile, [0.3], span=2, unit=unit)
    assert [menu.rules[place].kind for place in menu.emitters] == ["dense_source", "pooled_topk"]
    heads = map_heads(model, menu, samples())
    found = score_reuse(model, menu, heads, samples(), num_probes=2, seed=5)
    text, answer, tiles = (np.zeros((2, 2)) for _ in range(3))  # emitter, group: layer 2 runs what layer 0 left
    for index, sample in enumerate(samples()):
        inputs = layer_inputs(model, sample, num_probes=2, seed=5 + 1000 * LENGTH + index)
        grid = BlockGrid(LENGTH, LENGTH, 16)
        source, target = inputs[0], inputs[2]
        dense = tile_attention(target.q, target.k, target.v, grid.reachable(), grid, scale=1.0)
        for place, rule in enumerate(menu.rules[emitter] for emitter in menu.emitters):
            left = rule.left_behind(rule.select(grid, source.q, source.k), grid, source.q, source.k)
            reuse = Reuse(layer=0, heads=heads.heads(0, 2, 2))
            own = torch.stack([left[reuse.source_head(head)[1]] for head in range(4)]) | grid.diagonal()
            delta = tile_attention(target.q, target.k, target.v, own, grid, scale=1.0) - dense
            products = torch.einsum("hsd,rhsd->rh", delta, target.probes).unflatten(1, (2, 2)).sum(-1)
            text[place] += (products.square().mean(0) / (2 * LENGTH * 2)).numpy()
            at = torch.einsum("hsd,hsd->hs", delta, target.answer).unflatten(0, (2, 2)).sum(1)
            answer[place] += (at.square().sum(-1) / 8).numpy()
            tiles[place] += own.unflatten(0, (2, 2)).sum((1, 2, 3)).numpy() / 2
    np.testing.assert_allclose(found.reuse_text[0, :, 2], text, rtol=1e-3, atol=1e-9)
    np.testing.assert_allclose(found.reuse_answer[0, :, 2], answer, rtol=1e-3, atol=1e-9)
    np.testing.assert_allclose(found.reuse_tiles[0, :, 2], tiles)
    assert found.tiles[..., 0].sum() == pytest.approx(3 * 4 * 55), "ten blocks a side, dense first in the menu"
    assert (found.reuse_tiles[2] == 0).all(), "the last layer is nobody's source"


def test_overlaps_are_shares(profiled: tuple[PreTrainedModel, Profile]) -> None:
    model, profile = profiled
    menu = reuse_menu(profile, [0.3], span=1, unit="layer")
    found = score_reuse(model, menu, map_heads(model, menu, samples()), samples(), num_probes=1)
    measured = found.overlap[[0, 1], :, [1, 2]]
    assert ((measured > 0) & (measured <= 1)).all()
    assert (found.free_overlap[[0, 1], :, [1, 2]] <= measured + 1e-12).all(), "what all layers choose flatters"
    assert (found.overlap[0, :, 2] == 0).all(), "beyond the span"


def test_identical_layers_overlap_wholly(tiny: Any, profiled: tuple[PreTrainedModel, Profile]) -> None:
    """Layers that see the same queries and keys: each head is its own best source, and nothing differs."""
    model, profile = profiled
    for layer in (1, 2):
        model.model.layers[layer].load_state_dict(model.model.layers[0].state_dict())
    for layer in model.model.layers:  # the residual stream stays the embedding
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    for unit in ("layer", "kv_group"):
        menu = reuse_menu(profile, [0.3], span=2, unit=unit)  # type: ignore[arg-type]
        heads = map_heads(model, menu, samples())
        assert heads.heads(0, 1, 2) == heads.heads(0, 2, 2) == heads.heads(1, 2, 2) == (0, 1, 2, 3)
        assert (heads.lanes == np.arange(2)).all()
        found = score_reuse(model, menu, heads, samples(), num_probes=1)
        assert found.overlap[0, :, 1:] == pytest.approx(1.0)


def test_under_a_plan_the_model_runs_it(profiled: tuple[PreTrainedModel, Profile]) -> None:
    """The first layer sees the same inputs, later ones others; the model is left as it was."""
    model, profile = profiled
    menu = reuse_menu(profile, [0.3], span=2, unit="layer")
    heads = map_heads(model, menu, samples())
    source = menu.rules[menu.emitters[1]]
    reuse = Reuse(layer=0, heads=heads.heads(0, 1, 2))
    info = profile.manifest.base_model
    plan = Plan(
        base_model=info,
        block_tokens=16,
        unit="kv_group",
        lengths_tokens=(LENGTH,),
        rules={rule.label: rule for rule in (Dense(), source, reuse)},
        assignments=dict(zip(info.modules, [(source.label,) * 4, (reuse.label,) * 4, ("dense",) * 4], strict=True)),
    )
    ids = samples()[0].input_ids[None]
    with torch.no_grad():
        before = model(ids).logits
    dense, sparse = (score_reuse(model, menu, heads, samples(1), plan=one, num_probes=1) for one in (None, plan))
    assert (dense.tiles[0] == sparse.tiles[0]).all()
    assert (dense.overlap[0, :, 1] != sparse.overlap[0, :, 1]).any()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
        with sparsesearch.apply(model, plan):
            assert not torch.equal(model(ids).logits, before)


def test_heads_of_a_group_keep_their_places() -> None:
    heads = HeadMap(np.array([[[0, 0], [1, 0]], [[0, 0], [0, 0]]]), np.zeros((2, 2), dtype=int))
    assert heads.heads(0, 1, 3) == (3, 4, 5, 0, 1, 2)


def test_menus_that_cannot_be_are_refused(profiled: tuple[PreTrainedModel, Profile]) -> None:
    _, profile = profiled
    with pytest.raises(SpecError, match="dynamic rule"):
        ReuseMenu(profile, (), (1,), span=1, unit="layer")
    with pytest.raises(SpecError, match="span"):
        ReuseMenu(profile, (), (), span=1, unit="layer")


def test_a_space_with_dense_sources_says_what_they_keep(tiny: Any, tmp_path: Path) -> None:
    space = SearchSpace.parse(SPACE + "  - {kind: dense_source, keep: 32}\n", where="tests")
    model = tiny("llama", num_hidden_layers=2)
    request = Request(describe(model, "tiny"), space, {LENGTH: Calibration(samples(), "tests")}, num_probes=1)
    profile = profile_model(model, request, tmp_path / "profile")
    kept = {None: "dense_source(keep=32,sink=64)", (0.3,): "dense_source(keep=0.3N,sink=16)"}
    for keeps, label in kept.items():
        menu = reuse_menu(profile, keeps, span=1, unit="layer")
        assert menu.rules[menu.emitters[0]].label == label
        assert sum(rule.kind == "dense_source" for rule in menu.rules) == (1 if keeps is None else 2)


def test_rules_that_leave_prompts_dense_are_nobodys_source(tiny: Any, tmp_path: Path) -> None:
    """They would leave everything; those whose law keeps all at this length neither."""
    more = (
        "bounds_topk, keep: 32",
        "skip_softmax, decode_scale: 9",
        "pooled_topk, keep: 9999",
        "bounds_topk, keep: 32, prefill: true",
    )
    lines = "".join(f"  - {{kind: {rule}}}\n" for rule in more)
    space = SearchSpace.parse(SPACE + lines, where="tests")
    model = tiny("llama", num_hidden_layers=2)
    request = Request(describe(model, "tiny"), space, {LENGTH: Calibration(samples(), "tests")}, num_probes=1)
    menu = reuse_menu(profile_model(model, request, tmp_path / "profile"), [0.3], span=1, unit="layer")
    kinds = [menu.rules[place].label.partition("(")[0] for place in menu.emitters]
    assert kinds == ["dense_source", "pooled_topk", "bounds_topk"]
    dynamic = tuple(place for place, rule in enumerate(menu.rules) if rule.dynamic)
    assert len(dynamic) > len(menu.emitters)
    assert map_heads(model, replace(menu, emitters=dynamic), samples()) is not None  # they can be scored all the same
