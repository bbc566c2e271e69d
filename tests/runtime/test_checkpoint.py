"""Patched checkpoints: export, plain loading, saving again, verification, and every way it may go wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runtime_plans import cycled_plan, dense_plan, group_plan, left_padded
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import sparsesearch
from sparsesearch.errors import ArtifactError, PlanMismatchError, SpecError
from sparsesearch.plan import Plan
from sparsesearch.runtime import export as export_module
from sparsesearch.runtime.cache import PlanCacheLayer
from sparsesearch.runtime.cache_keyword import CACHE_KEYWORD
from sparsesearch.runtime.verify import verify

NAMES = ["stream", "zero", "elastic", "mean", "dense", "pooled", "slash"]


@pytest.fixture
def base(tiny, tmp_path):
    """A saved sharded base model with two companions, and a plan for it."""
    model = tiny("llama")
    folder = tmp_path / "base"
    model.save_pretrained(folder, max_shard_size="20KB")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "LICENSE").write_text("mine")
    (folder / "calibration.jsonl").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    return folder, group_plan(model, NAMES), model


def export(base, tmp_path, **options):
    folder, plan, _ = base
    return sparsesearch.export(plan, folder, tmp_path / "out", **options)


def logits(model):
    ids, mask = left_padded((100, 60), 64)
    with torch.no_grad():
        return model(ids, attention_mask=mask).logits


def test_plain_loading_runs_the_plan(base, tmp_path):
    report = export(base, tmp_path, command="sparsesearch apply …")
    _, plan, model = base
    loaded = AutoModelForCausalLM.from_pretrained(report.path, dtype=torch.float32)
    with sparsesearch.apply(model, plan):
        expected = logits(model)
    assert torch.equal(logits(loaded), expected)
    headless = AutoModel.from_pretrained(report.path, dtype=torch.float32)
    assert headless.layers[0].self_attn.sparsesearch_binding == loaded.model.layers[0].self_attn.sparsesearch_binding
    ids, mask = left_padded((100, 60), 64)
    cache = loaded.generate(ids, attention_mask=mask, max_new_tokens=2, return_dict_in_generate=True)[CACHE_KEYWORD]
    assert any(isinstance(layer, PlanCacheLayer) for layer in cache.layers)


def test_directory_holds_what_it_should(base, tmp_path):
    folder, plan, _ = base
    report = export(base, tmp_path, command="sparsesearch apply …")
    names = {path.name for path in report.path.iterdir()}
    shards = {path.name for path in folder.glob("*.safetensors*")}
    assert len(shards) > 2
    assert names == shards | {
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "LICENSE",
        "README.md",
        "sparse_plan.json",
    }
    assert set(report.linked) == shards
    assert (report.path / report.linked[0]).samefile(folder / report.linked[0])
    assert report.heads_patched == sum(rule.kind != "dense" for _, _, rule in plan.heads())
    assert Plan.load(report.path / "sparse_plan.json") == plan
    card = (report.path / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "sparsesearch apply …" in card
    assert not list(tmp_path.glob(".out*"))


def test_without_the_import_loading_fails_loudly(base, tmp_path):
    report = export(base, tmp_path)
    code = f"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({str(report.path)!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "sparsesearch" in run.stderr.splitlines()[-1]


def test_saving_again_keeps_the_plan(base, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(export(base, tmp_path).path, dtype=torch.float32)
    expected = logits(loaded)
    for generation in ("second", "third"):
        loaded.save_pretrained(tmp_path / generation)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / generation, dtype=torch.float32)
        assert torch.equal(logits(loaded), expected)
    assert not any("sparsesearch" in key for key in loaded.state_dict())


def test_asking_for_another_attention_runs_dense_and_says_so(base, tmp_path):
    report = export(base, tmp_path)
    with pytest.warns(UserWarning, match="runs dense"):
        loaded = AutoModelForCausalLM.from_pretrained(report.path, dtype=torch.float32, attn_implementation="sdpa")
    assert torch.equal(logits(loaded), logits(base[2]))


def test_apply_over_a_loaded_plan_and_back(base, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(export(base, tmp_path).path, dtype=torch.float32)
    inside = logits(loaded)
    with sparsesearch.apply(loaded, dense_plan(loaded)):
        assert torch.equal(logits(loaded), logits(base[2]))
    assert torch.equal(logits(loaded), inside)


def test_plan_for_another_model_is_refused_and_nothing_is_left(base, tiny, tmp_path):
    other = cycled_plan(tiny("llama", num_attention_heads=8), NAMES)
    with pytest.raises(PlanMismatchError):
        sparsesearch.export(other, base[0], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_other_weights_are_refused(tmp_path, needle_7m):
    with torch.no_grad():
        needle_7m.model.norm.weight.mul_(2)
    plan = group_plan(needle_7m, ["stream"])
    with pytest.raises(PlanMismatchError, match="these are others"):
        sparsesearch.export(plan, "needle-7m", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_fine_tuned_copy_gets_a_plan_of_its_own_weights(base, tmp_path):
    """Else nothing that compares weights, such as verify, eval and check, would ever take it."""
    other = base[1].model_copy(
        update={"base_model": base[1].base_model.model_copy(update={"weights_sha256": "0" * 64})}
    )
    out = sparsesearch.export(other, base[0], tmp_path / "out", allow_other_weights=True).path
    assert verify(out).problems == ()
    written = sparsesearch.Plan.load(out / "sparse_plan.json")
    assert written.assignments == other.assignments
    assert written.base_model.weights_sha256 == base[1].base_model.weights_sha256
    assert written.provenance["searched_for_weights"] == "0" * 64
    same = sparsesearch.export(base[1], base[0], tmp_path / "same", allow_other_weights=True).path
    assert sparsesearch.Plan.load(same / "sparse_plan.json") == base[1]


def test_embedded_model_exports_and_verifies(tmp_path, needle_7m):
    plan = group_plan(needle_7m, ["stream", "zero", "mean", "dense"])
    report = sparsesearch.export(plan, "needle-7m", tmp_path / "out")
    model, tokenizer = sparsesearch.load_model(report.path)
    assert tokenizer("x").input_ids
    assert model.config._attn_implementation == "sparsesearch"
    found = verify(report.path)
    assert found.ok, found.problems
    assert (found.layers_patched, found.heads_patched, found.heads_total) == (8, 48, 64)


def test_a_full_directory_is_kept_unless_overwrite(base, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine.txt").write_text("keep")
    with pytest.raises(ArtifactError, match="--overwrite"):
        export(base, tmp_path)
    assert (target / "mine.txt").read_text() == "keep"
    export(base, tmp_path, overwrite=True)
    assert not (target / "mine.txt").exists()
    assert verify(target).ok
    assert {path.name for path in tmp_path.iterdir()} == {"base", "out"}


@pytest.mark.parametrize("place", ["base", "base/inside", "."])
def test_the_base_model_is_never_the_target(base, tmp_path, place):
    with pytest.raises(ArtifactError, match="base model"):
        sparsesearch.export(base[1], base[0], tmp_path / place, overwrite=True)
    assert (base[0] / "config.json").is_file()


def test_full_disk_leaves_the_old_directory(base, tmp_path, monkeypatch):
    export(base, tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "model_card", full)
    with pytest.raises(ArtifactError, match="No space left"):
        export(base, tmp_path, overwrite=True)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"base", "out"}


def test_interrupt_leaves_nothing(base, tmp_path, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module, "model_card", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(base, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_weights_are_copied_where_links_are_impossible(base, tmp_path, monkeypatch):
    def impossible(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", impossible)
    report = export(base, tmp_path)
    assert report.linked == ()
    assert verify(report.path).ok


def test_base_without_safetensors_is_refused(base, tmp_path):
    for file in base[0].glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(ArtifactError, match="safetensors"):
        export(base, tmp_path)


def test_gguf_base_is_refused_for_weights(base, tmp_path):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(SpecError, match="dequantize=True"):
        sparsesearch.export(base[1], file, tmp_path / "out")


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def unstamp(config):
    """As checkpoints were before the plan in them had a checksum."""
    for name in ("format", "schema_version", "sha256"):
        del config["sparsesearch"][name]


def test_verify_finds_a_changed_plan_copy(base, tmp_path):
    out = export(base, tmp_path).path
    base[1].model_copy(update={"lengths_tokens": (1,)}).save(out / "sparse_plan.json")
    assert any("sparse_plan.json" in problem for problem in verify(out).problems)
    (out / "sparse_plan.json").unlink()
    assert verify(out).ok, "config.json has a checksum of its own"
    edit_config(
        out, lambda config: [config["sparsesearch"].pop(name) for name in ("format", "schema_version", "sha256")]
    )
    (problem,) = verify(out).problems
    assert problem.startswith("sparse_plan.json is missing")
    (out / "sparse_plan.json").write_text("{}")
    with pytest.raises(ArtifactError):
        verify(out)


def test_an_edited_plan_is_refused_wherever_it_is_read(base, tmp_path):
    out = export(base, tmp_path).path
    assert sparsesearch.Plan.load(out) == base[1]
    edit_config(out, lambda config: config["sparsesearch"].update(block_tokens=32))
    for read in (sparsesearch.Plan.load, verify, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ArtifactError, match="does not match its own checksum"):
            read(out)
    edit_config(out, lambda config: config.pop("sparsesearch"))
    with pytest.raises(ArtifactError, match="must carry a plan"):
        sparsesearch.Plan.load(out)
    with pytest.raises(ArtifactError, match=r"has no config\.json"):
        sparsesearch.Plan.load(tmp_path)


def test_a_saved_copy_keeps_the_plan_and_its_checksum(base, tmp_path):
    """What a user does who trains a patched checkpoint further; the copy beside the config is lost, the plan is not."""
    model = AutoModelForCausalLM.from_pretrained(export(base, tmp_path).path)
    model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "sparse_plan.json").exists()
    assert verify(tmp_path / "saved").ok
    with torch.no_grad():
        model.model.norm.weight += 0.1
    model.save_pretrained(tmp_path / "tuned")
    (problem,) = verify(tmp_path / "tuned").problems
    assert "--allow-other-weights" in problem
    plan = sparsesearch.Plan.load(tmp_path / "tuned")
    assert plan == base[1]
    sparsesearch.export(plan, tmp_path / "tuned", tmp_path / "again", allow_other_weights=True)
    assert verify(tmp_path / "again").ok


def test_verify_finds_changed_weights(base, tmp_path):
    out = export(base, tmp_path).path
    shard = out / next(path.name for path in sorted(out.glob("*.safetensors")))
    tensors = {name: tensor * 2 for name, tensor in load_file(shard).items()}
    shard.unlink()
    save_file(tensors, shard, metadata={"format": "pt"})
    assert any("weights" in problem for problem in verify(out).problems)


def test_verify_finds_a_checkpoint_that_runs_dense(base, tmp_path):
    out = export(base, tmp_path).path
    edit_config(out, lambda config: config.update(attn_implementation="sdpa"))
    with pytest.warns(UserWarning, match="runs dense"):
        report = verify(out)
    assert any("no head is patched" in problem for problem in report.problems)
    assert not report.ok


def test_verify_calls_an_all_dense_plan_a_problem(base, tmp_path):
    report = sparsesearch.export(dense_plan(base[2]), base[0], tmp_path / "out")
    assert verify(report.path).problems == ("no head is patched: the checkpoint runs dense",)


def test_verify_finds_a_wrong_kernel(base, tmp_path, monkeypatch):
    """The comparison with the oracle can fail."""
    from sparsesearch.runtime import rule_attention

    out, right = export(base, tmp_path).path, rule_attention.attend_tiles
    monkeypatch.setattr(rule_attention, "attend_tiles", lambda *args, **options: 1.01 * right(*args, **options))
    assert any("prefill differs" in problem for problem in verify(out).problems)


def test_verify_refuses_what_is_no_patched_checkpoint(base, tmp_path):
    with pytest.raises(ArtifactError, match="must carry a plan"):
        verify(base[0])
    with pytest.raises(ArtifactError, match="no such file"):
        verify(tmp_path / "nowhere")


def test_a_damaged_plan_in_the_config_is_refused_at_load(base, tmp_path):
    out = export(base, tmp_path).path
    edit_config(out, unstamp)
    edit_config(out, lambda config: config["sparsesearch"]["assignments"].update({"model.layers.9.self_attn": []}))
    with pytest.raises(ArtifactError, match=r"model\.layers\.9"):
        AutoModelForCausalLM.from_pretrained(out)
