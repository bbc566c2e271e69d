"""A fused step against the model's own modules, token by token; on a CPU in Triton's interpreter, in float32."""

import pytest
import torch
from runtime_plans import cycled_plan, group_plan, left_padded
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

import sparsesearch
from sparsesearch.errors import UnsupportedModelError
from sparsesearch.kernels.step_ops import MOST_ROWS
from sparsesearch.runtime.cache_keyword import CACHE_KEYWORD
from sparsesearch.runtime.decode_step import DecodeStep
from sparsesearch.runtime.fused_layers import recognise
from sparsesearch.runtime.step_choices import Choosers

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
PROMPT, STEPS = 47, 3  # blocks of 16: the steps go through the end of one
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
         "vocab_size": 64, "max_position_embeddings": 512}  # fmt: skip
MODELS = {
    "llama": ("llama", {}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "tied": ("llama", {"tie_word_embeddings": True, "num_attention_heads": 6, "hidden_size": 48}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": None}),
}


def build(name: str, **more):
    """With norms and biases that are not all one or zero."""
    architecture, changes = MODELS[name]
    settings = {**SIZES, "initializer_range": 0.2, "pad_token_id": 0, "eos_token_id": None, **changes, **more}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **settings)).eval()
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name or "bias" in parameter_name:
                nn.init.normal_(parameter, mean=float("norm" in parameter_name), std=0.3)
    return model.to(DEVICE)


def with_kernels(cache):
    """Prompts are no matter here, and take the interpreter long: only the steps run through kernels."""
    for layer in cache.layers:
        layer.kernel = True


def decoded(model, ids, cache, *, fused, mask=None, **settings):
    """Logits of the steps behind the prompts."""
    inputs, first = {}, ids.shape[1]
    if mask is not None:
        inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        first = mask.sum(1)
    with torch.no_grad():
        model(ids, **{CACHE_KEYWORD: cache}, use_cache=True, **inputs)
    if fused or ON_GPU:
        with_kernels(cache)
    step = DecodeStep(model, cache, first_position=first, fused=fused, **settings)
    rows = torch.arange(len(ids), device=DEVICE)
    logits = [step((rows * 7 + 3 * token) % 64).clone() for token in range(STEPS)]
    assert step.is_fused == fused
    return torch.stack(logits)


def same(ours, plain):
    eps = torch.finfo(plain.dtype).eps
    assert (ours - plain).abs().max() <= 2**8 * eps * plain.abs().max()
    assert (ours - plain).abs().max() > 0, "nothing was computed another way"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_every_step_is_the_models_own(name, batch):
    if not ON_GPU and (batch == 8 or (batch == 1 and name != "qwen3")):
        pytest.skip("up to 30 s each in the interpreter: one model at 1 row and all at 3 run there, the rest on a GPU")
    model = build(name)
    ids = left_padded([PROMPT] * batch, 64)[0].to(DEVICE)
    with sparsesearch.apply(model, group_plan(model, ["stream", "dense"])):
        caches = [sparsesearch.sparse_cache(model, max_tokens=80) for _ in range(2)]
        plain, ours = (
            decoded(model, ids, cache, fused=fused) for cache, fused in zip(caches, (False, True), strict=True)
        )
    same(ours, plain)
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(one.seen, other.seen)
        assert torch.equal(one.reads.lens, other.reads.lens)
        assert int(one.slots) == int(other.slots) == PROMPT + STEPS


@pytest.mark.parametrize(
    ("plan_of", "names"),
    [
        (group_plan, ["stream", "zero", "elastic", "mean", "dense"]),
        (cycled_plan, ["stream", "dense", "bitmap", "mean"]),
    ],
)
def test_padded_rows_under_every_kind_of_rule(plan_of, names):
    model = build("qwen3")
    ids, mask = (x.to(DEVICE) for x in left_padded((PROMPT, 21, 3), 64))
    with sparsesearch.apply(model, plan_of(model, names)):
        plain, ours = (
            decoded(model, ids, sparsesearch.sparse_cache(model, max_tokens=80), fused=fused, mask=mask)
            for fused in (False, True)
        )
    same(ours, plain)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_without_a_plan(compiled):
    model = build("llama", num_hidden_layers=4)
    ids = left_padded([PROMPT] * 2, 64)[0].to(DEVICE)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, ours = (
        decoded(model, ids, StaticCache(model.config, max_cache_len=80), fused=fused, compiled=compiled and fused, backend="aot_eager")
        for fused in (False, True)
    )  # fmt: skip
    same(ours, plain)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == int(compiled)  # one for all layers


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no CUDA device")
@pytest.mark.parametrize("name", ["llama", "biases", "qwen3"])
def test_bfloat16_is_as_close_as_the_model(name):
    """Both round; the fused step, which rounds less often, must not be further from float32 by more than that."""
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "head_dim": 64,
    }
    model = build(name, **sizes, initializer_range=0.04)
    ids = left_padded([PROMPT] * 3, 64)[0].to(DEVICE)
    outputs = []
    for dtype, fused in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        model = model.to(dtype)
        with sparsesearch.apply(model, group_plan(model, ["stream", "dense"])):
            outputs.append(decoded(model, ids, sparsesearch.sparse_cache(model, max_tokens=80), fused=fused).double())
    exact, plain, ours = outputs
    assert (ours - exact).norm() <= 1.25 * (plain - exact).norm()


