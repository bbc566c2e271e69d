"""Pruned checkpoints: smaller files, plain loading, generation, saving again, and every mode."""

import filecmp
import json
import subprocess
import sys

import pytest
import torch
from pruning_models import CLASSES, DECODERS, batches_for, ragged_cut, tiny_model
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM

import sparsesearch
from sparsesearch.cut import Cut
from sparsesearch.errors import ArtifactError, PlanMismatchError, SpecError
from sparsesearch.plan import Plan
from sparsesearch.pruning.export import export_pruned
from sparsesearch.pruning.live import narrowed
from sparsesearch.pruning.models import load_prunable
from sparsesearch.pruning.profile_run import describe_layers
from sparsesearch.pruning.quality import output_rows
from sparsesearch.pruning.verify import is_pruned, verify_pruned
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.sink_window import SinkWindow
from sparsesearch.runtime.shrink import layer_cut
from sparsesearch.runtime.sublayers import layers_of


def plan_for(model, cut, rule=None):
    info = describe_layers(model, "tiny")
    rules = {own.label: own for own in (Dense(), rule) if own is not None}
    names = [] if rule is None else [rule.label, Dense().label] * 2
    assignments = {} if rule is None else {module: tuple(names) for module in info.modules}
    return Plan(
        base_model=info, block_tokens=16, unit="query_head", lengths_tokens=(64,), rules=rules, assignments=assignments, pruning=cut
    )  # fmt: skip


@pytest.fixture
def saved(tmp_path):
    """Makes a base directory of a family."""

    def make(family, **changes):
        model = tiny_model(family, **changes)
        model.save_pretrained(tmp_path / family)
        return model, tmp_path / family

    return make


@pytest.mark.parametrize("family", sorted(CLASSES))
@torch.no_grad()
def test_loads_smaller_and_equal_and_saves_the_same_again(family, saved, tmp_path):
    model, base = saved(family)
    cut, (batch, *_) = ragged_cut(model), batches_for(model)
    found = export_pruned(plan_for(model, cut), base, tmp_path / "out")
    loaded, _ = load_prunable(tmp_path / "out")
    with narrowed(model, cut):
        assert torch.equal(output_rows(loaded, batch)[0], output_rows(model, batch)[0])
        assert loaded.num_parameters() == model.num_parameters() == found.parameters
    assert found.layout == "per layer"
    sizes = [(place / "model.safetensors").stat().st_size for place in (base, tmp_path / "out")]
    header = 12_000  # names and offsets, which matter in a model this small
    assert abs((sizes[0] - sizes[1]) - 4 * (found.base_parameters - found.parameters)) <= header
    loaded.save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert filecmp.cmp(tmp_path / "out" / name, tmp_path / "again" / name, shallow=False), name


@pytest.mark.parametrize("family", DECODERS)
def test_generates_as_the_narrowed_model_does(family, saved, tmp_path):
    model, base = saved(family)
    cut = ragged_cut(model)
    export_pruned(plan_for(model, cut), base, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    with narrowed(model, cut):
        expected = model.generate(ids, use_cache=False, **arguments)
    assert torch.equal(loaded.generate(ids, **arguments), expected)
    assert torch.equal(loaded.generate(ids, cache_implementation="static", **arguments), expected)


def test_without_the_import_loading_is_refused_loudly(saved, tmp_path):
    model, base = saved("llama")
    export_pruned(plan_for(model, ragged_cut(model)), base, tmp_path / "out")
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(tmp_path / 'out')!r})"
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert failed.returncode != 0
    assert "sparsesearch_llama" in failed.stderr


STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM
for place in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(place)
    assert "sparsesearch" not in sys.modules
    torch.save(model(torch.arange(1, 20)[None]).logits.detach(), place + ".logits")
