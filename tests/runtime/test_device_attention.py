"""The kernels' way through the runtime: in Triton's interpreter here, on the GPU if there is one."""

import logging
from contextlib import nullcontext

import pytest
import torch
from runtime_plans import RULES, cycled_plan, group_plan, left_padded, oracle_logits, rule

import sparsesearch
from sparsesearch.bench.rules import no_host_wait
from sparsesearch.block_mask import BlockGrid
from sparsesearch.errors import UnsupportedKernelError
from sparsesearch.evaluate.density import TileCount, achieved_density, counting
from sparsesearch.explanation import explain
from sparsesearch.kernels.device_select import acting_rules
from sparsesearch.plan import uniform_plan
from sparsesearch.rules import parse_rule
from sparsesearch.runtime import backends
from sparsesearch.runtime.backends import serving_kernel
from sparsesearch.runtime.cache_keyword import CACHE_KEYWORD
from sparsesearch.runtime.decode_step import DecodeStep
from sparsesearch.runtime.fingerprint import describe
from sparsesearch.runtime.mask_code import mask_code, spans, spans_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MIXTURE = [*RULES, "bitmap"]
ROWS = (83, 40, 3)


def close(ours: torch.Tensor, exact: torch.Tensor) -> None:
    """Within float32's error of two layers."""
    assert (ours.cpu() - exact.cpu()).abs().max() <= 2**10 * torch.finfo(torch.float32).eps * exact.abs().max()


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "mistral"])
def test_every_rule_equals_the_oracle(tiny, architecture):
    """Mistral's window is shorter than the prompt: its layers must notice and go the other way."""
    model = tiny(architecture).to(DEVICE)
    plan = cycled_plan(model, MIXTURE)
    ids, _ = left_padded([83], 64)
    with torch.no_grad(), sparsesearch.apply(model, plan, backend="triton"):
        ours = model(ids.to(DEVICE)).logits[0]
    close(ours, oracle_logits(model.cpu(), plan, ids[0]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_one_call_with_the_same_result(tiny, side):
    model = tiny("llama").to(DEVICE)
    plan = cycled_plan(model, MIXTURE)
    ids, mask = left_padded(ROWS, 64)
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    with torch.no_grad(), sparsesearch.apply(model, plan, backend="triton"):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        ours = model(**{name: value.to(DEVICE) for name, value in inputs.items()}).logits
    for row, length in enumerate(ROWS):
        keep = mask[row].bool()
        close(ours[row, keep.to(DEVICE)], oracle_logits(model.cpu(), plan, ids[row, keep]))
        assert keep.sum() == length


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("plan_of", [cycled_plan, group_plan])
def test_decoding_equals_the_oracle(tiny, plan_of, cache):
    """A prefill, then one by one over a block border."""
    model = tiny("llama").to(DEVICE)
    plan = plan_of(model, ["stream", "dense", "zero", "bitmap", "mean", "slash"])
    ids, _ = left_padded([66], 64)
    with torch.no_grad(), sparsesearch.apply(model, plan, backend="triton", cache=cache):
        kv = sparsesearch.sparse_cache(model, prompt_tokens=60)
        parts = [ids[:, :60], *ids[:, 60:].split(1, 1)]
        logits = [model(part.to(DEVICE), **{CACHE_KEYWORD: kv}).logits[0] for part in parts]
    close(torch.cat(logits), oracle_logits(model.cpu(), plan, ids[0], 60))


def test_a_batch_generates_what_single_rows_generate(tiny):
    model = tiny("llama").to(DEVICE)
    plan = group_plan(model, ["stream", "elastic", "mean", "dense", "zero"])
    ids, mask = left_padded((30, 20), 64)
    outputs = {}
    for backend in ("triton", "torch"):
        with sparsesearch.apply(model, plan, backend=backend):
            outputs[backend] = model.generate(
                ids.to(DEVICE), attention_mask=mask.to(DEVICE), max_new_tokens=4, do_sample=False, pad_token_id=0
            )
    assert torch.equal(outputs["triton"], outputs["torch"])


@pytest.mark.parametrize("name", ["slash", "pooled"])
@pytest.mark.parametrize("grid", [BlockGrid(1, 9, 16), BlockGrid(63, 63, 16), BlockGrid(40, 130, 16, 64)], ids=str)
@pytest.mark.parametrize("dealt", [(0, 0, 0, 0), (0, 1, 1, 0), (1, 1, 0, 0)], ids=str)
def test_tiles_chosen_by_kernels_are_those_of_the_rule(generator, name, grid, dealt):
    from sparsesearch.kernels.device_select import Selector

    other = [rule("stream"), rule("dense")]
    rules = [rule(name) if deal == 0 else other[head % 2] for head, deal in enumerate(dealt)]
    q = torch.randn(4, grid.q_len, 16, generator=generator)
    k = torch.randn(2, grid.kv_len, 16, generator=generator)
    selector = Selector(rules, grid, 2, DEVICE)
    banked = selector.choose(q.to(DEVICE), k.to(DEVICE), scale=0.25)
    tiles = banked.per_head().cpu()
    assert int(banked.num_tiles()) == int(tiles.sum())
    for head, own in enumerate(rules):
        if own.dynamic and grid.q_len == 1:
            expected = grid.reachable()
        else:
            expected = own.select(grid, q[head] * 0.25, k[head // 2])
        assert torch.equal(tiles[head], expected), head


def test_a_batch_of_equal_shapes_chooses_in_one_call_what_each_sequence_chooses(generator):
    from sparsesearch.kernels.device_select import BatchSelector, Selector

    grid = BlockGrid(63, 63, 16)
    rules = [rule(name) for name in ("slash", "stream", "pooled", "slash")]
    q = torch.randn(3, 63, 4, 16, generator=generator).transpose(1, 2).to(DEVICE)
    k = torch.randn(3, 63, 2, 16, generator=generator).transpose(1, 2).to(DEVICE)
    alone, together = Selector(rules, grid, 2, DEVICE), BatchSelector(rules, grid, 2, 3, DEVICE)
    for row, found in enumerate(together.choose(q, k, scale=0.25)):
        assert torch.equal(found.per_head(), alone.choose(q[row], k[row], scale=0.25).per_head()), row


def test_a_batch_without_padding_equals_the_oracle(tiny, monkeypatch):
    from sparsesearch.runtime import device_attention

    model = tiny("llama").to(DEVICE)
    plan = group_plan(model, ["slash", "pooled", "stream"])
    ids = torch.stack([left_padded([60], 64, seed=seed)[0][0] for seed in (0, 1)])
    used = []
    choose = device_attention.BatchSelector.choose
    monkeypatch.setattr(
        device_attention.BatchSelector, "choose", lambda self, *args, **kw: used.append(1) or choose(self, *args, **kw)
    )
    with torch.no_grad(), sparsesearch.apply(model, plan, backend="triton"):
        ours = model(ids.to(DEVICE)).logits
    assert used
    for row in range(2):
        close(ours[row], oracle_logits(model.cpu(), plan, ids[row]))


LAWS = [
    {"kind": "pooled_topk", "keep": {"a": 96, "b": 0.1}},
    {"kind": "vertical_slash", "vertical": 16, "slash": {"a": 80, "b": 0.1}},
    {"kind": "bounds_topk", "keep": 16},
]


@pytest.mark.parametrize("data", LAWS, ids=lambda data: data["kind"])
@pytest.mark.parametrize("length", [17, 80, 95, 96, 97, 112, 113, 160])
def test_rules_whose_laws_keep_all_choose_nothing(generator, data, length):
    """A law says so exactly where the choice is everything, whatever queries and keys are."""
    one, grid = parse_rule(data, where="tests"), BlockGrid(length, length, 16)
    q, k = torch.randn(2, length, 8, generator=generator), torch.randn(2, length, 8, generator=generator)
    everything = bool((one.select(grid, q, k) == grid.reachable()).all())
    if one.kind == "vertical_slash":  # columns and diagonals may cover the grid together
        assert everything or not one.keeps_all(grid)
    else:
        assert everything == one.keeps_all(grid)
    assert acting_rules((one,), grid)[0].dynamic != one.keeps_all(grid)


def test_a_short_prompt_runs_dense_by_its_law(tiny):
    """No choice is made, none is reported missing, and the prompt is what dense attention makes of it."""
    model = tiny("llama").to(DEVICE)
    law = parse_rule(LAWS[0], where="tests")
    plan = uniform_plan(describe(model, "tests"), law, block_tokens=16, lengths_tokens=(64, 160))
    ids = left_padded([80], 64)[0].to(DEVICE)
    count = TileCount()
    with torch.no_grad():
        expected = model(ids).logits
        with sparsesearch.apply(model, plan, backend="triton"):
            close(model(ids).logits, expected)
            with counting(plan, count):
                model(ids)
    assert achieved_density(plan, 80, count) == 1
    found = explain(plan, "0:0")
    assert found.densities == {64: 1.0, 160: None}


@pytest.mark.parametrize("causal", [True, False])
def test_best_blocks_are_those_of_a_stable_sort(generator, causal):
    from sparsesearch.kernels.triton_select import keep_best

    grid = BlockGrid(70, 200, 10, causal=causal)
    scores = torch.randint(-3, 4, (3, grid.num_q_blocks, grid.num_k_blocks), generator=generator).float()  # many ties
    scores[0] = scores[0] * 1e30
    budget = torch.randint(1, grid.num_k_blocks + 3, (grid.num_q_blocks,), generator=generator).int()
    kept = keep_best(scores.to(DEVICE), budget.to(DEVICE), grid, sink_blocks=2).cpu()
    always = grid.reachable() & (grid.diagonal() | (grid.k_blocks() < 2))
    ranked = scores.masked_fill(always, torch.inf).masked_fill(~grid.reachable(), -torch.inf)
    rank = ranked.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    assert torch.equal(kept, grid.reachable() & ((rank < budget[:, None]) | always))


def test_what_was_taken_is_said_once(tiny, caplog):
    backends._say.cache_clear()
    model = tiny("llama").to(DEVICE)
    ids, _ = left_padded([20], 64)
    plan = cycled_plan(model, ["stream"])
    caplog.set_level(logging.INFO, logger=backends.__name__)
    with torch.no_grad(), sparsesearch.apply(model, plan, backend="triton"):
        model(ids.to(DEVICE))
        model(ids.to(DEVICE))
    assert [record.getMessage() for record in caplog.records] == [
        "attention of torch.float32, head_dim 8, blocks of 16 runs on triton"
    ]


def test_a_kernel_that_cannot_serve_is_refused_by_name(tiny):
    model = tiny("llama").to(DEVICE)
    ids = left_padded([20], 64)[0].to(DEVICE)
    plan = cycled_plan(model, ["stream"])
    odd = plan.model_copy(update={"block_tokens": 10})
    cases = [
        (plan, "gluon", False, "gluon: needs"),  # fp32 even on Hopper
        (plan, "triton", True, "no backward"),
        (odd, "triton", False, "of 16 tokens"),
    ]
    for one, backend, trained, words in cases:
        with (
            torch.set_grad_enabled(trained),
            sparsesearch.apply(model, one, backend=backend),
            pytest.raises(UnsupportedKernelError, match=words),
        ):
            model(ids)


def test_auto_on_a_cpu_is_torch():
    x = torch.zeros(1, 2, 20, 16)
    assert serving_kernel("auto", x, x, x, 16) is None


def test_spans_of_a_device_code_are_read_once():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    code = mask_code(2, 5, 5, attention_mask=mask).to(DEVICE)
    laws = torch.tensor([3, 5])
    first = spans_of(code, laws, 2, 5, 5, 2)
    assert list(first) == list(spans(code.cpu(), laws, 2, 5, 5, 2))
    if code.is_cuda:
        assert spans_of(code, laws, 2, 5, 5, 2) is first


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize(
    "names", [["slash", "pooled", "stream", "dense"], ["elastic", "mean", "zero", "stream"]], ids=str
)
def test_neither_a_prompt_nor_a_token_waits_for_the_host(tiny, names):
    """A second prompt of a shape, into a cache of its own, and decoding steps behind it."""
    model = tiny("llama", num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4).to(DEVICE)
    ids = left_padded([120], 64)[0].to(DEVICE)
    with torch.inference_mode(), sparsesearch.apply(model, group_plan(model, names), backend="triton"):
        outputs = []
        for turn in range(2):  # the first one makes what a shape needs
            with no_host_wait() if turn else nullcontext():
                cache = sparsesearch.sparse_cache(model, max_tokens=120)
                outputs.append(model(ids, logits_to_keep=1, **{CACHE_KEYWORD: cache}).logits)
        cache = sparsesearch.sparse_cache(model, max_tokens=130)
        model(ids, **{CACHE_KEYWORD: cache})
        step = DecodeStep(model, cache, first_position=120, graph=False)
        step(ids[:, 0])
        with no_host_wait():
            step(ids[:, 1])
    assert torch.equal(*outputs)
