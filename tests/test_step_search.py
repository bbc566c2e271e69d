"""Rules that choose what a decoded token reads, from the profile of their losses to a plan that uses them, and what that plan really loses."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from sparsesearch.block_mask import BlockGrid
from sparsesearch.calibration import Calibration, Sample
from sparsesearch.cost import load_cost_model
from sparsesearch.cost.table import TableCostModel
from sparsesearch.decoding import decode_shares
from sparsesearch.errors import SpecError
from sparsesearch.evaluate.head import Head
from sparsesearch.evaluate.reference import DenseReference
from sparsesearch.explanation import HeadExplanation, explain
from sparsesearch.loss_growth import decode_growth
from sparsesearch.plan import uniform_plan
from sparsesearch.planning import Question, find_choice, write_plan
from sparsesearch.pricing import Pricer
from sparsesearch.profiling.proxies import chooses_in_steps, length_terms, objective_loss, phase_losses
from sparsesearch.profiling.record import Profile
from sparsesearch.profiling.run import Request, profile_model
from sparsesearch.report.decoding import decoding_table
from sparsesearch.rules import LengthLaw
from sparsesearch.rules.bounds_topk import BoundsTopk
from sparsesearch.rules.sink_window import SinkWindow
from sparsesearch.runtime.fingerprint import describe
from sparsesearch.runtime.live import apply
from sparsesearch.scoring import score_table
from sparsesearch.search.budget import parse_budgets
from sparsesearch.search_space import SearchSpace
from sparsesearch.shapes import Decoding
from sparsesearch.workload import Workload, parse_workloads
from tests.runtime.runtime_plans import oracle_logits

LENGTH = 96
SPACE = """
name: test
source: tests
description: decoding by windows and by bounds
block_tokens: 16
unit: kv_group
candidates:
  - {kind: sink_window, sink: 16, window: [16, 48]}
  - {kind: bounds_topk, keep: [32, 64], sink: 16}
  - {kind: bounds_topk, keep: {b: 0.5}, sink: 16, prefill: true}
  - {kind: skip_softmax, prefill_scale: 10}
  - {kind: vertical_slash, vertical: 16, slash: 32}
