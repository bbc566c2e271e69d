import pytest
import torch

import sparsesearch
from sparsesearch.errors import ArtifactError, SpecError
from sparsesearch.plan import uniform_plan
from sparsesearch.rules.zero import Zero
from sparsesearch.runtime.binding import binding_of
from sparsesearch.runtime.fingerprint import describe
from sparsesearch.runtime.loading import load_model, load_weights


def test_embedded_model_by_name():
    model, tokenizer = load_model("needle-7m")
    assert model.dtype == torch.float32
    assert not model.training
    assert tokenizer.decode(tokenizer(" The code").input_ids) == " The code"
    assert load_model("needle-7m", dtype="bfloat16")[0].dtype == torch.bfloat16


def test_unknown_dtype_is_refused():
    with pytest.raises(SpecError, match="Did you mean 'float32'"):
        load_model("needle-7m", dtype="floet32")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "nowhere.gguf", "a/b/c"])
def test_missing_path_is_refused(name):
    with pytest.raises(ArtifactError, match="no such file"):
        load_model(name)


def test_directory_without_config_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"no config\.json"):
        load_model(tmp_path)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"\.gguf file"):
        load_model(tmp_path / "model.bin")


def test_hub_model_that_cannot_be_reached_is_refused(monkeypatch):
    with pytest.raises(ArtifactError, match="on the hub"):
        load_model("sparsesearch/no-such-model-for-tests")


def test_damaged_config_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match="could not be loaded"):
        load_model(tmp_path)


def test_damaged_gguf_is_refused(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF\x03")
    with pytest.raises(ArtifactError, match=r"m\.gguf"):
        load_model(tmp_path / "m.gguf")


def test_a_patched_checkpoint_loads_as_what_it_was_made_from(tmp_path, needle_7m):
    plan = uniform_plan(describe(needle_7m, "needle-7m"), Zero(), block_tokens=32, lengths_tokens=(64,))
    sparsesearch.export(plan, "needle-7m", tmp_path / "patched")
    ids = torch.arange(70)[None] + 5
    with torch.no_grad():
        dense = needle_7m(ids).logits
        patched = load_weights(tmp_path / "patched")
        assert not torch.equal(patched(ids).logits, dense)
        plain = load_weights(tmp_path / "patched", with_plan=False)
        assert torch.equal(plain(ids).logits, dense)
    assert all(binding_of(module) is None for module in plain.modules())
    plain.save_pretrained(tmp_path / "plain")
    assert "sparsesearch" not in (tmp_path / "plain" / "config.json").read_text()
