"""From a profile to a plan on a tiny model: prices against the rules themselves, refinement against replay, proxies against the truth."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from sparsesearch.block_mask import BlockGrid, density
from sparsesearch.calibration import Calibration, Sample
from sparsesearch.cost import load_cost_model
from sparsesearch.cost.base import UnitWork
from sparsesearch.errors import BudgetInfeasibleError, SpecError
from sparsesearch.evaluate.reference import DenseReference
from sparsesearch.planning import Question, find_choice, front_rows, score_table, write_plan
from sparsesearch.profiling.local_model import ANSWER_KL_WEIGHT
from sparsesearch.profiling.record import Profile
from sparsesearch.profiling.run import Request, profile_model
from sparsesearch.proxy_validation import validate_proxies
from sparsesearch.refinement import clearly_less, refine
from sparsesearch.runtime.fingerprint import describe
from sparsesearch.search.budget import Budget, parse_budgets
from sparsesearch.search_space import SearchSpace

LENGTHS = (70, 96)
SPACE = """
name: test
source: tests
description: every kind
block_tokens: 16
unit: query_head
candidates:
  - {kind: zero}
  - {kind: mean_value}
  - {kind: sink_window, sink: 16, window: [16, {b: 0.5}]}
  - {kind: vertical_slash, vertical: 16, slash: 32}
  - {kind: pooled_topk, keep: {b: 0.3}}
  - {kind: fixed_blocks, keep: 0.4}
"""
WINDOWS = SPACE[: SPACE.index("  - {kind: zero}")] + "  - {kind: sink_window, sink: 16, window: 16}\n"


def samples(length: int, count: int, seed: int = 0) -> list[Sample]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    answers = torch.zeros(length, dtype=torch.bool)
    answers[-3:] = True
    return [Sample(torch.randint(0, 64, (length,), generator=generator), answers, "tests") for _ in range(count)]


@pytest.fixture(scope="module")
def model(tiny: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """Two layers of four query heads on two KV heads."""
    return tiny("llama")


@pytest.fixture(scope="module")
def profile(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    sets = {length: Calibration(tuple(samples(length, 2)), "tests") for length in LENGTHS}
    request = Request(describe(model, "tiny"), SearchSpace.parse(SPACE, where="tests"), sets, num_probes=2)
    return profile_model(model, request, tmp_path_factory.mktemp("profile") / "profile")


def question(text: str = "density=0.4", **more: object) -> Question:
    return Question(parse_budgets(text), **more)  # type: ignore[arg-type]


def test_tiles_of_static_rules_are_what_the_rules_select(profile: Profile) -> None:
    table = score_table(profile, question())
    assert table.lengths == LENGTHS
    assert len(table.units) == 8
    static = [(index, rule) for index, rule in enumerate(profile.manifest.candidates) if not rule.dynamic]
    assert len(static) >= 5
    for row, unit in enumerate(table.units):
        for index, _ in static:
            (rule,) = profile.rule_for(unit, index)
            for place, length in enumerate(LENGTHS):
                grid = BlockGrid(length, length, 16)
                assert table.costs["density"][row, index, place] == int(rule.select(grid).sum()), rule.label


def test_a_group_costs_what_its_heads_cost(profile: Profile) -> None:
    heads, groups = (score_table(profile, question(granularity=unit)) for unit in ("query_head", "kv_group"))
    assert len(groups.units) == 4
    assert groups.costs["density"] == pytest.approx(heads.costs["density"].reshape(4, 2, -1, len(LENGTHS)).sum(1))


def test_cached_keys_are_those_the_rules_keep(profile: Profile) -> None:
    table = score_table(profile, question("kv_fraction=0.5", granularity="kv_group"))
    for index, rule in enumerate(profile.manifest.candidates):
        kept = [rule.kept_tokens(BlockGrid(length, length, 16)) * 8 for length in LENGTHS]
        assert (table.costs["kv_fraction"][:, index] == kept).all(), rule.label


def test_seconds_are_the_cost_models(profile: Profile) -> None:
    model = load_cost_model("cpu")
    table = score_table(profile, question("latency=0.9", cost_model=model))
    dense = model.unit_latency_s(
        UnitWork("dense", q_len=96, kv_len=96, head_dim=8, query_heads=1, tiles=21, query_blocks=6, block_tokens=16)
    )
    assert table.costs["latency"][:, 0, 1] == pytest.approx(dense)
    zero = [rule.kind for rule in profile.manifest.candidates].index("zero")
    assert (table.costs["latency"][:, zero] == 0).all()


def test_a_space_is_a_subset_of_the_profile(profile: Profile) -> None:
    subset = SearchSpace.parse(WINDOWS, where="windows")
    table = score_table(profile, question(space=subset))
    assert table.candidates == subset.labels
    columns = profile.indices(subset.candidates)
    assert table.loss == pytest.approx(score_table(profile, question()).loss[:, columns])
    other = SearchSpace.parse(WINDOWS.replace("window: 16", "window: 48"), where="windows")
    with pytest.raises(SpecError, match=r"must have scored sink_window\(sink=16,window=48\)"):
        score_table(profile, question(space=other))


@pytest.mark.parametrize(
    ("text", "more", "sentence"),
    [
        ("kv_fraction=0.5", {}, "--unit kv_group"),
        ("latency=0.5", {}, "must have a cost model"),
        ("density=0.5", {"objective": "los"}, "objective"),
    ],
)
def test_questions_that_cannot_be_asked(profile: Profile, text: str, more: dict[str, str], sentence: str) -> None:
    with pytest.raises(SpecError, match=sentence):
        find_choice(profile, question(text, **more))


@pytest.mark.parametrize("granularity", ["query_head", "kv_group"])
@pytest.mark.parametrize("share", [0.2, 0.4, 0.7])
def test_the_plan_is_the_choice_and_computes_what_it_says(profile: Profile, granularity: str, share: float) -> None:
    """Static rules only, so that the plan's density can be counted from its own tiles."""
    static = "\n".join(line for line in SPACE.splitlines() if "vertical" not in line and "pooled" not in line)
    asked = question(f"density={share}", granularity=granularity, space=SearchSpace.parse(static, where="static"))
    table, solution = find_choice(profile, asked)
    plan = write_plan(profile, asked, table, solution.choice, solution)
    assert plan.unit == granularity
    assert plan.lengths_tokens == LENGTHS
    for length in LENGTHS:
        grid = BlockGrid(length, length, 16)
        counted = np.mean([density(rule.select(grid), grid) for _, _, rule in plan.heads()])
        assert counted == pytest.approx(plan.budgets[0].predicted[str(length)])
        assert counted <= share + 1e-12
    assert plan.certificate is not None
    assert plan.certificate.loss == pytest.approx(table.loss_of(solution.choice))
    assert plan.certificate.gap <= 1e-4
    if granularity == "kv_group":
        for module in plan.base_model.modules:
            kinds = [rule.kind for rule in plan.module_rules(module)]
            assert kinds[::2] == kinds[1::2]


