"""A streamed profile equals the resident one, holds one layer, and continues after an interruption where it stopped."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_run import SPACE, calibration
from transformers import PreTrainedModel

from sparsesearch.errors import ArtifactError, SpecError, UnsupportedModelError
from sparsesearch.profiling.layer_stack import LayerStack
from sparsesearch.profiling.record import Profile
from sparsesearch.profiling.run import Request, profile_model
from sparsesearch.profiling.streamed_model import StreamedModel, open_streamed
from sparsesearch.profiling.streaming import profile_streamed
from sparsesearch.runtime.fingerprint import describe
from sparsesearch.runtime.loading import load_weights
from sparsesearch.search_space import SearchSpace

LENGTHS = (70, 96)


def request_for(info: object) -> Request:
    space = SearchSpace.parse(SPACE, where="tests")
    return Request(info, space, {n: calibration(n) for n in LENGTHS}, num_probes=2)  # type: ignore[arg-type]


def same_scores(found: Profile, truth: Profile) -> None:
    assert found.manifest.calibrated == truth.manifest.calibrated
    assert found.manifest.base_model == truth.manifest.base_model
    for length in truth.manifest.lengths:
        a, b = found.scores(length), truth.scores(length)
        assert a.keys() == b.keys()
        for name, value in b.items():
            torch.testing.assert_close(a[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()), msg=name)


def test_streamed_equals_resident(any_tiny: PreTrainedModel, tmp_path: Path) -> None:
    any_tiny.save_pretrained(tmp_path / "model", max_shard_size="10KB")
    if any_tiny.config.model_type == "gpt_neox":  # its checkpoints call the head embed_out
        with pytest.raises(UnsupportedModelError, match="lm_head"):
            open_streamed(tmp_path / "model")
        return
    truth = profile_model(any_tiny, request_for(describe(any_tiny, str(tmp_path / "model"))), tmp_path / "whole")
    streamed = open_streamed(tmp_path / "model")
    assert all(p.is_meta for layer in streamed.stack.layers for p in layer.parameters())
    found = profile_streamed(streamed, request_for(streamed.info), tmp_path / "streamed")
    same_scores(found, truth)
    assert all(p.is_meta for layer in streamed.stack.layers for p in layer.parameters()), "layers are freed again"
    assert not (tmp_path / "streamed" / "activations").exists()
    assert profile_streamed(streamed, request_for(streamed.info), tmp_path / "streamed", resume=True) == found


def interrupt_at(monkeypatch: pytest.MonkeyPatch, when: int) -> list[int]:
    """Let `when` layers be fetched, then fail as a killed process would leave things."""
    present, fetched = StreamedModel.present, []

    def failing(self: StreamedModel, layer: int) -> object:
        if len(fetched) == when:
            raise KeyboardInterrupt
        fetched.append(layer)
        return present(self, layer)

    monkeypatch.setattr(StreamedModel, "present", failing)
    return fetched


@pytest.mark.parametrize("when", [0, 1, 2, 3, 4])
def test_resumes_after_the_last_finished_layer(
    tiny: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: int
) -> None:
    model: PreTrainedModel = tiny("llama", num_hidden_layers=3)  # type: ignore[operator]
    model.save_pretrained(tmp_path / "model")
    truth = profile_model(model, request_for(describe(model, str(tmp_path / "model"))), tmp_path / "whole")
    streamed = open_streamed(tmp_path / "model")
    request = request_for(streamed.info)
    with monkeypatch.context() as patch:
        interrupt_at(patch, when)
        with pytest.raises(KeyboardInterrupt):
            profile_streamed(streamed, request, tmp_path / "streamed")
    with pytest.raises(ArtifactError, match="resume"):
        profile_streamed(streamed, request, tmp_path / "streamed")
    fetched = interrupt_at(monkeypatch, 6)
    same_scores(profile_streamed(streamed, request, tmp_path / "streamed", resume=True), truth)
    assert len(fetched) == 6 - when, "no layer is read again"


def test_refusals(tiny: object, tmp_path: Path) -> None:
    model: PreTrainedModel = tiny("llama")  # type: ignore[operator]
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.0.renamed"] = weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, file)
    with pytest.raises(UnsupportedModelError, match=r"up_proj.*without --stream"):
        open_streamed(tmp_path / "model")
    file.write_bytes(b"broken")
    with pytest.raises(ArtifactError, match="cannot be read"):
        open_streamed(tmp_path / "model")
    file.unlink()
    with pytest.raises(ArtifactError, match="neither"):
        open_streamed(tmp_path / "model")
    with pytest.raises(SpecError, match="GGUF"):
        open_streamed("weights.gguf")
    with pytest.raises(SpecError, match="dtype"):
        open_streamed("needle-7m", dtype="int3")


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_model_that_accelerate_offloads(architecture: str, tiny: object, tmp_path: Path) -> None:
    """Weights that come and go by accelerate's hooks: layers are swept all the same, and scored alike."""
    accelerate = pytest.importorskip("accelerate")
    model: PreTrainedModel = tiny(architecture)  # type: ignore[operator]
    info = describe(model, "tiny")
    truth = profile_model(model, request_for(info), tmp_path / "whole")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert any(p.is_meta for p in model.parameters())
    assert LayerStack.of(model, info.modules) is not None
    same_scores(profile_model(model, request_for(info), tmp_path / "offloaded"), truth)


def test_device_maps_by_name(tiny: object, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model: PreTrainedModel = tiny("llama")  # type: ignore[operator]
    model.save_pretrained(tmp_path / "model")
    mapped = load_weights(tmp_path / "model", device_map="auto")
    truth = profile_model(model, request_for(describe(model, "tiny")), tmp_path / "whole")
    same_scores(profile_model(mapped, request_for(describe(mapped, "tiny")), tmp_path / "mapped"), truth)


def test_off_the_cpu_a_model_keeps_its_own_type(tiny: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    model: PreTrainedModel = tiny("llama")  # type: ignore[operator]
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    assert load_weights(tmp_path / "model", device_map="cpu", with_plan=False).dtype == torch.float32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for with_plan in (True, False):
        assert load_weights(tmp_path / "model", device_map="cpu", with_plan=with_plan).dtype == torch.bfloat16
