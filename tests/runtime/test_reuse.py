"""Layers that run an earlier layer's selection: equal to the oracle in every way a prompt can come, and never in silence on a wrong one."""

import copy
import io

import pytest
import torch
from runtime_plans import BLOCK_TOKENS, greedy_oracle, left_padded, oracle_logits, reuse_plan, rule
from torch import nn

import sparsesearch
from sparsesearch.block_mask import BlockGrid
from sparsesearch.errors import ArtifactError, SparseSearchError, SpecError
from sparsesearch.evaluate.density import TileCount, achieved_density, counting
from sparsesearch.plan import Plan
from sparsesearch.rules import parse_rule
from sparsesearch.rules.dense_source import DenseSource, block_mass
from sparsesearch.rules.reuse import Reuse
from sparsesearch.runtime.binding import binding_of
from sparsesearch.runtime.cache_keyword import CACHE_KEYWORD
from sparsesearch.runtime.oracle import oracle_logits as product_oracle

ROWS = (157, 65, 3)
SAME = Reuse(layer=0)
CROSSED = Reuse(layer=0, heads=(2, 2, 0, 1))
PLANS = {
    "same heads": (["pooled", "slash"], [SAME]),
    "crossed heads": (["pooled", "slash"], [CROSSED]),
    "from a dense layer": (["dense_source"], [SAME]),
    "beside other rules": (["pooled", "dense_source"], [SAME, "stream", CROSSED, "dense"]),
}


@pytest.fixture(params=PLANS)
def planned(request, tiny):
    model = tiny("llama", num_hidden_layers=5)
    return model, reuse_plan(model, *PLANS[request.param], period=3)


def close(ours: torch.Tensor, exact: torch.Tensor) -> None:
    """Within float32's error of five layers."""
    assert (ours - exact).abs().max() <= 2**11 * torch.finfo(torch.float32).eps * exact.abs().max()


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("cache", [True, False])
def test_prefill_equals_the_oracle(planned, backend, cache):
    model, plan = planned
    ids, _ = left_padded([157], 64)
    with torch.no_grad():
        dense = model(ids).logits[0]
        with sparsesearch.apply(model, plan, backend=backend):
            ours = model(ids, use_cache=cache).logits[0]
            product = product_oracle(model, ids[0], 157)
    exact = oracle_logits(model, plan, ids[0])
    close(ours, exact)
    close(product, exact)
    assert (dense - exact).abs().max() > 0.01 * exact.abs().max()


