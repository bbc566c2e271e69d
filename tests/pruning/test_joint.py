"""One search over attention rules and removals: never worse than either alone, within its budget, and runnable."""

from contextlib import suppress

import pytest
import torch
from pruning_models import batches_for, tiny_model

from sparsesearch.calibration import Calibration, Sample
from sparsesearch.cost import load_cost_model
from sparsesearch.errors import BudgetInfeasibleError, SpecError
from sparsesearch.profiling.run import Request, profile_model
from sparsesearch.pruning.apply import PrunedApply
from sparsesearch.pruning.joint import find_joint
from sparsesearch.pruning.profile_run import PruningRequest, profile_pruning
from sparsesearch.pruning.search import PruningQuestion
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.sink_window import SinkWindow
from sparsesearch.rules.zero import Zero
from sparsesearch.runtime.fingerprint import describe
from sparsesearch.search.budget import parse_budgets
from sparsesearch.search_space import PruningMenu, SearchSpace

LENGTH = 96


@pytest.fixture(scope="module")
def profiles(tmp_path_factory):
    """A tiny model with both parts of a profile."""
    model, folder = tiny_model("llama"), tmp_path_factory.mktemp("joint")
    rules = (Dense(), SinkWindow(sink=16, window=16), SinkWindow(sink=16, window=48), Zero())
    space = SearchSpace("joint", "test", "test", 16, "query_head", rules)
    generator = torch.Generator().manual_seed(0)
    samples = tuple(
        Sample(torch.randint(1, 64, (LENGTH,), generator=generator), torch.zeros(LENGTH, dtype=torch.bool), "random")
        for _ in range(2)
    )
    request = Request(describe(model, "tiny"), space, {LENGTH: Calibration(samples, "random")}, num_probes=2)
    attention = profile_model(model, request, folder / "attention")
    menu = PruningMenu(channel_multiple=16, measured_options=1)
    batches = batches_for(model, tokens=LENGTH)
    cuts = profile_pruning(model, PruningRequest("tiny", menu, batches, batches[:1], {}, num_probes=2), folder / "cuts")
    return model, cuts, attention


@pytest.mark.parametrize("budget", ["latency=0.6x", "flops=0.7,params=0.85", "density=0.5,params=0.8", "memory=0.7"])
def test_joint_is_within_budget_and_never_worse_than_either_alone(profiles, budget):
    _, cuts, attention = profiles
    question = PruningQuestion(parse_budgets(budget), (LENGTH,), "reconstruction", load_cost_model("roofline:h100"))
    joint = find_joint(cuts, attention, question)
    for record in joint.budgets:
        assert max(record.predicted.values()) <= record.bound + 1e-9
    compared = 0
    for only in ({"allow_cuts": False}, {"allow_rules": False}):
        with suppress(BudgetInfeasibleError):  # rules alone remove no parameter
            alone = find_joint(cuts, attention, question, **only)
            assert joint.certificate.loss <= alone.certificate.loss * (1 + 1e-4) + 1e-12
            assert (set(alone.kind_counts()) <= {"dense"}) if "allow_rules" in only else not alone.pruning.layers
            compared += 1
    assert compared >= 1


def test_a_joint_plan_runs(profiles):
    model, cuts, attention = profiles
    plan = find_joint(
        cuts, attention, PruningQuestion(parse_budgets("density=0.5,params=0.7"), (LENGTH,), "reconstruction")
    )
    assert plan.pruning.layers
    assert set(plan.kind_counts()) - {"dense"}
    ids = torch.randint(1, 64, (1, LENGTH), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        dense = model(ids).logits
        with PrunedApply([])(model, plan):
            assert not torch.equal(model(ids).logits, dense)
        assert torch.equal(model(ids).logits, dense)


def test_profiles_of_other_models_or_metrics_are_refused(profiles):
    _, cuts, attention = profiles
    with pytest.raises(SpecError, match="joint budget"):
        find_joint(cuts, attention, PruningQuestion(parse_budgets("kv_fraction=0.5"), (LENGTH,)))
    with pytest.raises(SpecError, match="profiled ones"):
        find_joint(cuts, attention, PruningQuestion(parse_budgets("params=0.5"), (64,)))
