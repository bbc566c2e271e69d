"""Static ragged caches and the decoding step: equal to the recomputation, smaller, and the same tensors from step to step."""

import gc
import weakref

import pytest
import torch
from runtime_plans import BLOCK_TOKENS, cycled_plan, greedy_oracle, group_plan, left_padded, oracle_logits
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

import sparsesearch
from sparsesearch.errors import SparseSearchError, SpecError, UnsupportedModelError
from sparsesearch.kernels.cache_ops import KEEP_ALL, append_token, fill_prompt
from sparsesearch.runtime.cache_keyword import CACHE_KEYWORD
from sparsesearch.runtime.decode_step import DecodeStep, _addresses, _changes
from sparsesearch.runtime.static_layer import StaticPlanLayer
from sparsesearch.runtime.static_regions import Ring

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVICTING = ["stream", "zero", "elastic", "mean", "dense"]
MIXED = ["asks", "stream", "dense", "zero", "bitmap", "mean", "slash"]
CHOOSING = ["bounds", "stream", "bounds everywhere", "mean"]
ROWS = (157, 65, 3)


def prefilled(model, ids, max_tokens, **inputs):
    cache = sparsesearch.sparse_cache(model, max_tokens=max_tokens, prompt_tokens=min(ids.shape[1], max_tokens))
    with torch.no_grad():
        logits = model(ids, **{CACHE_KEYWORD: cache}, use_cache=True, **inputs).logits
    return cache, logits


def close(ours, exact):
    assert (ours.cpu() - exact).abs().max() <= 2**10 * torch.finfo(torch.float32).eps * exact.abs().max()


