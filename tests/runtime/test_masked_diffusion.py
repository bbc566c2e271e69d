"""Masked diffusion language models: SparseD's plan on a model that was trained, step by step against the oracle; profile and search."""

from pathlib import Path
from typing import Any

import pytest
import torch
from masked_lm import PROMPT, STEPS, Copying, make_model, trained

from sparsesearch.block_mask import BlockGrid, expand
from sparsesearch.denoising.planning import find_step_plan
from sparsesearch.denoising.published import adaspa_plan, sparsed_plan
from sparsesearch.denoising.replay import Replay
from sparsesearch.errors import PlanMismatchError, SpecError, UnsupportedModelError
from sparsesearch.kernels.reference import masked_attention
from sparsesearch.layout import Layout
from sparsesearch.plan import Plan, uniform_plan
from sparsesearch.profiling.denoising.request import StepsRequest
from sparsesearch.profiling.denoising.run import profile_transformer
from sparsesearch.rules import Rule
from sparsesearch.rules.block_mass import BlockMass
from sparsesearch.rules.dense import Dense
from sparsesearch.runtime.denoisers import apply_masked
from sparsesearch.runtime.diffusion.attention import LayerCall
from sparsesearch.runtime.masked_diffusion import MaskedDenoiser, describe_masked
from sparsesearch.search_space import SearchSpace

BLOCK = 16


@pytest.fixture(scope="module")
def denoiser() -> MaskedDenoiser:
    return MaskedDenoiser(trained(), PROMPT)


def published(denoiser: MaskedDenoiser, **changes: Any) -> Plan:
    layout = denoiser.layout(2 * PROMPT)
    return sparsed_plan(
        describe_masked(denoiser, "copying"),
        num_steps=STEPS,
        layout=layout,
        block_tokens=BLOCK,
        **{"keep": 0.5, **changes},
    )


def test_the_trained_model_copies(denoiser: MaskedDenoiser) -> None:
    run = Copying(denoiser)
    assert float((run.sample()[0] == run.prompts).float().mean()) > 0.99


def test_all_dense_is_bit_identical_and_restored(denoiser: MaskedDenoiser) -> None:
    run, before = Copying(denoiser), denoiser.model.config._attn_implementation
    dense = run()
    plan = uniform_plan(describe_masked(denoiser, "copying"), Dense(), block_tokens=BLOCK, lengths_tokens=(96,))
    with apply_masked(denoiser, plan) as applied:
        assert torch.equal(run(), dense)
    applied.remove()
    assert denoiser.model.config._attn_implementation == before
    assert torch.equal(run(), dense)


def test_masks_are_chosen_once_and_reused(denoiser: MaskedDenoiser) -> None:
    """Steps 0 and 1 dense; step 2 chooses by exact mass, prompt and generation apart; later steps attend over step 2's tiles. Fp64 oracle."""
    plan, grid = published(denoiser), BlockGrid(96, 96, BLOCK, causal=False, layout=denoiser.layout(96))
    chosen: dict[str, torch.Tensor] = {}
    checked = []
    with apply_masked(denoiser, plan) as applied:

        def probe(seen: LayerCall) -> torch.Tensor:
            assert seen.call.step is not None
            step = seen.call.step[0]
            dense = torch.nn.functional.scaled_dot_product_attention(seen.q, seen.k, seen.v, scale=seen.scale)
            if step < 2:
                assert seen.rules == (Dense(),) * 4
                return dense
            found = applied.layers[seen.path].attend(seen.q, seen.k, seen.v, seen.rules, seen.call, seen.scale)
            if step == 2:
                chosen[seen.path] = plain_choice(seen, grid, keep=0.5)
            mask = expand(chosen[seen.path], grid)
            expected = masked_attention(seen.q, seen.k, seen.v, mask, scale=seen.scale)[0]
            assert torch.allclose(found, expected, atol=2e-5)
            checked.append((step, seen.path))
            return found

        applied.probe(probe)
        Copying(denoiser)()
    assert len(checked) == 2 * (STEPS - 2)


