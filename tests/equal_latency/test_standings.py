"""Which plan the family on trial takes, and what a step may change."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tiny_comparison import LENGTH, TilePrices
from transformers import PreTrainedModel

from sparsesearch.bench.families import random_samples
from sparsesearch.equal_latency.climb import Rung
from sparsesearch.equal_latency.ladders import SearchedLadder, ladders
from sparsesearch.equal_latency.standings import SHARES, Standing, Steps, chosen
from sparsesearch.profiling.record import Profile
from sparsesearch.workload import Workload


def test_a_step_changes_no_more_units_than_it_may(model: PreTrainedModel, profile: Profile) -> None:
    """Whatever the scale of the losses, and at the bound that allows the present plan."""
    space = ladders(profile, ["MoA"], Workload(LENGTH, batch=8), TilePrices())["MoA"]
    assert isinstance(space, SearchedLadder)
    plan = space.at(0.8)
    now = space.choice_of(plan)
    assert now is not None
    samples = random_samples(64, LENGTH, 1, seed=3)
    rung = Rung(0.8, plan, 0.8)
    found = Steps(model, profile, {"MoA": (space,)}, samples).ladders(
        "MoA", Standing("", space, rung, torch.zeros(1), 0.0)
    )
    assert found is not None
    made, bound = found
    assert list(made) == list(SHARES)
    for share, ladder in made.items():
        choice = ladder.choice_of(ladder.at(bound))
        assert choice is not None
        assert (choice != now).mean() <= share
        assert ladder.bound_of(choice) <= bound + 1e-9


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"a": (0.9, 0.9), "b": (0.5, 0.8)}, "b"),
        ({"a": (0.9, 0.9), "b": (1.1, 0.1)}, "a"),
        ({"a": (0.9, 1.5), "b": (1.2, 0.1)}, "rival"),
        ({"a": (1.1, 0.1)}, "rival"),
    ],
)
def test_nothing_is_taken_that_a_rival_beats_in_one_way(parts: dict[str, tuple[float, float]], expected: str) -> None:
    """Losses over all positions and at answers; the rival's are 1 and 1, so it can always be taken itself."""
    assert chosen_among(parts, {"rival": (1.0, 1.0)}) == expected


def test_text_counts_first_where_different_rivals_lead() -> None:
    rivals = {"text": (0.5, 2.0), "answers": (2.0, 0.5)}
    assert chosen_among({"a": (0.5, 1.0), "b": (0.4, 1.5), "c": (0.6, 0.1)}, rivals) == "a"


def chosen_among(parts: Mapping[str, tuple[float, float]], rivals: Mapping[str, tuple[float, float]]) -> str:
    rung: Any = None

    def standings(given: Mapping[str, tuple[float, float]]) -> list[Standing]:
        return [Standing(name, rung, rung, torch.tensor([text + at]), text) for name, (text, at) in given.items()]

    theirs = standings(rivals)
    return chosen([*standings(parts), *theirs], theirs).label
