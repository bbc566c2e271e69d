"""Menus against the same greedy choices made by plain code, and cuts measured from their layer on against whole runs."""

import pytest
import torch
from pruning_models import CLASSES, batches_for, tiny_model

from sparsesearch.pruning import reconstruction
from sparsesearch.pruning.compensate import installed
from sparsesearch.pruning.menus import _STEPS_PER_LEVEL, Scoring, channel_options, head_options
from sparsesearch.pruning.moments import collect
from sparsesearch.pruning.quality import dense_rows, mean_distance
from sparsesearch.pruning.reconstruction import damped
from sparsesearch.pruning.single_cuts import SingleCuts, measure_cut, one_shot_fit
from sparsesearch.runtime.sublayers import layers_of


@pytest.fixture(scope="module")
def llama():
    model = tiny_model("llama", hidden_size=48, intermediate_size=100, num_attention_heads=6, num_key_value_heads=3)
    return model, collect(model, batches_for(model), num_probes=2)


def statistics_of(found, layer, kind):
    return found[f"{layer.path}.{dict(layer.sublayers)[kind].out}"]


def plain_loss(layer, kind, own, criterion, gone):
    """What a criterion says of a set of inputs, from its definition."""
    if criterion == "reconstruction":
        weight = layer.projection(dict(layer.sublayers)[kind].out).weight.detach().double()
        gram = damped(own.second_moment - torch.outer(own.mean, own.mean))
        kept = torch.tensor([i for i in range(len(gram)) if i not in gone], dtype=torch.long)
        new = torch.zeros_like(weight)
        new[:, kept] = torch.linalg.solve(gram[kept][:, kept], (weight @ gram)[:, kept].t()).t()
        change = weight - new
        return float(0.5 * (own.sensitivity * (change @ gram @ change.t())).sum())
    effects, scale = {
        "fisher": (own.fisher, 0.5 * len(own.taylor) / own.items),
        "taylor": (own.taylor, 1.0 / own.items**2),
    }[criterion]
    return float(scale * effects[:, sorted(gone)].sum(1).square().mean())


@pytest.mark.parametrize("criterion", ["reconstruction", "fisher", "taylor"])
def test_channels_go_in_the_order_that_plain_code_finds(llama, criterion, monkeypatch):
    monkeypatch.setattr(reconstruction, "_WAITING_INPUTS", 6)
    model, found = llama
    layer = layers_of(model)[1]
    own = statistics_of(found, layer, "feed_forward")
    options = channel_options(Scoring(layer, own, criterion), multiple=24)
    assert [100 - len(option.removed) for option in options] == [100, 96, 72, 48, 24, 0]
    gone: set[int] = set()
    for option, width in zip(options[1:4], (96, 72, 48), strict=True):
        step = max(1, (100 - len(gone) - width) // _STEPS_PER_LEVEL)
        while 100 - len(gone) > width:
            left = [channel for channel in range(100) if channel not in gone]
            alone = {channel: plain_loss(layer, "feed_forward", own, criterion, gone | {channel}) for channel in left}
            gone |= set(sorted(left, key=alone.get)[: min(step, 100 - len(gone) - width)])
        assert set(option.removed) == gone
        assert option.loss == pytest.approx(plain_loss(layer, "feed_forward", own, criterion, gone), rel=1e-7)


@pytest.mark.parametrize("criterion", ["reconstruction", "fisher"])
def test_heads_go_in_the_order_that_plain_code_finds(llama, criterion):
    model, found = llama
    layer = layers_of(model)[2]
    own = statistics_of(found, layer, "attention")

    def loss(heads):
        return plain_loss(layer, "attention", own, criterion, {h * 8 + i for h in heads for i in range(8)})

    assert layer.head_dim == 8
    options = head_options(Scoring(layer, own, criterion), thin=True)
    expected = []
    for thinner in (False, True):
        gone: tuple[int, ...] = ()
        for group in range(3 if thinner else 0):
            gone = min(((*gone, head) for head in (2 * group, 2 * group + 1)), key=loss)
        expected.append(gone)
        for _ in range(2):
            groups = [tuple(h for h in (2 * g, 2 * g + 1) if h not in gone) for g in range(3)]
            gone = min(((*gone, *heads) for heads in groups if heads), key=loss)
            expected.append(gone)
    expected.append(tuple(range(6)))
    assert [option.removed for option in options] == [tuple(sorted(gone)) for gone in expected]
    for option in options:
        assert option.loss == pytest.approx(loss(option.removed), rel=1e-7, abs=1e-15)


@pytest.mark.parametrize("family", sorted(CLASSES))
def test_a_cut_measured_from_its_layer_on_is_what_the_whole_model_gives(family):
    model = tiny_model(family)
    batches = batches_for(model, count=2)
    found, dense = collect(model, batches, num_probes=2), dense_rows(model, batches)
    cuts = SingleCuts(model, batches)
    for index, layer in enumerate(layers_of(model)):
        assert cuts.distance(index) == 0.0
        own = statistics_of(found, layer, "feed_forward")
        option = channel_options(Scoring(layer, own, "magnitude"), multiple=16)[2]
        kept = torch.tensor([channel for channel in range(48) if channel not in option.removed])
        with installed(layer) as install:
            fitted = one_shot_fit(layer, "feed_forward", own, kept, bias=True)
            install(layer.feed_forward.out, fitted)
            whole = mean_distance(model, batches, dense)
        assert whole > 0
        assert measure_cut(cuts, (index, layer, "feed_forward"), option, own, bias=True) == pytest.approx(
            whole, rel=1e-12
        )
    assert mean_distance(model, batches, dense) == 0.0
    assert not any("forward" in layer.module.__dict__ for layer in layers_of(model)), "the model is as before"


def test_layers_run_again_after_an_error(llama):
    model, _ = llama
    cuts = SingleCuts(model, batches_for(model, count=1))
    last = layers_of(model)[-1].module
    handle = last.register_forward_pre_hook(lambda module, args: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        cuts.distance(2)
    handle.remove()
    assert not any("forward" in layer.module.__dict__ for layer in layers_of(model))
    assert cuts.distance(2) == 0.0