"""


def test_logical_and_uniform_load_without_sparsesearch(saved, tmp_path):
    model, base = saved("llama")
    layers = layers_of(model)
    uniform = {i: layer_cut(layer, heads=(0, 1), channels=tuple(range(16))) for i, layer in enumerate(layers)}
    cuts = {"logical": ragged_cut(model), "physical": Cut(layers=uniform)}
    found = {mode: export_pruned(plan_for(model, cut), base, tmp_path / mode, mode=mode) for mode, cut in cuts.items()}
    assert [report.layout for report in found.values()] == ["logical", "stock"]
    assert found["physical"].parameters < found["physical"].base_parameters
    subprocess.run([sys.executable, "-c", STOCK, *(tmp_path / mode for mode in cuts)], check=True, capture_output=True)
    for mode, cut in cuts.items():
        assert json.loads((tmp_path / mode / "config.json").read_text())["model_type"] == "llama"
        with torch.no_grad(), narrowed(model, cut):
            expected = model(torch.arange(1, 20)[None]).logits
        # the same sums with zeros in between
        tolerance = 48 * torch.finfo(torch.float32).eps * float(expected.abs().max()) * 8
        assert float((torch.load(tmp_path / f"{mode}.logits") - expected).abs().max()) <= tolerance


@torch.no_grad()
def test_attention_rules_run_on_the_heads_that_are_left(saved, tmp_path):
    model, base = saved("llama")
    cut, rule = ragged_cut(model), SinkWindow(sink=16, window=16)
    plan = plan_for(model, cut, rule)
    export_pruned(plan, base, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config._attn_implementation == "sparsesearch"
    rules = loaded.model.layers[2].self_attn.sparsesearch_binding.rules
    assert [own.kind for own in rules] == ["sink_window", "dense"], "heads 0 and 3 of layer 2 stay"
    ids = torch.randint(1, 64, (1, 100), generator=torch.Generator().manual_seed(0))
    by_hand = plan_for(model, None, rule)
    for index, own in cut.layers.items():  # the same by zeros, every head still there
        layer = layers_of(model)[index]
        layer.projection(layer.attention.out).weight.data.unflatten(1, (4, -1))[:, list(own.removed_heads)] = 0
        layer.projection(layer.feed_forward.out).weight.data[:, list(own.removed_channels)] = 0
    with sparsesearch.apply(model, by_hand, allow_other_weights=True):
        expected = model(ids).logits
    tolerance = 100 * torch.finfo(torch.float32).eps * float(expected.abs().max()) * 8
    assert float((loaded(ids).logits - expected).abs().max()) <= tolerance


def test_refusals(saved, tmp_path):
    model, base = saved("llama")
    plan = plan_for(model, ragged_cut(model))
    with pytest.raises(SpecError, match="removes none"):
        export_pruned(plan_for(model, None), base, tmp_path / "out")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1)
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(PlanMismatchError, match="weights"):
        export_pruned(plan, tmp_path / "other", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_pruned(plan, base, tmp_path / "out")
    with pytest.raises(ArtifactError, match="must be empty"):
        export_pruned(plan, base, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "sparsesearch_cut": {}}))
    with pytest.raises(ArtifactError, match="widths"):
        AutoModel.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("family", sorted(CLASSES))
@pytest.mark.parametrize("mode", ["physical", "logical"])
def test_verify_accepts_what_apply_wrote_and_finds_what_was_changed(family, mode, saved, tmp_path):
    model, base = saved(family)
    plan = plan_for(model, ragged_cut(model))
    export_pruned(plan, base, tmp_path / "out", mode=mode)
    assert is_pruned(tmp_path / "out")
    found = verify_pruned(tmp_path / "out")
    assert found.problems == ()
    removed = sum(len(own.removed_heads) for own in plan.pruning.layers.values())
    assert (found.layout, found.heads_removed) == ("per layer" if mode == "physical" else "logical", removed)
    other = Cut(layers={**plan.pruning.layers, 3: layer_cut(layers_of(model)[3], channels=(0, 1, 2))})
    (tmp_path / "out" / "sparse_plan.json").unlink()
    plan_for(model, other).save(tmp_path / "out" / "sparse_plan.json")
    assert any("layer 3" in problem for problem in verify_pruned(tmp_path / "out").problems)


def test_verify_compares_rules_and_the_uniform_layout(saved, tmp_path):
    model, base = saved("llama")
    layers = layers_of(model)
    cut = Cut(layers={i: layer_cut(layer, heads=(0, 1), channels=tuple(range(16))) for i, layer in enumerate(layers)})
    export_pruned(plan_for(model, cut), base, tmp_path / "out")
    found = verify_pruned(tmp_path / "out")
    assert (found.layout, found.problems) == ("stock", ())
    assert found.decode_error <= found.tolerance


def test_uniform_widths_are_what_llama_cpp_converts(saved, tmp_path):
    gguf = pytest.importorskip("gguf")
    model, base = saved("llama")
    layers = layers_of(model)
    cut = Cut(layers={i: layer_cut(layer, heads=(0, 1), channels=tuple(range(16))) for i, layer in enumerate(layers)})
    found = export_pruned(plan_for(model, cut), base, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found.layout == "stock"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (2, 1, 8)
    assert config["intermediate_size"] == 32
    assert "sparsesearch" not in json.dumps(config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, len(layers))
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  # safetensors' own
            assert names.get_name(name, (".weight", ".bias")) is not None, name
            assert not name.endswith(".bias"), "stock Llama has no biases"