@pytest.mark.parametrize("architecture", ["qwen3", "mistral", "gpt2", "gpt_neox"])
def test_other_architectures(tiny, architecture):
    model = tiny(architecture)
    plan = reuse_plan(model, ["pooled", "slash"], [CROSSED])
    ids, _ = left_padded([130], 64)
    with sparsesearch.apply(model, plan), torch.no_grad():
        ours = model(ids, use_cache=False).logits[0]
    close(ours, oracle_logits(model, plan, ids[0]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(planned, side):
    model, plan = planned
    ids, mask = left_padded(ROWS, 64)
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    with sparsesearch.apply(model, plan), torch.no_grad():
        padded = model(ids, attention_mask=mask).logits
    for row, real in enumerate(mask.bool()):
        close(padded[row, real], oracle_logits(model, plan, ids[row, real]))


def test_decoding_after_padding_equals_the_oracle(planned):
    model, plan = planned
    ids, mask = left_padded((90, 33), 64)
    with sparsesearch.apply(model, plan), torch.no_grad():
        found = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)[:, 90:]
    for row, real in enumerate(mask.bool()):
        assert torch.equal(found[row], greedy_oracle(model, plan, ids[row, real], 5))


def test_chunks_choose_for_themselves(planned):
    """A later chunk's sources see all keys and only its queries, and its reuses follow them."""
    model, plan = planned
    ids, _ = left_padded([150], 64)
    cache = sparsesearch.sparse_cache(model, prompt_tokens=150)
    with sparsesearch.apply(model, plan), torch.no_grad():
        first = model(ids[:, :100], **{CACHE_KEYWORD: cache}).logits[0]
        model(ids[:, 100:], **{CACHE_KEYWORD: cache})
        layers = [module for module in model.modules() if binding_of(module) is not None]
    close(first, oracle_logits(model, plan, ids[0, :100]))
    assert all(not binding_of(layer).leaves._left for layer in layers if binding_of(layer) and binding_of(layer).leaves)


def test_a_second_chunk_reads_the_second_chunk(tiny):
    """What layer 1 computes in the second chunk follows what layer 0 chose there."""
    model = tiny("llama")
    plan = reuse_plan(model, ["pooled"], [SAME])
    ids, _ = left_padded([144], 64)
    chosen, reused = [], []
    with sparsesearch.apply(model, plan), torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        pooled, reuse = type(rule("pooled")), Reuse
        first, second = pooled.select, reuse.select

        def watch_pooled(self, *args):
            chosen.append(first(self, *args))
            return chosen[-1]

        def watch_reuse(self, *args, **left):
            reused.append(second(self, *args, **left))
            return reused[-1]

        patch.setattr(pooled, "select", watch_pooled)
        patch.setattr(reuse, "select", watch_reuse)
        cache = model(ids[:, :80])[CACHE_KEYWORD]
        model(ids[:, 80:], **{CACHE_KEYWORD: cache})
    assert [tiles.shape[-2:] for tiles in reused] == [(5, 5), (4, 9)]
    asked = [tiles for tiles in chosen if tiles.dim() == 4]  # binding asks once more whether laws matter
    assert all(torch.equal(a, b) for a, b in zip(asked, reused, strict=True))


def test_a_source_that_did_not_run_is_an_error(tiny):
    model = tiny("llama")
    ids, _ = left_padded([64], 64)
    with sparsesearch.apply(model, reuse_plan(model, ["pooled"], [SAME])), torch.no_grad():
        model(ids)
        skipped, model.model.layers[0] = model.model.layers[0], Nothing()
        with pytest.raises(SparseSearchError, match=r"layers\.0\.self_attn, which must run before it.*left nothing"):
            model(ids, use_cache=False)
        model.model.layers[0] = skipped
        model(ids)


class Nothing(nn.Module):
    """A layer left out."""

    attention_type = "full_attention"

    def forward(self, hidden_states, **kwargs):
        return hidden_states


def test_a_copied_and_a_pickled_model_keep_their_own_selections(tiny):
    model = tiny("llama")
    plan = reuse_plan(model, ["pooled"], [CROSSED])
    ids, _ = left_padded([100], 64)
    with sparsesearch.apply(model, plan), torch.no_grad():
        copied = copy.deepcopy(model)
        buffer = io.BytesIO()
        torch.save([binding_of(module) for module in model.modules()], buffer)
        ours = model(ids).logits
        theirs = copied(ids).logits
    own, other = (
        next(binding.leaves for module in one.modules() if (binding := binding_of(module)) and binding.leaves)
        for one in (model_with(plan, model), copied)
    )
    assert own is not other
    assert torch.equal(ours, theirs)
    assert buffer.tell() > 0


def model_with(plan, model):
    sparsesearch.apply(model, plan)
    return model


def test_gradients_flow_and_checkpointing_runs_layers_again(tiny):
    model = tiny("llama")
    plan = reuse_plan(model, ["pooled"], [SAME])
    ids, _ = left_padded([100], 64)
    gradients = []
    with sparsesearch.apply(model, plan):
        for checkpointed in (False, True):
            model.zero_grad()
            if checkpointed:
                enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
                enable({"use_reentrant": False})
                model.train()
            model(ids, use_cache=False).logits.square().mean().backward()
            gradients.append(model.model.layers[1].self_attn.q_proj.weight.grad.clone())
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0


@pytest.mark.filterwarnings(
    "ignore:Dynamo does not know how to trace:UserWarning"
)  # of tensor methods; the graph breaks there
def test_compiled_model_gives_the_same(tiny):
    model = tiny("llama")
    plan = reuse_plan(model, ["pooled"], [CROSSED])
    ids, _ = left_padded([100], 64)
    with sparsesearch.apply(model, plan), torch.no_grad():
        plain = model(ids, use_cache=False).logits
        compiled = torch.compile(model, backend="eager")(ids, use_cache=False).logits
    torch.testing.assert_close(compiled, plain)


def test_leaving_and_taking_compile_into_one_graph(tiny):
    """Selections are objects on the bindings: handing one on breaks no graph and recompiles nothing."""
    model = tiny("llama")
    with sparsesearch.apply(model, reuse_plan(model, ["pooled"], [CROSSED])):
        source, target = (binding for module in model.modules() if (binding := binding_of(module)) is not None)
        grid = BlockGrid(64, 64, BLOCK_TOKENS)

        def handed(tiles: torch.Tensor) -> torch.Tensor:
            source.leaves.leave(0, grid, (0, 1, 2, 3), ~tiles)
            return target.taken(0, grid, (0, 1, 2, 3))

        tiles = torch.rand(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
        compiled = torch.compile(handed, backend="eager", fullgraph=True)
        for one in (tiles, ~tiles):
            source.leaves.clear()
            assert torch.equal(compiled(one), ~one[:, [2, 2, 0, 1]])


def test_dense_source_leaves_the_heaviest_tiles():
    grid = BlockGrid(37, 90, BLOCK_TOKENS)
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 37, 8, generator=generator), torch.randn(2, 90, 8, generator=generator)
    mass = block_mass(q, k, grid)
    rows = torch.zeros(grid.num_q_blocks).index_add(
        0, (torch.arange(53, 90) // BLOCK_TOKENS) - grid.first_q_block, torch.ones(37)
    )
    torch.testing.assert_close(mass.sum(-1), rows.expand(2, -1))
    one = DenseSource(keep={"a": 32}, sink=0)
    kept = one.left_behind(one.select(grid, q, k), grid, q, k)
    for head in range(2):
        for row in range(grid.num_q_blocks):
            diagonal = row + grid.first_q_block
            best = mass[head, row, :diagonal].argmax()
            assert set(kept[head, row].nonzero()[:, 0].tolist()) == {int(best), diagonal}


def test_density_counts_what_ran(tiny):
    model = tiny("llama")
    plan = reuse_plan(model, ["dense_source"], [SAME])
    ids, _ = left_padded([160], 64)
    count = TileCount()
    with counting(plan, count), sparsesearch.apply(model, plan), torch.no_grad():
        model(ids, use_cache=False)
    found = achieved_density(plan, 160, count)
    grid = BlockGrid(160, 160, BLOCK_TOKENS)
    budget = [max(min(row + 1, 2), -(-int(0.3 * 16 * (row + 1)) // 16)) for row in range(10)]  # sink and diagonal
    assert found == pytest.approx((1 + sum(budget) / int(grid.reachable().sum())) / 2)


@pytest.mark.parametrize(
    ("sources", "reuse", "message"),
    [
        (["stream"], Reuse(layer=0), "leaves no selection"),
        (["pooled"], Reuse(layer=1), "earlier layer"),
        (["pooled"], Reuse(layer=0, heads=(0, 1, 2, 9)), "which has 4"),
        (["pooled"], Reuse(layer=0, heads=(0,)), "must name a source for query head 1"),
    ],
)
def test_impossible_plans_are_refused(tiny, sources, reuse, message):
    model = tiny("llama")
    plan = reuse_plan(model, ["pooled"], [SAME]).to_dict()
    labels = [rule(name) for name in sources]
    plan["rules"] = {one.label: one.model_dump(mode="json") for one in [*labels, reuse]}
    first, second = plan["assignments"]
    plan["assignments"] = {first: [labels[0].label] * 4, second: [reuse.label] * 4}
    with pytest.raises((ArtifactError, SpecError), match=message):
        Plan.from_dict(plan, source="tests")


def test_plans_with_reuse_survive_a_file(tiny, tmp_path):
    plan = reuse_plan(tiny("llama"), ["pooled", "dense_source"], [CROSSED])
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_reuse_alone_says_what_it_needs():
    with pytest.raises(SpecError, match="selection of its source layer"):
        SAME.select(BlockGrid(64, 64, BLOCK_TOKENS))
    with pytest.raises(SpecError, match="same call"):
        SAME.select(BlockGrid(64, 64, BLOCK_TOKENS), left=torch.ones(1, 3, 3, dtype=torch.bool))
    assert parse_rule({"kind": "reuse", "layer": 1, "heads": [1, 0]}, where="tests").source_head(0) == (1, 1)