"""
SERVED = parse_workloads(["prompt=64k,generate=64,batch=4"])


@pytest.fixture(scope="module")
def model(tiny: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return tiny("llama")


@pytest.fixture(scope="module")
def samples() -> tuple[Sample, ...]:
    generator = torch.Generator().manual_seed(LENGTH)
    answers = torch.zeros(LENGTH, dtype=torch.bool)
    answers[-3:] = True
    return tuple(Sample(torch.randint(0, 64, (LENGTH,), generator=generator), answers, "tests") for _ in range(2))


@pytest.fixture(scope="module")
def profile(model: PreTrainedModel, samples: tuple[Sample, ...], tmp_path_factory: pytest.TempPathFactory) -> Profile:
    sets = {LENGTH: Calibration(samples, "tests")}
    request = Request(describe(model, "tiny"), SearchSpace.parse(SPACE, where="tests"), sets, num_probes=2)
    return profile_model(model, request, tmp_path_factory.mktemp("profile") / "profile")


def columns(profile: Profile) -> dict[str, int]:
    return {label: column for column, label in enumerate(profile.labels)}


def ask(text: str, **more: object) -> Question:
    settings = {"granularity": "kv_group", "cost_model": load_cost_model("roofline:h100"), "workloads": SERVED, **more}
    return Question(parse_budgets(text), **settings)  # type: ignore[arg-type]


def test_a_rule_that_leaves_the_prompt_dense_loses_in_decoding_alone(profile: Profile) -> None:
    at = columns(profile)
    prefill, decode = phase_losses(profile, "combined", "kv_group", answer_weight=1.0)
    few, many = at["bounds_topk(keep=32,sink=16,prefill=False)"], at["bounds_topk(keep=64,sink=16,prefill=False)"]
    assert np.abs(prefill[:, [few, many]]).max() < 1e-9
    assert decode[:, few].sum() > decode[:, many].sum() > 0
    alone = objective_loss(profile, "combined", "kv_group", answer_weight=1.0)
    served = objective_loss(profile, "combined", "kv_group", answer_weight=1.0, generates=True)
    assert np.abs(alone[:, [few, many]]).max() < 1e-9
    assert served[:, few].sum() > served[:, many].sum() > 0
    others = ~chooses_in_steps(profile)
    assert (served[:, others] == alone[:, others]).all()
    assert set(np.flatnonzero(~others)) == {column for label, column in at.items() if label.startswith("bounds")}


def test_the_parts_of_a_served_sequence_add_up(profile: Profile) -> None:
    terms = length_terms(profile, LENGTH, "kv_group").proxies
    assert terms["served_answer"] == pytest.approx(terms["prompt_answer"] + terms["decode_answer"])
    alike = ~chooses_in_steps(profile)
    assert terms["served_answer"][:, alike] == pytest.approx(terms["answer"][:, alike], rel=1e-4, abs=1e-9)
    assert (terms["served_text"] >= 0).all()


def test_an_older_profile_says_nothing_of_them(profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {
        name: x
        for name, x in profile.scores(LENGTH).items()
        if not any(
            name.endswith(field) for field in ("prompt_fisher", "prompt_answer", "prompt_answer_group", "late_error")
        )
    }
    monkeypatch.setattr(Profile, "scores", lambda self, length: scores)
    older = replace(profile)
    stepping = chooses_in_steps(older)
    _, decode = phase_losses(older, "combined", "kv_group", answer_weight=1.0)
    served = objective_loss(older, "combined", "kv_group", answer_weight=1.0, generates=True)
    for loss in (decode, served):
        assert np.isinf(loss[:, stepping]).all()
        assert np.isfinite(loss[:, ~stepping]).all()


@pytest.mark.parametrize("decode", ["same", "separate"])
def test_a_search_takes_them_where_time_per_token_is_short(profile: Profile, decode: str) -> None:
    """At 64k tokens a roofline's step is its bytes; the cache that they keep is whole."""
    asked = ask("tpot=0.2x", decode=decode)
    table, solution = find_choice(profile, asked)
    plan = write_plan(profile, asked, table, solution.choice, solution)
    rules = {plan.decode_rule(module, head) for module, heads in plan.assignments.items() for head in range(len(heads))}
    assert any(isinstance(rule, BoundsTopk) for rule in rules)
    assert max(plan.budgets[0].predicted.values()) <= 0.2
    assert "choices" not in plan.provenance
    vertical = columns(profile)["vertical_slash(vertical=16,slash=32,probe=64)"]
    rows = [row for row, unit in enumerate(table.units) if isinstance(unit, Decoding)]
    assert not table.valid[rows, vertical].any()
    if rows:  # a rule that leaves the prompt dense is no other choice there
        prefill = [row for row in range(len(table.units)) if row not in rows]
        assert table.valid[prefill].sum(0).tolist() == [4, 4, 4, 0, 0, 4, 4, 4]
    quest = columns(profile)["bounds_topk(keep=32,sink=16,prefill=False)"]
    pricer = Pricer(profile, "kv_group", asked.cost_model)
    kept = pricer.kept_elements(LENGTH)
    assert (kept[:, quest] == kept[:, 0]).all()
    held = pricer.kv_bytes(SERVED[0])
    assert held[:, quest] == pytest.approx(held[:, 0] * (1 + 1 / 16), rel=1e-3)


def test_losses_grow_with_what_a_longer_prompt_makes_them_leave_out(profile: Profile) -> None:
    """Although the cache stays whole: 32 of 96 keys are read where the profile was made, 32 of 64k where the plan is to serve."""
    quest = columns(profile)["bounds_topk(keep=32,sink=16,prefill=False)"]
    growth = decode_growth(Pricer(profile, "kv_group"), SERVED)
    expected = (1 - 32 / (64 * 1024 + 64)) / (1 - 32 / 96)
    assert growth[:, quest] == pytest.approx(expected, rel=1e-4)
    table = score_table(profile, ask("tpot=0.9x", decode="separate"))
    _, decode = phase_losses(profile, "combined", "kv_group", answer_weight=1.0)
    assert table.loss[len(decode) :, quest] == pytest.approx(decode[:, quest] * growth[:, quest])


def test_a_cost_model_without_their_price_is_named_in_the_plan(profile: Profile) -> None:
    shipped = load_cost_model("cpu")
    assert isinstance(shipped, TableCostModel)
    silent = TableCostModel(shipped.table.model_copy(update={"step_choices": {}}))
    asked = ask("density=1", cost_model=silent, workloads=(Workload(256, 8),))
    table, solution = find_choice(profile, asked)
    plan = write_plan(profile, asked, table, solution.choice, solution)
    assert plan.provenance["choices"].startswith("bounds_topk while decoding: no price")


