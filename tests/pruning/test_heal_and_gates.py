"""Distillation and learned masks: they lower what they minimise, resume exactly, and leave the rest alone."""

from dataclasses import replace

import pytest
import torch
from pruning_models import batches_for, tiny_model

from sparsesearch.cut import Cut
from sparsesearch.errors import ArtifactError
from sparsesearch.plan import Plan
from sparsesearch.pruning import heal_state
from sparsesearch.pruning.export import export_pruned
from sparsesearch.pruning.gates import learn_gates
from sparsesearch.pruning.heal import HealRequest, generated_batches, heal_checkpoint
from sparsesearch.pruning.profile_run import describe_layers
from sparsesearch.runtime.loading import load_model
from sparsesearch.runtime.shrink import layer_cut
from sparsesearch.runtime.sublayers import layers_of

REQUEST = HealRequest(steps=6, length_tokens=64, batch=2, num_sequences=4, save_every=2, generated=2)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """needle-7m without 96 channels of its first layers."""
    model, _ = load_model("needle-7m")
    cut = Cut(layers={i: layer_cut(layers_of(model)[i], channels=tuple(range(96))) for i in (0, 1)})
    plan = Plan(
        base_model=describe_layers(model, "needle-7m"), block_tokens=64, unit="query_head", lengths_tokens=(48,), rules={},
        assignments={}, pruning=cut,
    )  # fmt: skip
    out = tmp_path_factory.mktemp("pruned") / "out"
    export_pruned(plan, "needle-7m", out)
    return out


@pytest.mark.parametrize(("optimiser", "rate"), [("adamw", 2e-4), ("muon", 5e-4)])
def test_healing_lowers_the_distance_and_resumes_to_the_same_bytes(optimiser, rate, pruned, tmp_path, monkeypatch):
    request = replace(REQUEST, optimiser=optimiser, learning_rate=rate)
    whole = heal_checkpoint(pruned, "needle-7m", tmp_path / "whole", request)
    assert whole.distance_after < whole.distance_before
    assert whole.loss_dense < whole.loss_before
    assert whole.recovered > 0

    def dies(self, *arguments):
        save(self, *arguments)
        if arguments[-1] == 4:
            raise KeyboardInterrupt

    save = heal_state.HealState.save
    with monkeypatch.context() as patch:
        patch.setattr(heal_state.HealState, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            heal_checkpoint(pruned, "needle-7m", tmp_path / "parts", request)
    assert not (tmp_path / "parts").exists()
    with pytest.raises(ArtifactError, match="--resume"):
        heal_checkpoint(pruned, "needle-7m", tmp_path / "parts", request)
    with pytest.raises(ArtifactError, match="seed=0"):
        heal_checkpoint(pruned, "needle-7m", tmp_path / "parts", replace(request, seed=1), resume=True)
    again = heal_checkpoint(pruned, "needle-7m", tmp_path / "parts", request, resume=True)
    assert again == whole
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]
    assert not (tmp_path / "parts.heal").exists()


def test_the_teacher_writes_what_is_trained_on_and_the_same_again():
    model, tokenizer = load_model("needle-7m")
    request = replace(REQUEST, generated=3, length_tokens=40)
    state = torch.get_rng_state()
    once, again = (generated_batches(model, tokenizer, request) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers are as before"
    assert [batch["input_ids"].shape for batch in once] == [(1, 40)] * 3
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(once, again, strict=True))
    assert not torch.equal(once[0]["input_ids"], once[1]["input_ids"])


def test_gates_move_towards_the_target_and_weights_stay(tmp_path):
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gates = learn_gates(model, batches_for(model), steps=30, target=0.5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert set(gates) == {(index, kind) for index in range(4) for kind in ("attention", "feed_forward")}
    assert {len(gate) for gate in gates.values()} == {4, 48}
    assert torch.cat(list(gates.values())).mean() < 2.0, "gates close on average"
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_gate_of_what_does_nothing_closes_first():
    model = tiny_model("llama")
    layer = layers_of(model)[1]
    out = layer.projection(layer.feed_forward.out)
    out.weight.data[:, :24] = 0
    gates = learn_gates(model, batches_for(model), steps=40, target=0.5)
    idle, busy = gates[(1, "feed_forward")][:24], gates[(1, "feed_forward")][24:]
    assert idle.mean() < busy.mean()