def test_an_infeasible_question_names_the_smallest_budget_that_is_not(profile: Profile) -> None:
    subset = SearchSpace.parse(WINDOWS, where="windows")
    with pytest.raises(BudgetInfeasibleError, match="smallest feasible value is density=") as caught:
        find_choice(profile, question("density=0.01", space=subset))
    smallest = str(caught.value).split("value is ")[1].split(". ")[0]
    find_choice(profile, question(smallest, space=subset))


def test_the_front_loses_less_with_more_budget(profile: Profile) -> None:
    rows = front_rows(profile, question(), num_points=12)
    assert len(rows) == 12
    bounds, losses = [row["bound"] for row in rows], [row["loss"] for row in rows]
    assert bounds == sorted(bounds)
    assert losses == sorted(losses, reverse=True)
    assert rows[-1]["loss"] == pytest.approx(0, abs=1e-9), "dense loses nothing"
    for row in rows:
        assert max(row[f"density@{length}"] for length in LENGTHS) <= row["bound"] + 1e-9
        assert row["lower_bound"] <= row["loss"] + 1e-12


def test_refinement_returns_the_last_plan_it_accepted(model: PreTrainedModel, profile: Profile) -> None:
    replayed = samples(96, 2, seed=1)
    done: list[tuple[int, int]] = []
    asked = question("density=0.3")
    plan, trials = refine(
        model, profile, asked, replayed, evaluations=6, progress=lambda _, count, total: done.append((count, total))
    )
    assert 1 <= len(trials) <= 6
    assert done == [(count, 6) for count in range(1, len(trials) + 1)]
    accepted = [trial for trial in trials if trial.accepted]
    assert accepted[0] is trials[0]
    falls = [trial.objective for trial in accepted]
    assert falls == sorted(falls, reverse=True)
    found = DenseReference(model, replayed).score(plan)
    objective = found["kl_text"] + ANSWER_KL_WEIGHT * found["kl_answer"]
    assert objective == pytest.approx(accepted[-1].objective, rel=1e-6)
    for length in map(str, LENGTHS):
        assert plan.budgets[0].predicted[length] <= 0.3 + 1e-12
    assert [trial["origin"] for trial in plan.provenance["refinement"]] == [trial.origin for trial in trials]


def test_a_refinement_weighs_answers_as_asked(model: PreTrainedModel, profile: Profile) -> None:
    replayed = samples(96, 2, seed=1)
    asked = replace(question("density=0.3"), answer_weight=20.0)
    plan, trials = refine(model, profile, asked, replayed, evaluations=5)
    weighed = [trial.origin for trial in trials if "answer weight" in trial.origin]
    assert set(weighed) <= {"search, answer weight 20", "search, answer weight 60", "search, answer weight 6"}
    found = DenseReference(model, replayed).score(plan)
    objective = found["kl_text"] + 20 * ANSWER_KL_WEIGHT * found["kl_answer"]
    assert objective == pytest.approx(min(trial.objective for trial in trials if trial.accepted), rel=1e-6)


def test_no_evaluation_is_the_searchs_own_plan(model: PreTrainedModel, profile: Profile) -> None:
    plan, trials = refine(model, profile, question(), samples(96, 1), evaluations=0)
    table, solution = find_choice(profile, question())
    assert trials == []
    assert plan == write_plan(profile, question(), table, solution.choice, solution)