def plain_choice(seen: LayerCall, grid: BlockGrid, keep: float) -> torch.Tensor:
    """SparseD's masks written out: block sums of the softmax, the best share of each segment's key blocks, and the diagonal."""
    weights = (seen.q.double() @ seen.k.double().mT * seen.scale).softmax(-1)
    mass = weights.unflatten(-1, (-1, BLOCK)).sum(-1).unflatten(-2, (-1, BLOCK)).sum(-2)
    tiles = torch.eye(6, dtype=torch.bool).expand(*mass.shape[:2], 6, 6).clone()
    for segment in (slice(0, 3), slice(3, 6)):  # 48 prompt tokens, 48 generated ones, blocks of 16
        count = -(-3 * keep // 1)
        best = mass[..., segment].topk(int(count), -1).indices + segment.start
        tiles.scatter_(-1, best, torch.ones_like(best, dtype=torch.bool))
    return tiles


def test_the_published_plan_still_copies(denoiser: MaskedDenoiser) -> None:
    run = Copying(denoiser)
    tokens = run.sample()[0]
    with apply_masked(denoiser, published(denoiser)) as applied:
        sparse = run.sample()[0]
    assert {layer.taken for layer in applied.layers.values()} == {"torch"}
    assert float((sparse == tokens).float().mean()) > 0.95
    none = uniform_plan(
        describe_masked(denoiser, "copying"), Rule.registry["zero"](), block_tokens=BLOCK, lengths_tokens=(96,)
    )
    with apply_masked(denoiser, none):
        assert float((run.sample()[0] == tokens).float().mean()) < 0.5, "attention matters to this model"


def test_prompt_and_generation_are_ranked_apart(denoiser: MaskedDenoiser) -> None:
    plan = published(denoiser)
    assert [type(rule) for rule in plan.rules.values()] == [BlockMass]
    assert plan.schedule is not None
    assert [plan.schedule.range_index(step) for step in range(STEPS)] == [None, None, 0, 0, 0, 0, 0, 0]
    assert [plan.schedule.refreshes(step) for step in range(1, STEPS)] == [
        False,
        True,
        False,
        False,
        False,
        False,
        False,
    ]
    assert Plan.from_dict(plan.to_dict(), source="test") == plan
    with pytest.raises(SpecError, match="must leave a sparse step"):
        published(denoiser, skip=0.95)


def test_profile_search_and_replay(denoiser: MaskedDenoiser, tmp_path: Path) -> None:
    space = SearchSpace.parse(
        "name: s\nsource: t\ndescription: t\nunit: query_head\nblock_tokens: 16\ncandidates:\n"
        "  - {kind: block_mass, keep: [0.2, 0.4, 0.7], per_segment: true}\n"
        "  - {kind: pooled_topk, keep: {b: 0.34}, sink: 0}\n  - {kind: mean_value}\n",
        where="test",
    )
    run = Copying(denoiser)
    request = StepsRequest(describe_masked(denoiser, "copying"), space, STEPS, ends=(0.5, 1.0), captured_per_range=1)
    made = profile_transformer(denoiser, run, request, tmp_path / "p")
    assert made.manifest.layout == denoiser.layout(96)
    assert float(made.error[..., 0].abs().max()) < 1e-9
    keeps = [made.error[..., column] for column in (1, 2, 3)]
    assert (keeps[2] <= keeps[1] + 1e-9).all()
    assert (keeps[1] <= keeps[0] + 1e-9).all()
    replay = Replay.of(denoiser, run)
    sparse, denser = (float(replay.error(find_step_plan(made, density)).mean()) for density in (0.45, 0.7))
    assert 0 < denser < sparse


def test_adaspa_gives_heads_three_sparsities(denoiser: MaskedDenoiser) -> None:
    """The heads of most recall are the sparsest; the mean sparsity is kept; masks are chosen at two steps."""
    run, info = Copying(denoiser), describe_masked(denoiser, "copying")
    plan = adaspa_plan(denoiser, run, info, num_steps=STEPS, sparsity=0.5, refresh=(2, 5), block_tokens=BLOCK)
    assert plan.schedule is not None
    assert plan.schedule.refresh == (2, 5)
    for module in info.modules:
        keeps = [rule.keep for rule in plan.at_step(3).module_rules(module) if isinstance(rule, BlockMass)]
        assert set(keeps) <= {0.25, 0.5, 0.75}
        assert sum(keeps) / 4 == pytest.approx(0.5)
    with apply_masked(denoiser, plan):
        assert run().isfinite().all()
    with pytest.raises(SpecError, match="come to step 20"):
        adaspa_plan(denoiser, run, info, num_steps=STEPS, sparsity=0.5, refresh=(20,), block_tokens=BLOCK)


def test_padding_behind_the_generation_changes_nothing() -> None:
    denoiser = MaskedDenoiser(make_model(), 20)
    plan = uniform_plan(
        describe_masked(denoiser, "tiny"),
        BlockMass(keep=0.4, per_segment=True),
        block_tokens=BLOCK,
        lengths_tokens=(63,),
    )
    tokens = torch.randint(20, (2, 63), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[0, 50:] = 0
    with torch.no_grad(), apply_masked(denoiser, plan):
        both = denoiser.logits(tokens, attention_mask=mask)
        alone = denoiser.logits(tokens[:1, :50])
        assert torch.allclose(both[:1, :50], alone, atol=1e-5)
        with pytest.raises(UnsupportedModelError, match="Pad on the right"):
            denoiser.logits(tokens, attention_mask=mask.flip(1))


def test_what_cannot_run_is_refused(denoiser: MaskedDenoiser) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    causal = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(UnsupportedModelError, match="causal"):
        describe_masked(MaskedDenoiser(causal, 4), "llama")
    with pytest.raises(SpecError, match="longer than its prompt"):
        denoiser.logits(torch.zeros(1, PROMPT, dtype=torch.long))
    plan = published(denoiser)
    with apply_masked(denoiser, plan):
        with pytest.raises(SpecError, match="one plan at a time"):
            apply_masked(denoiser, plan)
        with pytest.raises(UnsupportedModelError, match="must know the denoising step"):
            denoiser.logits(torch.zeros(1, 96, dtype=torch.long))
    other = plan.model_copy(update={"base_model": plan.base_model.model_copy(update={"head_dim": (8, 8)})})
    with pytest.raises(PlanMismatchError, match="was made for"):
        apply_masked(denoiser, other)


def test_layout_without_a_prompt() -> None:
    assert MaskedDenoiser(make_model(), 0).layout(5) == Layout.model_validate(
        {"segments": [{"kind": "generation", "shape": [5]}]}
    )