@pytest.mark.parametrize("keep", [16, 48])
def test_judging_decodes_as_the_oracle_does(model: PreTrainedModel, samples: tuple[Sample, ...], keep: int) -> None:
    rule = BoundsTopk(keep=LengthLaw(a=keep), sink=16)
    plan = uniform_plan(describe(model, "tests"), rule, block_tokens=16, lengths_tokens=(LENGTH,))
    ids = torch.stack([sample.input_ids for sample in samples])
    with apply(model, plan):
        head = Head(model)
        found = head.logits(head.hidden(ids, decode_tokens=12).flatten(0, 1)).view(2, LENGTH, -1)
        whole = head.logits(head.hidden(ids).flatten(0, 1)).view(2, LENGTH, -1)
    for row, own in enumerate(ids):
        expected = oracle_logits(model, plan, own, prompt_tokens=LENGTH - 12)
        torch.testing.assert_close(found[row], expected, rtol=1e-3, atol=1e-4)
    assert (found[:, -12:] - whole[:, -12:]).abs().max() > 1e-3


def test_what_is_judged_is_what_was_decoded(model: PreTrainedModel, samples: tuple[Sample, ...]) -> None:
    rule = BoundsTopk(keep=LengthLaw(a=16), sink=16)
    plan = uniform_plan(describe(model, "tests"), rule, block_tokens=16, lengths_tokens=(LENGTH,))
    at_once, decoded = (DenseReference(model, samples, decode_tokens=count).compare(plan) for count in (0, 12))
    assert at_once.kl_text.max() < 1e-6
    assert decoded.kl_text.min() > 1e-6
    dense = DenseReference(model, samples, decode_tokens=12).compare(None)
    assert dense.kl_text.max() < 1e-6
    with pytest.raises(SpecError, match="decode_tokens must leave a prompt"):
        DenseReference(model, samples, decode_tokens=LENGTH - 1)


def test_the_step_of_the_price_is_the_step_of_the_rule(profile: Profile) -> None:
    """Halfway through the generated tokens, as every price of decoding is."""
    pricer = Pricer(profile, "kv_group", load_cost_model("roofline:h100"))
    quest = columns(profile)["bounds_topk(keep=32,sink=16,prefill=False)"]
    rule, workload = profile.manifest.candidates[quest], SERVED[0]
    grid = BlockGrid(1, 64 * 1024 + 32, 16, law_len=64 * 1024)
    read = (
        2 * rule.step_tokens(grid) + 2 * grid.num_k_blocks / 2
    )  # keys of two query heads; a block's bounds are two rows
    seconds = pricer.tpot_s(workload)[0, quest]
    assert seconds == pytest.approx(read * 2 * 8 * 4 * 2 / 3.35e12, rel=1e-6)


def test_a_plan_says_what_its_heads_keep_and_read(profile: Profile) -> None:
    asked = ask("tpot=0.2x", decode="separate")
    table, solution = find_choice(profile, asked)
    plan = write_plan(profile, asked, table, solution.choice, solution)
    shares = decode_shares(plan, 64 * 1024)
    assert sum(share.heads for share in shares) == 8
    for share in shares:
        if share.rule.startswith("bounds_topk"):
            assert (share.kept, share.read) == (
                1.0,
                plan.rules[share.rule].step_tokens(BlockGrid(1, 64 * 1024, 16)) / 65536,
            )
    assert all(share.rule in decoding_table(plan, 96) for share in shares)
    unlike = uniform_plan(
        plan.base_model, SinkWindow(sink=16, window=LengthLaw(a=16)), block_tokens=16, lengths_tokens=(96,)
    )
    assert decode_shares(unlike, 96) == ()
    assert decoding_table(unlike, 96) == ""
    found = explain(plan, "0:0", scores=score_table(profile, replace(asked, budgets=parse_budgets("kv_fraction=1"))))
    assert isinstance(found, HeadExplanation)
    assert len(found.alternatives) == len(profile.labels) - 2, "those that leave the prompt dense"
    own = {one.rule: one for one in found.decode_alternatives}
    assert set(own) == set(profile.labels) - {
        "vertical_slash(vertical=16,slash=32,probe=64)",
        "skip_softmax(prefill_scale=10,decode_scale=None)",
    }
    assert own["bounds_topk(keep=32,sink=16,prefill=False)"].cost["kv_fraction"] == 1.0
    assert [one.rule for one in found.decode_alternatives if one.chosen] == [plan.decode_rule(found.module, 0).label]