def test_refinement_is_the_same_every_time(model: PreTrainedModel, profile: Profile) -> None:
    first, second = (refine(model, profile, question(), samples(70, 2), evaluations=4)[0] for _ in range(2))
    assert first.sha256 == second.sha256


def test_validated_proxies_rank_plans(model: PreTrainedModel, profile: Profile) -> None:
    held_out = samples(96, 2, seed=2)
    found = validate_proxies(model, profile, held_out, num_plans=24, seed=0)
    assert len(found.plans) == 24
    assert {"combined", "text", "answer", "density"} <= set(found.tau)
    assert all(-1 <= value <= 1 for row in found.tau.values() for value in row.values() if np.isfinite(value))
    assert found.tau["combined"]["kl_text"] > 0.5, "even random weights: the proxy knows what costs"
    again = validate_proxies(model, profile, held_out, num_plans=24, seed=0)
    assert again.plans == found.plans
    assert validate_proxies(model, profile, held_out, num_plans=24, seed=1).plans != found.plans


def test_too_few_plans_prove_nothing(model: PreTrainedModel, profile: Profile) -> None:
    with pytest.raises(SpecError, match="at least 10 plans"):
        validate_proxies(model, profile, samples(96, 1), num_plans=9)


def test_a_profile_longer_than_the_context_is_refused(tiny: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    short = tiny("llama", max_position_embeddings=64)
    sets = {96: Calibration(tuple(samples(96, 1)), "tests")}
    request = Request(describe(short, "tiny"), SearchSpace.parse(SPACE, where="tests"), sets)
    with pytest.raises(SpecError, match=r"at most 64 tokens.*got 96"):
        profile_model(short, request, tmp_path / "profile")
    assert not (tmp_path / "profile").exists()


def test_budgets_are_checked_at_every_profiled_length(profile: Profile) -> None:
    asked = Question((Budget("density", 0.5, (96,)),))
    table, solution = find_choice(profile, asked)
    plan = write_plan(profile, asked, table, solution.choice, solution)
    assert set(plan.budgets[0].predicted) == {"96"}
    assert plan.budgets[0].predicted["96"] <= 0.5


def test_only_a_clear_improvement_is_accepted() -> None:
    best = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert clearly_less(best - 0.5, best)
    assert not clearly_less(best + torch.tensor([-3.0, 1.0, 1.0, 0.9]), best), "one lucky sequence is no improvement"
    assert clearly_less(best[:1] - 0.1, best[:1])
    assert not clearly_less(best, best)


PUBLISHED_SPACE = """
name: published
source: tests
description: rules of four methods
block_tokens: 16
unit: query_head
candidates:
  - {kind: sink_window, sink: 16, window: [16, {b: 0.5}]}
  - {kind: vertical_slash, vertical: 16, slash: 16}
  - {kind: pooled_topk, keep: {b: 0.3}}
  - {kind: flex_prefill, gamma: [0.5, 0.9], min_budget: 0, probe: 16}
  - {kind: antidiagonal, mass: [0.5, 0.9], stride: 8}
  - {kind: zero}
"""


@pytest.fixture(scope="module")
def published(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    calibrations = {96: Calibration(tuple(samples(96, 2)), "tests")}
    request = Request(
        describe(model, "tiny"), SearchSpace.parse(PUBLISHED_SPACE, where="tests"), calibrations, num_probes=1
    )
    return profile_model(model, request, tmp_path_factory.mktemp("published") / "profile")


@pytest.mark.parametrize(
    ("objective", "unit", "kinds", "proxy"),
    [
        ("minference", "query_head", {"sink_window", "vertical_slash", "pooled_topk"}, "dropped_mass"),
        ("duo", "kv_group", {"sink_window"}, "answer"),
        ("flexprefill", "query_head", {"flex_prefill"}, "dropped_mass"),
        ("xattention", "query_head", {"antidiagonal"}, "dropped_mass"),
    ],
)
def test_published_objectives_choose_among_their_own_rules(
    published: Profile, objective: str, unit: str, kinds: set[str], proxy: str
) -> None:
    question = Question(parse_budgets(["density=0.8"]), granularity=unit, objective=objective)
    table, solution = find_choice(published, question)
    plan = write_plan(published, question, table, solution.choice, solution)
    assert set(plan.kind_counts()) <= kinds | {"dense"}
    assert plan.kind_counts().keys() & kinds, "the budget cannot be met by dense attention"
    ours = score_table(published, Question((), granularity=unit, objective=proxy)).loss
    assert np.array_equal(table.loss[table.valid], ours[table.valid]), "its loss is that proxy"


def test_published_objectives_say_what_they_lack(published: Profile, profile: Profile) -> None:
    with pytest.raises(SpecError, match=r"objective 'duo' decides per kv_group. Pass --unit kv_group"):
        score_table(published, Question((), objective="duo"))
    with pytest.raises(
        SpecError, match=r"objective 'xattention' must have rules of its method.*Profile again with --space xattention"
    ):
        score_table(profile, Question((), objective="xattention"))
