"""Distillation and learned masks: they lower what they minimise, resume exactly, and leave the rest alone."""

from dataclasses import replace

import pytest
import torch
from pruning_models import batches_for, tiny_model
from safetensors.torch import load_file
from test_encoders import text_encoder

from sparsesearch.cut import Cut
from sparsesearch.errors import ArtifactError, RegressionError, SpecError
from sparsesearch.plan import Plan
from sparsesearch.presets import preset_path
from sparsesearch.pruning import heal_state
from sparsesearch.pruning.export import export_pruned
from sparsesearch.pruning.gates import learn_gates
from sparsesearch.pruning.heal import heal_checkpoint
from sparsesearch.pruning.heal_data import HealRequest, generated_batches, training_batches
from sparsesearch.pruning.profile_run import describe_layers
from sparsesearch.runtime.loading import load_model
from sparsesearch.runtime.shrink import layer_cut
from sparsesearch.runtime.sublayers import layers_of

REQUEST = HealRequest(steps=6, length_tokens=32, batch=2, num_sequences=4, save_every=2, generated=2)


def export_narrower(model, base, out, *, channels, **how):
    """A checkpoint without the first channels of the first two layers."""
    cut = Cut(layers={i: layer_cut(layers_of(model)[i], channels=tuple(range(channels))) for i in (0, 1)})
    plan = Plan(
        base_model=describe_layers(model, str(base)), block_tokens=64, unit="query_head", lengths_tokens=(48,), rules={},
        assignments={}, pruning=cut,
    )  # fmt: skip
    export_pruned(plan, base, out, **how)
    return out


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """needle-7m without 96 channels of its first layers."""
    model, _ = load_model("needle-7m")
    return export_narrower(model, "needle-7m", tmp_path_factory.mktemp("pruned") / "out", channels=96)


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


def test_the_best_state_is_written_though_the_last_one_is_bad(pruned, tmp_path, monkeypatch):
    step, done = heal_state.HealOptimiser.step, []

    def stumbles(self, share):
        step(self, share)
        done.append(share)
        if len(done) == 5:
            for parameter in self.trained.values():
                parameter.data.mul_(1.3)

    monkeypatch.setattr(heal_state.HealOptimiser, "step", stumbles)
    found = heal_checkpoint(pruned, "needle-7m", tmp_path / "out", REQUEST)
    assert list(found.validation) == [0, 2, 4, 6]
    assert found.best_step == 4 == min(found.validation, key=found.validation.get)
    assert found.validation[6] > found.validation[0]
    assert found.improved
    assert found.distance_after < found.distance_before
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "the state after 4 of 6 steps" in card
    assert f"{found.distance_before:.4g} to {found.distance_after:.4g}" in card


@pytest.mark.parametrize("rate", [0.3, 1e3])  # the second diverges
def test_a_checkpoint_that_healing_makes_worse_is_not_written(rate, pruned, tmp_path):
    with pytest.raises(RegressionError, match="Nothing was written"):
        heal_checkpoint(pruned, "needle-7m", tmp_path / "out", replace(REQUEST, optimiser="adamw", learning_rate=rate))
    assert not list(tmp_path.iterdir())


def test_validation_data_are_others_than_those_trained_on(tmp_path):
    model, tokenizer = load_model("needle-7m")
    pool, apart = training_batches(model, tokenizer, replace(REQUEST, generated=3))
    assert len(apart) == 8 + 3
    seen = {tuple(batch["input_ids"].flatten().tolist()) for batch in pool}
    assert not seen & {tuple(batch["input_ids"].flatten().tolist()) for batch in apart}


def test_an_encoder_is_saved_though_its_pooler_learns_nothing(tmp_path):
    data = text_encoder(tmp_path)
    out = export_narrower(tiny_model("bert"), tmp_path / "model", tmp_path / "out", channels=16)
    request = HealRequest(steps=3, data=str(data), length_tokens=32, num_sequences=8, save_every=1, learning_rate=1e-4)
    found = heal_checkpoint(out, tmp_path / "model", tmp_path / "healed", request)
    assert found.loss_dense is None
    assert found.recovered == pytest.approx(1 - found.distance_after / found.distance_before)
    before, after = (load_file(place / "model.safetensors") for place in (out, tmp_path / "healed"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any("pooler" in name or "embeddings.word" in name for name in changed)
    assert any("layer.3" in name for name in changed)


def test_what_cannot_be_healed_is_refused_before_any_step(pruned, tmp_path):
    with pytest.raises(SpecError, match="exactly as"):
        heal_checkpoint(pruned, pruned, tmp_path / "out", REQUEST)
    with pytest.raises(SpecError, match="nothing was removed"):
        heal_checkpoint(preset_path("models", "needle-7m"), "needle-7m", tmp_path / "out", REQUEST)
    model, _ = load_model("needle-7m")
    zeros = export_narrower(model, "needle-7m", tmp_path / "zeros", channels=96, mode="logical")
    with pytest.raises(SpecError, match="without --logical"):
        heal_checkpoint(zeros, "needle-7m", tmp_path / "out", REQUEST)
    for rate in (0.0, -1e-3, float("nan")):
        with pytest.raises(SpecError, match="positive"):
            replace(REQUEST, learning_rate=rate)
    assert not (tmp_path / "out").exists()


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
