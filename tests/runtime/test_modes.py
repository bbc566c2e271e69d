"""Every way to feed a model, against the recomputation: on a GPU through the kernels in fp32 and bf16, elsewhere in fp32.

Lengths are odd on purpose. Logits agree within the error of the type, and so do the tokens wherever the recomputation's choice is clearer than that.
"""

import pytest
import torch
from runtime_plans import group_plan, left_padded, oracle_logits
from torch import Tensor
from transformers import PreTrainedModel

import sparsesearch
from sparsesearch.plan import Plan
from sparsesearch.runtime.cache_keyword import CACHE_KEYWORD
from sparsesearch.runtime.decode_step import DecodeStep

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")]
CASES = [
    pytest.param((torch.float32, "triton" if HAS_GPU else "torch"), id="fp32"),
    pytest.param((torch.bfloat16, "auto"), id="bf16", marks=ON_GPU),
]
ROWS, NEW_TOKENS = (157, 65, 3), 64
VOCABULARY = 8  # of 64 random logits, fewer than a third stand out by more than bfloat16 may err
NAMES = ["stream", "dense", "elastic", "mean", "zero"]


@pytest.fixture(params=CASES)
def setup(request, tiny):
    """A model, its plan and the backend: heads and blocks of sizes that every kernel takes."""
    dtype, backend = request.param
    model = tiny(
        "llama", hidden_size=128, num_key_value_heads=2, head_dim=64, num_hidden_layers=3, initializer_range=0.1,
        vocab_size=VOCABULARY,
    )  # fmt: skip
    model = model.to(DEVICE, dtype)
    return model, group_plan(model, NAMES).model_copy(update={"block_tokens": 64 if HAS_GPU else 16}), backend


def check(model: PreTrainedModel, plan: Plan, ids: Tensor, prompt: int, logits: Tensor) -> None:
    """`logits` of the last tokens of `ids`, one row, of which the first `prompt` came as a prompt."""
    exact = oracle_logits(model, plan, ids.to(DEVICE), prompt)[-len(logits) :].float()
    # bf16 on a CPU: errors of 1.0 to 1.4 eps; at 3 eps, two of three choices are clear
    allowed = (3 if model.dtype == torch.bfloat16 else 2**9) * torch.finfo(model.dtype).eps * exact.abs().max()
    assert (logits.float() - exact).abs().max() <= allowed
    best = exact.topk(2).values
    clear = best[:, 0] - best[:, 1] > 2 * allowed
    assert clear.float().mean() > 0.5, "most choices must be clear"
    assert torch.equal(logits.argmax(-1)[clear], exact.argmax(-1)[clear])


def parts_through(model: PreTrainedModel, parts: list[Tensor], cache: object) -> Tensor:
    return torch.cat([model(part[None].to(DEVICE), **{CACHE_KEYWORD: cache}).logits[0] for part in parts])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_padded_batch_generates(setup, kind):
    model, plan, backend = setup
    ids, mask = (x.to(DEVICE) for x in left_padded(ROWS, VOCABULARY))
    settings = {"do_sample": False, "pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}
    if kind == "static":
        settings |= {"cache_implementation": "static", "disable_compile": True}
    with sparsesearch.apply(model, plan, backend=backend):
        out = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, **settings)
    for row, length in enumerate(ROWS):
        whole = out.sequences[row, -length - NEW_TOKENS : -1]
        check(model, plan, whole, length, torch.stack([step[row] for step in out.logits]))


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # Inductor's advice; fp32 is meant here
@pytest.mark.parametrize("compiled", [False, True])
def test_a_padded_batch_decodes_step_by_step(setup, compiled):
    """On a GPU a replayed CUDA graph."""
    model, plan, backend = setup
    ids, mask = (x.to(DEVICE) for x in left_padded(ROWS, VOCABULARY))
    torch._dynamo.reset()
    with torch.no_grad(), sparsesearch.apply(model, plan, backend=backend):
        cache = sparsesearch.sparse_cache(model, max_tokens=ids.shape[1] + NEW_TOKENS)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        first = model(ids, attention_mask=mask, position_ids=positions, **{CACHE_KEYWORD: cache}).logits[:, -1]
        inductor = "inductor" if HAS_GPU else "aot_eager"
        step = DecodeStep(model, cache, first_position=mask.sum(1), compiled=compiled, backend=inductor)
        logits, tokens = [first], [first.argmax(-1)]
        for _ in range(NEW_TOKENS - 1):
            logits.append(step(tokens[-1]).clone())
            tokens.append(logits[-1].argmax(-1))
    for row, length in enumerate(ROWS):
        whole = torch.cat([ids[row, -length:], torch.stack(tokens, 1)[row, :-1]])
        check(model, plan, whole, length, torch.stack([step[row] for step in logits]))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_chunks_and_a_second_turn(setup, kind):
    """A prompt of 150 in chunks, some tokens one by one, another 71 at once, then one by one."""
    model, plan, backend = setup
    ids = left_padded([250], VOCABULARY)[0][0]
    parts = [*ids[:150].split(67), *ids[150:160].split(1), ids[160:231], *ids[231:].split(1)]
    with torch.no_grad(), sparsesearch.apply(model, plan, backend=backend):
        cache = sparsesearch.sparse_cache(model, prompt_tokens=150, max_tokens=250 if kind == "static" else None)
        logits = parts_through(model, parts, cache)
    check(model, plan, ids, 150, logits)


def test_a_crop(setup):
    """As assisted decoding does: candidates are tried and taken back."""
    model, plan, backend = setup
    ids = left_padded([140], VOCABULARY)[0][0]
    with torch.no_grad(), sparsesearch.apply(model, plan, backend=backend):
        cache = sparsesearch.sparse_cache(model)
        logits = [parts_through(model, [ids[:129]], cache)]
        for wrong in (1, 5):
            parts_through(model, [ids[:wrong] + 1], cache)
            cache.crop(-wrong)
        logits.append(parts_through(model, list(ids[129:].split(1)), cache))
    check(model, plan, ids, 129, torch.cat(logits))


def test_beams(setup):
    """Two beams keep what a run without a ragged cache keeps, and score alike."""
    model, plan, backend = setup
    ids, mask = (x.to(DEVICE) for x in left_padded((60, 33), VOCABULARY))
    settings = {"do_sample": False, "pad_token_id": 0, "num_beams": 2, "max_new_tokens": NEW_TOKENS}
    settings |= {"return_dict_in_generate": True, "output_scores": True, "attention_mask": mask}
    with sparsesearch.apply(model, plan, backend=backend):
        ours = model.generate(ids, **settings)
    with sparsesearch.apply(model, plan, backend=backend, cache=False):
        theirs = model.generate(ids, **settings)
    eps = torch.finfo(model.dtype).eps
    torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, rtol=16 * eps, atol=16 * eps)
    if model.dtype == torch.float32:
        assert torch.equal(ours.sequences, theirs.sequences)