@pytest.mark.parametrize("ring", [(0, 1), (1, 1), (0, 2), (2, 3), (0, KEEP_ALL)], ids=str)
@pytest.mark.parametrize("kernel", [False, True])
def test_visible_keys_are_the_first_rows(ring, kernel):
    """Tokens carry their position as key; after each one, what a query may see lies in front, and `parts` says in which order."""
    block, count = 4, 50
    one = Ring(*ring, block)
    rows = one.rows(count)
    keys, values = torch.full((rows + 3, 2), -1.0, device=DEVICE), torch.zeros(rows + 3, 2, device=DEVICE)
    ints = {name: torch.tensor([number], dtype=torch.int32, device=DEVICE) for name, number in
            {"room": rows, "sinks": ring[0], "windows": ring[1], "seen": 0, "lens": 0}.items()}  # fmt: skip
    ints["slots"] = torch.zeros((), dtype=torch.int64, device=DEVICE)
    start = torch.tensor([2], device=DEVICE)
    for position in range(count):
        token = torch.full((1, 1, 1, 2), float(position), device=DEVICE)
        append_token(token, -token, keys, values, start, *ints.values(), block, kernel)
        seen = keys[2 : 2 + int(ints["lens"]), 0].tolist()
        newest = position // block
        visible = [p for p in range(position + 1) if p // block < ring[0] or p // block > newest - ring[1]]
        assert sorted(seen) == visible, position
        parts = one.parts(position + 1)
        assert [p + i for _, p, size in parts for i in range(size)] == visible
        assert all(seen[first + i] == p + i for first, p, size in parts for i in range(size))
        assert one.dropped(position + 1) == position + 1 - len(visible)
    assert int(ints["seen"]) == count
    assert torch.equal(values[2:-1], torch.where(keys[2:-1] < 0, 0, -keys[2:-1]))


@pytest.mark.parametrize("kernel", [False, True])
def test_a_pair_without_a_window_writes_nothing(kernel):
    keys, values = torch.zeros(40, 2, device=DEVICE), torch.zeros(40, 2, device=DEVICE)
    room, sinks, windows, seen, lens = torch.zeros(5, 1, dtype=torch.int32, device=DEVICE)
    token, slots = torch.ones(1, 1, 1, 2, device=DEVICE), torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(9):
        start = torch.tensor([20], device=DEVICE)
        append_token(token, token, keys, values, start, room, sinks, windows, seen, lens, slots, 4, kernel)
    assert not keys.any()
    assert not values.any()
    assert (int(seen), int(lens), int(slots)) == (9, 0, 9)


@pytest.mark.parametrize("ring", [(0, 1), (1, 1), (0, 2), (2, 3), (0, KEEP_ALL), (1, 0)], ids=str)
@pytest.mark.parametrize("kernel", [False, True])
def test_a_prompt_lies_where_single_tokens_would(ring, kernel):
    """Two padded rows of two heads, of which the second keeps everything."""
    block, slots, heads, counts = 4, 50, 2, (50, 33)
    rows = [Ring(*ring, block).rows(slots) if ring[1] else 0, slots]
    ints = {"room": rows * 2, "sinks": [ring[0], 0] * 2, "windows": [ring[1], KEEP_ALL] * 2}
    limits = [torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ints.values()]
    start = torch.tensor([0, rows[0], sum(rows), sum(rows) + rows[0]], device=DEVICE)
    x = torch.randn(2, 2, heads, slots, 3, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for length in (1, 4, 5, 8, 13, 20, 33):
        offsets = [slots - length, 0]
        lengths = torch.tensor([length, min(length, counts[1])], dtype=torch.int32, device=DEVICE)
        ours, theirs = torch.full((2, 2, 2 * sum(rows), 3), -1.0, device=DEVICE)
        seen, count, lens = torch.zeros(3, 4, dtype=torch.int32, device=DEVICE)
        fill_prompt(
            x[0], x[1], *ours, start, *limits, lengths, torch.tensor(offsets, dtype=torch.int32, device=DEVICE), seen, block, kernel
        )  # fmt: skip
        for token in range(length):
            new = torch.stack([x[:, row, :, offset + token] for row, offset in enumerate(offsets)], 1)[..., None, :]
            total = torch.zeros((), dtype=torch.int64, device=DEVICE)
            append_token(*new, *theirs, start, *limits, count, lens, total, block, False)
        assert torch.equal(seen, count)
        for pair, (first, size) in enumerate(zip(start.tolist(), lens.tolist(), strict=True)):
            assert torch.equal(ours[:, first : first + size], theirs[:, first : first + size]), (length, pair)


@pytest.mark.parametrize("names", [EVICTING, MIXED], ids=["evicting", "mixed"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
def test_generate_equals_the_recomputation(tiny, architecture, names):
    """Batch of 3 with left padding and 64 new tokens, in the cache that generate makes."""
    model = tiny(architecture)
    ids, mask = left_padded(ROWS, 64)
    plan = group_plan(model, names) if names is EVICTING else cycled_plan(model, names)
    with sparsesearch.apply(model, plan):
        settings = {"do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}
        ours = model.generate(ids, attention_mask=mask, max_new_tokens=64, **settings)[:, ids.shape[1] :]
    for row, length in enumerate(ROWS):
        assert torch.equal(ours[row], greedy_oracle(model, plan, ids[row, -length:], 64)), row


def test_a_layer_whose_heads_are_all_dense(tiny):
    """Its keys lie in the plan's cache like those of the other layers: prompt with padding, chunks of a second turn, single tokens, steps."""
    model = tiny("llama")
    plan = group_plan(model, EVICTING)
    first = plan.base_model.modules[0]
    dense = tuple("dense" for _ in plan.assignments[first])
    plan = plan.model_copy(update={"assignments": {**plan.assignments, first: dense}})
    ids, mask = left_padded(ROWS, 64)
    with sparsesearch.apply(model, plan):
        settings = {"do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}
        ours = model.generate(ids, attention_mask=mask, max_new_tokens=9, **settings)[:, ids.shape[1] :]
        cache, logits = prefilled(model, ids[:1, :90], 180)
        step = DecodeStep(model, cache, first_position=90)
        stepped = [step(token)[None] for token in ids[0, 90:95, None]]
        with torch.no_grad():
            last = model(ids[:1, 95:120], **{CACHE_KEYWORD: cache}).logits
    for row, length in enumerate(ROWS):
        assert torch.equal(ours[row], greedy_oracle(model, plan, ids[row, -length:], 9)), row
    exact = oracle_logits(model, plan, ids[0, :120], 90, calls=[90, 1, 1, 1, 1, 1, 25])
    close(torch.cat([logits[0], *(each.flatten(0, -2) for each in stepped), last[0]]), exact)


@pytest.mark.parametrize("plan_of", [group_plan, cycled_plan])
@pytest.mark.parametrize("chunk", [1, 37])
def test_chunks_and_a_second_turn_equal_the_oracle(tiny, plan_of, chunk):
    """A prompt of 90 in chunks, some tokens one by one, then another 60 at once, then one by one."""
    model = tiny("llama")
    plan = plan_of(model, ["stream", "elastic", "dense", "mean", "zero"])
    ids, _ = left_padded([180], 64)
    cache = sparsesearch.sparse_cache(model, prompt_tokens=90, max_tokens=180)
    parts = [*ids[:, :90].split(chunk, 1), *ids[:, 90:100].split(1, 1), ids[:, 100:160], *ids[:, 160:].split(1, 1)]
    with sparsesearch.apply(model, plan), torch.no_grad():
        logits = [model(part, **{CACHE_KEYWORD: cache}).logits[0] for part in parts]
    close(torch.cat(logits), oracle_logits(model, plan, ids[0], 90))


def test_a_padded_second_turn_equals_single_rows(tiny):
    model = tiny("llama")
    plan = group_plan(model, EVICTING)
    ids, mask = left_padded((120, 70), 64)
    more = torch.randint(1, 64, (2, 40), generator=torch.Generator().manual_seed(1))
    wider = torch.cat([mask, torch.ones_like(more)], 1)
    with sparsesearch.apply(model, plan), torch.no_grad():
        places = (wider.cumsum(1) - 1).clamp(min=0)
        cache, _ = prefilled(model, ids, 160, attention_mask=mask, position_ids=places[:, :120])
        ours = model(more, attention_mask=wider, position_ids=places[:, 120:], **{CACHE_KEYWORD: cache}).logits
    for row, length in enumerate((120, 70)):
        whole = torch.cat([ids[row, -length:], more[row]])
        close(ours[row], oracle_logits(model, plan, whole, length)[length:])


class Recorded(TorchDispatchMode):
    """Names of the operators that run; each may be a launch."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, arguments=(), settings=None):
        self.names.append(operator.__name__)
        return operator(*arguments, **settings or {})


@pytest.mark.parametrize(("names", "alone"), [(["stream", "dense"], True), (["mean", "dense"], False)])
def test_reading_plain_heads_is_one_operator(tiny, names, alone):
    model = tiny("llama")
    with sparsesearch.apply(model, group_plan(model, names)):
        cache, _ = prefilled(model, left_padded((40, 33), 64)[0], 50)
    layer, info = cache.layers[0], model.config
    q = torch.randn(2, info.num_attention_heads, info.head_dim)
    v = torch.randn(2, info.num_key_value_heads, info.head_dim)
    with Recorded() as recorded:
        layer.reads.attend(q, v, layer.keys, layer.values, layer.seen, 0.3, False)
    assert "gathered_decode.default" in recorded.names
    assert (len(recorded.names) == 1) == alone


def test_beams_equal_those_of_a_dynamic_cache(tiny):
    model = tiny("llama")
    ids, mask = left_padded((60, 33), 64)
    settings = {"do_sample": False, "pad_token_id": 0, "num_beams": 2, "attention_mask": mask, "max_new_tokens": 40}
    for plan in (group_plan(model, EVICTING), cycled_plan(model, MIXED)):
        with sparsesearch.apply(model, plan):
            static = model.generate(ids, cache_implementation="static", **settings)
            assert torch.equal(static, model.generate(ids, **settings))


def test_rows_can_be_repeated_and_selected(tiny):
    model = tiny("llama")
    ids, mask = left_padded((60, 20), 64)
    for plan in (group_plan(model, EVICTING), cycled_plan(model, MIXED)):
        with sparsesearch.apply(model, plan), torch.no_grad():
            caches = [prefilled(model, ids, 80, attention_mask=mask)[0] for _ in range(3)]
            caches[1].batch_repeat_interleave(2)
            caches[2].batch_select_indices(torch.tensor([1]))
            wider = torch.cat([mask, mask[:, -1:]], 1)
            rows = [torch.tensor(r) for r in ([0, 1], [0, 0, 1, 1], [1])]
            expected, repeated, selected = (
                model(ids[r, :1], attention_mask=wider[r], **{CACHE_KEYWORD: cache}).logits
                for r, cache in zip(rows, caches, strict=True)
            )
        close(repeated, expected[rows[1]])
        close(selected, expected[1:])


def test_memory_falls_and_is_used_again(tiny):
    model = tiny("llama", num_key_value_heads=4, max_position_embeddings=2048)
    plan = group_plan(model, ["stream", "zero", "mean", "dense"])
    ids, _ = left_padded([1000], 64)
    with sparsesearch.apply(model, plan):
        cache, first = prefilled(model, ids, 1024)
        dense_bytes = 2 * 1024 * 32 * 4
        kept = (1024 + 3 * BLOCK_TOKENS) * 8 * 4 * 2 + 8 * 8  # one head of four, a ring, and a sum in fp64
        assert [layer.nbytes for layer in cache.layers] == [kept] * 2
        assert kept < 0.27 * dense_bytes
        addresses = [layer.keys.data_ptr() for layer in cache.layers]
        cache.reset()
        with torch.no_grad():
            again = model(ids, **{CACHE_KEYWORD: cache}).logits
        assert torch.equal(first, again)
        assert addresses == [layer.keys.data_ptr() for layer in cache.layers]


def test_a_dropped_cache_gives_its_memory_back_at_once(tiny):
    """Without waiting for the collector of cycles: the next prompt's cache would come beside it."""
    model = tiny("llama", num_key_value_heads=4, max_position_embeddings=2048)
    ids, _ = left_padded([200], 64)
    with sparsesearch.apply(model, group_plan(model, ["stream", "zero", "mean", "dense"])):
        gc.disable()
        try:
            cache, _ = prefilled(model, ids, 256)
            layers = [weakref.ref(layer) for layer in cache.layers]
            assert all(layer() is not None for layer in layers)
            del cache
            assert not any(layer() is not None for layer in layers)
        finally:
            gc.enable()


def test_a_cache_with_memory_of_its_own_is_left_alone(tiny):
    model = tiny("llama")
    ids, _ = left_padded([40], 64)
    cache = StaticCache(model.config, max_cache_len=64)
    cache.early_initialization(1, 2, 8, torch.float32, torch.device("cpu"))
    plan = group_plan(model, EVICTING)
    with sparsesearch.apply(model, plan), torch.no_grad():
        ours = model(ids, **{CACHE_KEYWORD: cache}).logits[0]
    assert not any(isinstance(layer, StaticPlanLayer) for layer in cache.layers)
    close(ours, oracle_logits(model, plan, ids[0]))


def test_what_does_not_fit_is_refused(tiny):
    model = tiny("llama")
    ids, _ = left_padded([40], 64)
    with sparsesearch.apply(model, group_plan(model, EVICTING)):
        with pytest.raises(SparseSearchError, match="32 slots, padding included, but needs 40"):
            prefilled(model, ids, 32)
        cache, _ = prefilled(model, ids, 41)
        step = DecodeStep(model, cache, first_position=40)
        step(ids[:, 0])
        with pytest.raises(SpecError, match="is full"):
            step(ids[:, 0])
        with pytest.raises(SparseSearchError, match="dynamic cache"):
            cache.crop(-1)
        with pytest.raises(SpecError, match="max_tokens >= 1"):
            sparsesearch.sparse_cache(model, max_tokens=0)
        with pytest.raises(SpecError, match="prompt_tokens <= max_tokens"):
            sparsesearch.sparse_cache(model, max_tokens=4, prompt_tokens=5)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("names", [EVICTING, MIXED, CHOOSING], ids=["evicting", "mixed", "choosing"])
def test_a_decoding_step_generates_what_generate_does(tiny, names, compiled):
    """Left-padded batch; compiled layers share few graphs however many layers there are, and no step compiles again."""
    model = tiny("qwen3", num_hidden_layers=6).to(DEVICE)
    plan = group_plan(model, names)
    ids, mask = (x.to(DEVICE) for x in left_padded((70, 33), 64))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with sparsesearch.apply(model, plan):
        settings = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 30}
        expected = model.generate(ids, attention_mask=mask, **settings)[:, 70:]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache, logits = prefilled(model, ids, 100, attention_mask=mask, position_ids=positions)
        step = DecodeStep(model, cache, first_position=mask.sum(1), compiled=compiled, backend="aot_eager")
        first = logits[:, -1].argmax(-1)
        ours = [first, step(first).argmax(-1)]
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        ours += step.generate(ours[-1], 29)[:, 1:].unbind(1)
    assert torch.equal(torch.stack(ours, 1), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert not torch._dynamo.utils.counters["graph_break"]
    kinds = {tuple(rule.kind for rule in plan.module_rules(path)) for path in plan.base_model.modules}
    assert graphs <= (len(kinds) if compiled else 0)
    assert graphs < 6


def test_a_step_knows_whether_its_cache_has_moved(tiny):
    """Steps move nothing, a prompt that fits the room of the last one neither, though it might; another batch does."""
    model = tiny("llama")
    ids, _ = left_padded([40, 40], 64)
    with sparsesearch.apply(model, group_plan(model, EVICTING)):
        cache, _ = prefilled(model, ids, 100)
        step = DecodeStep(model, cache, first_position=40)
        step(ids[:, 0])
        step._changes, step._addresses = _changes(cache), _addresses(cache)
        step(ids[:, 0])
        assert not step._has_moved()
        cache.reset()
        model(ids, use_cache=True, **{CACHE_KEYWORD: cache})
        assert _changes(cache) != step._changes
        assert not step._has_moved()
        cache.batch_repeat_interleave(2)
        assert step._has_moved()


@pytest.mark.parametrize("names", [EVICTING, CHOOSING], ids=["evicting", "choosing"])
def test_a_step_can_be_taken_back(tiny, names):
    """What a capture runs to warm up must leave nothing behind, at the end of a block least of all."""
    from sparsesearch.runtime.decode_step import _Kept

    model = tiny("llama")
    for length in (95, 96, 97):
        ids, _ = left_padded([length + 1], 64)
        with sparsesearch.apply(model, group_plan(model, names)):
            (cache, _), (twin, _) = (prefilled(model, ids[:, :-1], 120) for _ in range(2))
            step, other = (DecodeStep(model, kv, first_position=length) for kv in (cache, twin))
            kept = _Kept(cache, step.positions)
            for _ in range(2):
                step.tokens.fill_(7)
                with torch.no_grad():
                    step._run()
                kept.restore()
            for ours, theirs in zip(
                cache.layers, twin.layers, strict=True
            ):  # bounds of a full block may never matter again
                assert torch.equal(ours.reads.low, theirs.reads.low)
                assert torch.equal(ours.reads.high, theirs.reads.high)
            for token in (*ids[0, -1:], *torch.arange(8)):
                assert torch.equal(step(token[None]), other(token[None]))


def test_a_step_needs_a_cache_that_fits(tiny):
    model, sliding = tiny("llama"), tiny("mistral")
    ids, _ = left_padded([40], 64)
    with sparsesearch.apply(model, group_plan(model, EVICTING)):
        with pytest.raises(SpecError, match="holds a prompt"):
            DecodeStep(model, sparsesearch.sparse_cache(model, max_tokens=64), first_position=0)
        cache, _ = prefilled(model, ids, 64)
        if DEVICE == "cpu":
            with pytest.raises(SpecError, match="needs a GPU"):
                DecodeStep(model, cache, first_position=40, graph=True)
    with sparsesearch.apply(sliding, group_plan(sliding, EVICTING)):
        cache, _ = prefilled(sliding, ids, 64)
        with pytest.raises(UnsupportedModelError, match="sliding"):
            DecodeStep(sliding, cache, first_position=40)
