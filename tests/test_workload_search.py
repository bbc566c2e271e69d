"""Searching for a stated workload: prices at lengths nobody profiled, both phases, and decode rules of their own."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from sparsesearch.block_mask import BlockGrid
from sparsesearch.calibration import Calibration, Sample
from sparsesearch.cost import load_cost_model
from sparsesearch.cost.base import DecodeWork
from sparsesearch.cost.layer_costs import LayerCosts
from sparsesearch.cost.layer_parts import prefill_rest_s
from sparsesearch.cost.table import TableCostModel
from sparsesearch.errors import BudgetInfeasibleError, PlanMismatchError, SpecError
from sparsesearch.loss_growth import decode_growth, prefill_growth
from sparsesearch.model_shapes import MODEL_SHAPES, ModelShape
from sparsesearch.plan import BaseModelInfo, Plan
from sparsesearch.planning import Question, find_choice, surface_rows, write_plan
from sparsesearch.pricing import Pricer, dynamic_density, shape_of
from sparsesearch.profiling.proxies import length_terms, phase_losses
from sparsesearch.profiling.record import Profile
from sparsesearch.profiling.run import Request, profile_model
from sparsesearch.runtime.fingerprint import describe
from sparsesearch.scores import WHOLE
from sparsesearch.scoring import score_table
from sparsesearch.search.budget import Budget, parse_budgets
from sparsesearch.search.exhaustive import solve_exhaustive
from sparsesearch.search_space import SearchSpace
from sparsesearch.shapes import Decoding, Unit
from sparsesearch.workload import Workload, parse_workloads

LENGTHS = (70, 96)
SPACE = """
name: test
source: tests
description: every kind
block_tokens: 16
unit: kv_group
candidates:
  - {kind: zero}
  - {kind: sink_window, sink: 16, window: [16, {b: 0.5}]}
  - {kind: vertical_slash, vertical: 16, slash: 32}
  - {kind: fixed_blocks, keep: 0.4}