def test_what_is_not_served_falls_back_and_says_why():
    model = build("llama")
    ids = left_padded([PROMPT] * (MOST_ROWS + 1), 64)[0].to(DEVICE)
    with sparsesearch.apply(model, group_plan(model, ["stream", "dense"])), torch.no_grad():
        cache = sparsesearch.sparse_cache(model, max_tokens=80)
        model(ids, **{CACHE_KEYWORD: cache})
        with_kernels(cache)
        assert not DecodeStep(model, cache, first_position=PROMPT, fused=None).is_fused
        with pytest.raises(UnsupportedModelError, match="at most 16 rows"):
            DecodeStep(model, cache, first_position=PROMPT, fused=True)
    if not ON_GPU:
        with sparsesearch.apply(model, group_plan(model, ["stream", "dense"])), torch.no_grad():
            cache = sparsesearch.sparse_cache(model, max_tokens=80)
            model(ids[:1], **{CACHE_KEYWORD: cache})
            with pytest.raises(UnsupportedModelError, match="another backend"):
                DecodeStep(model, cache, first_position=PROMPT, fused=True)


def test_only_known_parts_are_recognised(tiny):
    unknown = {"gpt2": "has", "phi": "has", "mistral": "sliding window"}
    for architecture, reason in unknown.items():
        with pytest.raises(UnsupportedModelError, match=reason):
            recognise(tiny(architecture))
    for change, reason in (
        (lambda layer: layer.mlp.register_forward_hook(lambda *_: None), "or hooks"),
        (lambda layer: setattr(layer.mlp, "act_fn", nn.GELU()), "GELU, not SiLU"),
        (lambda layer: setattr(layer, "input_layernorm", nn.LayerNorm(32)), "LayerNorm, not an RMS norm"),
        (lambda layer: setattr(layer.self_attn, "v_proj", nn.Linear(32, 16)), "not of one kind"),
        (lambda layer: setattr(layer.mlp, "down_proj", nn.Sequential(nn.Linear(48, 32))), "Sequential"),
    ):
        model = build("llama")
        change(model.model.layers[1])
        with pytest.raises(UnsupportedModelError, match=reason):
            recognise(model)
        assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear  # nothing was moved
    model = build("llama")
    recognise(model)
    model.model.layers[0].mlp.to(torch.float64)
    with pytest.raises(UnsupportedModelError, match="do not lie side by side"):
        recognise(model)


def test_a_model_that_computes_more_than_its_parts_show_is_noticed():
    """Granite has Llama's parts, and multipliers besides."""
    settings = {**SIZES, "residual_multiplier": 0.3, "initializer_range": 0.2, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("granite", **settings)).eval().to(DEVICE)
    ids = left_padded([PROMPT], 64)[0].to(DEVICE)
    with sparsesearch.apply(model, group_plan(model, ["stream", "dense"])), torch.no_grad():
        for fused in (True, None):
            cache, twin = (sparsesearch.sparse_cache(model, max_tokens=80) for _ in range(2))
            for one in (cache, twin):
                model(ids, **{CACHE_KEYWORD: one})
                with_kernels(one)
            step = DecodeStep(model, cache, first_position=PROMPT, fused=fused)
            if fused:
                with pytest.raises(UnsupportedModelError, match="must compute what GraniteForCausalLM computes"):
                    step(ids[:, 0])
                continue
            step._fused = DecodeStep(model, cache, first_position=PROMPT, fused=True)._fused  # as on a GPU in bfloat16
            step._is_checked = False
            plain = DecodeStep(model, twin, first_position=PROMPT, fused=False)
            assert torch.equal(step(ids[:, 0]), plain(ids[:, 0]))
            assert "differ by" in step.fallback_reason


def test_choices_that_rounding_tips_over_do_not_count_against_the_fused_step(monkeypatch):
    """While both ways are compared, heads that choose read the same pages; afterwards the step chooses for itself, and the bounds are as before."""
    model = build("qwen3")
    ids = left_padded([PROMPT] * 2, 64)[0].to(DEVICE)
    chosen, original = [], Choosers.tables

    def tipping(self, *args):
        """From the second step on all pages are read in place of the best."""
        table, lens = original(self, *args)
        chosen.append(len(chosen))
        if len(chosen) > len(model.model.layers):  # after one step of all layers
            table = torch.arange(table.shape[1], device=table.device, dtype=torch.int32).expand_as(table).contiguous()
            lens = args[4].repeat_interleave(lens.numel() // args[4].numel()).contiguous()
        return table, lens

    with sparsesearch.apply(model, group_plan(model, ["bounds"])), torch.no_grad():
        cache = sparsesearch.sparse_cache(model, max_tokens=80)
        model(ids, **{CACHE_KEYWORD: cache})
        with_kernels(cache)
        monkeypatch.setattr(Choosers, "tables", tipping)
        before = [layer.reads.low.clone() for layer in cache.layers]
        step = DecodeStep(model, cache, first_position=PROMPT, fused=True)
        step._check_fused()
        assert len(chosen) == len(model.model.layers)
        for layer, low in zip(cache.layers, before, strict=True):
            assert torch.equal(layer.reads.low, low)
        step(ids[:, 0])
        assert len(chosen) == 2 * len(model.model.layers)
