"""Refined cuts: the best of the tilts on data set aside, within the budget; deeper layers are spared the more the losses are tilted."""

from dataclasses import replace

import pytest
from pruning_models import batches_for, tiny_model

from sparsesearch.cut import Compensation
from sparsesearch.errors import SpecError
from sparsesearch.pruning.compensate import compensate
from sparsesearch.pruning.live import narrowed
from sparsesearch.pruning.profile_run import PruningRequest, profile_pruning
from sparsesearch.pruning.quality import dense_rows, mean_distance
from sparsesearch.pruning.refine import TILTS, refine_cut
from sparsesearch.pruning.search import PruningQuestion, find_cut
from sparsesearch.search.budget import Budget
from sparsesearch.search_space import PruningMenu

REFIT = Compensation(data="text", length_tokens=33, num_samples=8, seed=0, bias=True)
QUESTION = PruningQuestion((Budget("params", 0.7),), (33,), "reconstruction", compensation=REFIT)


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    model, folder = tiny_model("bert"), tmp_path_factory.mktemp("refine")
    batches = batches_for(model)
    menu = PruningMenu(channel_multiple=8, measured_options=1)
    return model, profile_pruning(model, PruningRequest("tiny", menu, batches, batches[:1], {}, num_probes=2), folder)


@pytest.mark.parametrize("refit", [REFIT, None])
def test_the_plan_is_the_one_nearest_to_dense_on_the_batches_set_aside(profiled, refit):
    model, profile = profiled
    question, batches = replace(QUESTION, compensation=refit), batches_for(model, count=8, seed=3)
    plan, trials = refine_cut(model, profile, question, batches, evaluations=3)
    aside, rest = batches[3::4], [batch for number, batch in enumerate(batches) if number % 4 != 3]
    dense, distances = dense_rows(model, aside), {}
    for tilt in TILTS[:3]:
        own = find_cut(profile, question, tilt=tilt)
        with narrowed(model, own.pruning, compensate(model, own.pruning, rest) if refit else {}):
            distances[tilt] = mean_distance(model, aside, dense)
        assert max(own.budgets[0].predicted.values()) <= 0.7
    best = min(distances, key=distances.__getitem__)
    assert plan.pruning == find_cut(profile, question, tilt=best).pruning
    assert trials[0].tilt == 0, "what the table says is always tried"
    assert {trial.tilt: trial.distance for trial in trials}.items() <= distances.items()


def test_a_tilt_moves_the_cut_towards_the_first_layers_and_says_so(profiled):
    _, profile = profiled

    def depth(tilt):
        """Mean layer of what goes."""
        plan = find_cut(profile, QUESTION, tilt=tilt)
        assert ("tilt" in plan.certificate.objective) == bool(tilt)
        gone = {
            index: 8 * len(own.removed_heads) + len(own.removed_channels) for index, own in plan.pruning.layers.items()
        }
        return sum(index * count for index, count in gone.items()) / sum(gone.values())

    assert depth(3.0) < depth(0.0) < depth(-3.0)


def test_too_little_data_is_refused(profiled):
    model, profile = profiled
    with pytest.raises(SpecError, match="4 batches"):
        refine_cut(model, profile, QUESTION, batches_for(model), evaluations=1)