"""
STATIC = SPACE[: SPACE.index("  - {kind: vertical")]
SERVED = parse_workloads(["prompt=256,generate=64,batch=4,weight=3", "prompt=2k,generate=16", "prompt=512"])


@pytest.fixture(scope="module")
def profile(tiny: Callable[..., PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """Two layers of four query heads on two KV heads."""
    model = tiny("llama")
    sets = {}
    for length in LENGTHS:
        generator = torch.Generator().manual_seed(length)
        answers = torch.zeros(length, dtype=torch.bool)
        answers[-3:] = True
        drawn = (torch.randint(0, 64, (length,), generator=generator) for _ in range(2))
        sets[length] = Calibration(tuple(Sample(ids, answers, "tests") for ids in drawn), "tests")
    request = Request(describe(model, "tiny"), SearchSpace.parse(SPACE, where="tests"), sets, num_probes=2)
    return profile_model(model, request, tmp_path_factory.mktemp("profile") / "profile")


def ask(text: str, **more: object) -> Question:
    settings = {"granularity": "kv_group", "cost_model": load_cost_model("roofline:h100"), "workloads": SERVED, **more}
    return Question(parse_budgets(text), **settings)  # type: ignore[arg-type]


def test_tiles_at_other_lengths_are_the_rules_own(profile: Profile) -> None:
    pricer = Pricer(profile, "kv_group")
    tiles = pricer.tiles(333)
    grid = BlockGrid(333, 333, 16)
    for row, unit in enumerate(pricer.units):
        for column, rule in enumerate(profile.manifest.candidates):
            if not rule.dynamic:
                counted = sum(int(own.select(grid).sum()) for own in profile.rule_for(unit, column))
                assert tiles[row, column] == counted, rule.label
    assert pricer.is_extrapolated(333)
    assert not pricer.is_extrapolated(96)
    dynamic = [rule.dynamic for rule in profile.manifest.candidates].index(True)
    assert (tiles[:, dynamic] > 0).all()
    assert (tiles[:, dynamic] <= tiles[:, 0]).all()


def test_the_density_law_of_dynamic_rules() -> None:
    known, density = (1024, 4096), np.array([[0.4, 0.1], [0.3, 0.3], [0.2, 0.25]])
    between = dynamic_density(known, density, 2048)
    assert between == pytest.approx([0.2, 0.3, (0.2 * 0.25) ** 0.5])
    beyond = dynamic_density(known, density, 16384)
    assert beyond == pytest.approx([0.025, 0.3, 0.25]), "1/N goes on, a constant stays, a rise is not continued"
    assert dynamic_density(known, density, 256) == pytest.approx([1.0, 1.0, 0.8])
    assert dynamic_density((1024,), density[:, :1], 8192) == pytest.approx([0.4, 0.3, 0.2])
    for index, length in enumerate(known):
        assert dynamic_density(known, density, length) == pytest.approx(density[:, index])


def test_every_metric_is_what_the_workload_costs(profile: Profile) -> None:
    model = load_cost_model("roofline:h100")
    table = score_table(profile, ask("memory=0.9,kv_fraction=0.9,latency=0.9", dtype_bytes=2))
    assert table.points_of("ttft") == (256, 2048, 512)
    assert table.points_of("tpot") == (256, 2048)
    assert table.points_of("latency") == (WHOLE,)
    assert table.points_of("kv_fraction") == (256, 512, 2048)
    window = next(i for i, rule in enumerate(profile.manifest.candidates) if rule.kind == "sink_window")
    rule, first = profile.manifest.candidates[window], SERVED[0]
    kept = rule.kept_tokens(BlockGrid(1, 256 + 32, 16, law_len=256))
    step = model.decode_latency_s([DecodeWork(kept, 8, 2, 4, 2)])[0]
    assert table.costs["tpot"][0, window, 0] == pytest.approx(step)
    assert table.costs["tpot"][0, 0, 0] == pytest.approx(model.decode_latency_s([DecodeWork(288, 8, 2, 4, 2)])[0])
    assert table.costs["ttft"][0, 0, 0] == pytest.approx(
        4 * Pricer(profile, "kv_group", model).ttft_s(Workload(256))[0, 0]
    )
    shares = np.array([3, 1, 1]) / 5
    seconds = table.costs["ttft"] @ shares
    seconds += table.costs["tpot"] @ (shares[:2] * np.array([first.generate_tokens, 16]))
    assert table.costs["latency"][:, :, 0] == pytest.approx(seconds)
    assert table.costs["memory"][0, 0].tolist() == [320 * 8 * 4 * 4, 2064 * 8 * 4, 512 * 8 * 4]
    assert table.dense_cost("memory")[0] == 4 * 320 * 8 * 4 * 4


def test_the_rest_of_the_model_counts_in_seconds_and_bytes(profile: Profile) -> None:
    """Weights in memory, and linear layers in time: what no plan can save makes shares of the whole smaller."""
    shape = ModelShape("tiny", "llama", 2, 32, 48, 4, 2, 8, 64, True, 1e4, 512)
    bare, whole = (score_table(profile, ask("memory=1", shape=each, dtype_bytes=2)) for each in (None, shape))
    assert (whole.dense_cost("memory") - bare.dense_cost("memory")).tolist() == [2.0 * shape.num_parameters] * 3
    costs = load_cost_model("roofline:h100")
    assert isinstance(costs, LayerCosts)
    for index, served in enumerate(SERVED):
        rest = prefill_rest_s(shape, costs, rows=served.batch * served.prompt_tokens, batch=served.batch)
        assert whole.dense_cost("ttft")[index] - bare.dense_cost("ttft")[index] == pytest.approx(rest)
    asked = ask("latency=0.9x", shape=shape)
    table, solution = find_choice(profile, asked)
    plan = write_plan(profile, asked, table, solution.choice, solution)
    assert plan.provenance["seconds"].startswith("whole model")
    assert plan.budgets[0].predicted["workload"] <= 0.9


def test_a_processors_prompts_are_priced_whole_and_its_steps_by_attention(profile: Profile) -> None:
    costs = load_cost_model("cpu")
    assert isinstance(costs, TableCostModel)
    shape = ModelShape("tiny", "llama", 2, 32, 48, 4, 2, 8, 64, True, 1e4, 512)
    bare, whole = (score_table(profile, ask("ttft=1", cost_model=costs, shape=each)) for each in (None, shape))
    for index, served in enumerate(SERVED):
        rest_s = prefill_rest_s(shape, costs, rows=served.batch * served.prompt_tokens, batch=served.batch)
        assert whole.dense_cost("ttft")[index] - bare.dense_cost("ttft")[index] == pytest.approx(rest_s)
        assert rest_s > 0
    assert (whole.dense_cost("tpot") == bare.dense_cost("tpot")).all()
    asked = ask("ttft=0.99", cost_model=costs, shape=shape)
    table, solution = find_choice(profile, asked)
    said = write_plan(profile, asked, table, solution.choice, solution).provenance["seconds"]
    assert said.startswith("whole prompts, and of decoded tokens attention")


def test_the_shape_of_a_profiled_model_is_found_or_named() -> None:
    embedded = BaseModelInfo(
        name_or_path="org/name", model_type="llama", modules=("a", "b"), num_heads=(4, 4), num_kv_heads=(2, 2), head_dim=(8, 8)
    )  # fmt: skip
    assert shape_of(embedded) is None
    with pytest.raises(PlanMismatchError, match="must have the heads of org/name"):
        shape_of(embedded, "llama3-8b")
    geometry = MODEL_SHAPES["qwen3-4b"].geometry
    large = BaseModelInfo(name_or_path="x", model_type="qwen3", **vars(geometry))
    assert shape_of(large, "qwen3-4b") == MODEL_SHAPES["qwen3-4b"]


@pytest.mark.parametrize("decode", ["same", "separate"])
def test_a_plan_keeps_budgets_of_every_kind_and_is_never_slower(profile: Profile, decode: str) -> None:
    asked = ask("density=0.6,ttft=0.8x@2048,memory=0.7,tpot=0.9x,latency=0.7x", decode=decode)
    table, solution = find_choice(profile, asked)
    plan = write_plan(profile, asked, table, solution.choice, solution)
    assert [budget.metric for budget in plan.budgets] == ["density", "ttft", "memory", "tpot", "latency"]
    for record in plan.budgets:
        assert record.predicted
        assert max(record.predicted.values()) <= record.bound + 1e-12
    assert set(plan.budgets[1].predicted) == {"2048"}
    assert set(plan.budgets[4].predicted) == {"workload"}
    for metric in ("ttft", "tpot"):
        assert max(solution.used[metric].values()) <= 1 + 1e-12
    assert plan.provenance["workloads"][0] == "prompt=256,generate=64,batch=4,weight=3"
    assert "256, 512, 2048 tokens follow their profiled density" in plan.provenance["extrapolated"]
    assert Plan.from_dict(plan.to_dict(), source="test") == plan


def test_a_rule_slower_than_dense_is_never_chosen(profile: Profile) -> None:
    """Sixteen-token tiles on a device where a tile costs a fortune: only dense and zero can pass."""
    model = load_cost_model("cpu")
    asked = ask("density=0.9", cost_model=model, workloads=(), granularity="query_head")
    table = score_table(profile, asked)
    assert Budget("ttft", 1.0) in asked.constraints
    _, solution = find_choice(profile, asked)
    assert max(solution.used["ttft"].values()) <= 1 + 1e-12
    slower = table.costs["ttft"][:, :, 0] > table.costs["ttft"][:, [0], 0]
    assert slower.any(), "the test must have something to refuse"


def test_absolute_budgets_are_absolute(profile: Profile) -> None:
    dense = score_table(profile, ask("memory=1")).dense_cost("memory")
    small, large = (Budget("memory", share * float(dense.min()), absolute=True) for share in (0.1, 0.8))
    windows = SearchSpace.parse(STATIC.replace("  - {kind: zero}\n", ""), where="windows")
    with pytest.raises(BudgetInfeasibleError, match=r"smallest feasible value is memory=32\.77KB\. Raise the budget"):
        find_choice(profile, replace(ask("memory=1", space=windows), budgets=(small,)))
    table, solution = find_choice(profile, replace(ask("memory=1"), budgets=(large,)))
    assert max(table.used("memory", solution.choice, absolute=True).values()) <= large.bound * (1 + 1e-12)


def test_phases_have_their_own_units_losses_and_plan(profile: Profile) -> None:
    asked = ask("density=0.5,kv_fraction=0.6", decode="separate", granularity="query_head")
    table, solution = find_choice(profile, asked)
    assert [type(unit) for unit in table.units] == [Unit] * 8 + [Decoding] * 4
    prefill, decode = phase_losses(profile, "combined", "query_head", answer_weight=1.0)
    prefill = prefill * prefill_growth(Pricer(profile, "query_head"), [256, 512, 2048])
    decode = decode * decode_growth(Pricer(profile, "kv_group"), SERVED[:2])
    assert table.loss[:8] == pytest.approx(prefill)
    dynamic = [rule.dynamic or rule.needs_calibration for rule in profile.manifest.candidates]
    assert not table.valid[8:, dynamic].any()
    assert table.loss[8:][:, ~np.array(dynamic)] == pytest.approx(decode[:, ~np.array(dynamic)])
    assert (table.costs["density"][8:] == 0).all()
    assert (table.costs["kv_fraction"][:8] == 0).all()
    plan = write_plan(profile, asked, table, solution.choice, solution)
    assert set(plan.decode) == set(plan.base_model.modules)
    for row, address in enumerate(table.units):
        label = table.candidates[solution.choice[row]]
        unit = address.unit if isinstance(address, Decoding) else address
        for head in unit.heads:
            rule = (
                plan.decode_rule(unit.module, head) if isinstance(address, Decoding) else plan.rule(unit.module, head)
            )
            assert rule.label.startswith(label.removesuffix(")"))
    kept = [plan.decode_rule(m, h).kept_tokens(BlockGrid(512, 512, 16)) for m in plan.decode for h in (0, 2)]
    assert sum(kept) / (4 * 512) == pytest.approx(plan.budgets[1].predicted["512"])
    assert "decode" in plan.to_dict()


def test_a_plan_without_decode_rules_does_not_mention_them(profile: Profile) -> None:
    asked = ask("density=0.5", workloads=(), cost_model=None)
    table, solution = find_choice(profile, asked)
    plan = write_plan(profile, asked, table, solution.choice, solution)
    assert "decode" not in plan.to_dict()
    assert "absolute" not in plan.to_dict()["budgets"][0]
    assert plan.decode_rule("model.layers.0.self_attn", 1) == plan.rule("model.layers.0.self_attn", 1)
    assert not {"workloads", "decode", "seconds", "extrapolated"} & set(plan.provenance)


def test_pairs_equal_exhaustive_search(profile: Profile) -> None:
    space = SearchSpace.parse(STATIC, where="static")
    for budgets in ("density=0.5,kv_fraction=0.5", "latency=0.6x", "ttft=0.5x,tpot=0.7x,memory=0.6"):
        asked = ask(budgets, decode="separate", space=space)
        table, solution = find_choice(profile, asked)
        expected = solve_exhaustive(table, asked.constraints)
        assert solution.loss == pytest.approx(expected.loss, rel=2e-4)
        assert expected.loss >= solution.lower_bound - 1e-9


def test_the_answer_splits_exactly_between_the_phases(profile: Profile) -> None:
    prefill, decode = phase_losses(profile, "answer", "kv_group", answer_weight=1.0)
    total = np.zeros_like(prefill)
    for length in LENGTHS:
        terms = length_terms(profile, length, "kv_group").proxies
        total += terms["answer"] / terms["answer"][:, 2].sum()
    scale = (prefill + decode)[:, 1:] / total[:, 1:]
    assert scale == pytest.approx(np.broadcast_to(scale[:1, :1], scale.shape), rel=0.2)
    assert (decode >= 0).all()
    assert decode[:, 1:].sum() > 0


@pytest.mark.parametrize("decode", ["same", "separate"])
def test_a_layer_has_no_more_rules_than_it_may(profile: Profile, decode: str) -> None:
    asked = ask("density=0.5,memory=0.8", decode=decode, granularity="kv_group")
    free = find_choice(profile, asked)[1]
    limited = replace(asked, max_groups_per_layer=1)
    table, solution = find_choice(profile, limited)
    plan = write_plan(profile, limited, table, solution.choice, solution)
    assert plan.provenance["max_groups_per_layer"] == 1
    for module in plan.base_model.modules:
        for names in (plan.assignments[module], plan.decode.get(module, ())):
            kinds = {name.split(",bitmap")[0] for name in names} - {"zero"}
            assert len(kinds) <= 1, names
    assert solution.loss >= free.lower_bound


def test_the_front_has_three_axes(profile: Profile) -> None:
    asked = ask("latency=0.9x")
    rows = surface_rows(profile, asked, num_points=6, num_levels=3)
    assert len({row["memory_bound"] for row in rows}) >= 2
    for row in rows:
        assert row["latency@workload"] <= row["bound"] + 1e-9
        assert max(row[f"memory@{length}"] for length in (256, 512, 2048)) <= row["memory_bound"] + 1e-9
        assert row["lower_bound"] <= row["loss"]
        assert row["latency_s@workload"] >= 0
    points = [(row["loss"], row["latency@workload"], max(row[f"memory@{n}"] for n in (256, 512, 2048))) for row in rows]
    for point in points:
        assert not any(other != point and all(a <= b for a, b in zip(other, point, strict=True)) for other in points)
    assert min(row["loss"] for row in rows) == 0
    assert (
        max(row["memory_bytes@512"] for row in rows) == 512 * 8 * 2 * 4 * 4
    )  # dense: keys and values of four KV heads in float32
    one_axis = surface_rows(profile, replace(asked, granularity="query_head", workloads=()), num_points=4)
    assert len(one_axis) == 4
    assert "memory_bound" not in one_axis[0]


@pytest.mark.parametrize(
    ("text", "more", "sentence"),
    [
        ("tpot=0.5x", {"workloads": (Workload(512),)}, "workload that generates"),
        ("memory=0.5", {"granularity": "query_head"}, "--decode separate"),
        ("ttft=0.5x", {"granularity": "query_head"}, "decoding must be decided per KV group"),
        ("latency=0.5x", {"cost_model": None}, "latency budget must have a cost model"),
        ("ttft=0.5x@333", {}, r"length 333 must be one of the priced lengths \[256, 2048, 512\]"),
        ("density=0.5", {"decode": "separate", "objective": "output_error"}, "combined, text or answer"),
    ],
)
def test_questions_that_cannot_be_asked(profile: Profile, text: str, more: dict[str, object], sentence: str) -> None:
    with pytest.raises(SpecError, match=sentence):
        find_choice(profile, ask(text, **more))
