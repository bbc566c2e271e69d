"""Which plan the family on trial takes, what a step may change, and where steps begin."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tiny_comparison import LENGTH, TilePrices
from transformers import PreTrainedModel

from sparsesearch.bench.families import random_samples
from sparsesearch.equal_latency.climb import Rung
from sparsesearch.equal_latency.improve import is_worth_steps, starts_of
from sparsesearch.equal_latency.ladders import SearchedLadder, ladders
from sparsesearch.equal_latency.standings import Standing, chosen, improves, leads
from sparsesearch.equal_latency.steps import SHARES, Steps
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
        "MoA", Standing("", space, rung, torch.zeros(1), torch.zeros(1))
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


NOISE = torch.tensor([0.1, -0.1, 0.1, -0.1])
"""Of four sequences' losses, with a standard error of its mean of 0.058."""


def standing(text: float, at: float, noise: float = 0.0, answer_noise: float = 0.0, label: str = "") -> Standing:
    """A plan's losses over all positions and at answers, on four sequences."""
    rung: Any = SimpleNamespace(plan=SimpleNamespace(assignments=label))
    losses = torch.full((4,), text) + noise * NOISE
    return Standing(label, rung, rung, losses + at + answer_noise * NOISE, losses)


@pytest.mark.parametrize(
    ("new", "is_better"),
    [
        (standing(0.9, 0.5), True),
        (
            standing(0.9, 0.5, answer_noise=5.0),
            True,
        ),  # the loss falls by less than its noise, its part over all positions by more
        (standing(1.0, 0.4), True),
        (standing(1.01, 0.1), False),  # better at answers, worse everywhere else
        (standing(0.9, 0.7), False),
        (standing(0.98, 0.48, noise=1.0), False),  # by less than the noise of either
        (standing(1.0, 0.5), False),
    ],
)
def test_a_step_is_taken_if_nothing_rises_and_something_clearly_falls(new: Standing, is_better: bool) -> None:
    assert improves(new, standing(1.0, 0.5)) == is_better


def test_a_plan_that_leads_is_taken_before_one_that_is_level_over_all_positions() -> None:
    """Though the other one's sum with the answers is less; level means within twice the paired standard error."""
    rival, level, ahead = standing(1.0, 1.0), standing(0.95, 0.1, noise=1.0), standing(0.8, 0.5, noise=1.0)
    assert not leads(level, [rival])
    assert leads(ahead, [rival])
    assert chosen([level, ahead, rival], [rival]) is ahead
    assert chosen([level, rival], [rival]) is level
    assert chosen([level, ahead], []) is level, "without rivals the sum decides"


def test_at_answers_a_plan_is_beaten_only_by_more_than_their_noise() -> None:
    """A rival that is better there by a hair does not bar a plan that loses an eighth less everywhere."""
    rival, ahead = standing(1.0, 0.12), standing(0.88, 0.13, answer_noise=1.0)
    assert chosen([ahead, rival], [rival]) is ahead
    clearly_worse = standing(0.8, 0.25, answer_noise=1.0)
    assert chosen([clearly_worse, ahead, rival], [rival]) is ahead
    assert chosen([clearly_worse, rival], [rival]) is rival


@pytest.mark.parametrize(("own", "starts"), [(0.99, ["", ", from b"]), (0.5, [""])])
def test_the_family_on_trial_also_sets_out_from_the_best_rival_unless_it_leads(own: float, starts: list[str]) -> None:
    rivals = [
        standing(1.1, 0.0, label="a"),
        standing(1.0, 1.0, label="b"),
        standing(0.9, 1.0, label="not in its space"),
    ]
    steps: Any = SimpleNamespace(holding=lambda _, plan: None if plan.assignments == "not in its space" else ())
    found = starts_of("mixture", standing(own, 0.5, noise=1.0, label="own"), rivals, steps)
    assert list(found) == starts
    assert all(start.family == "mixture" and start.gives_way for start in found.values())


@pytest.mark.parametrize(("text", "at", "worth"), [(1.1, 5.0, True), (2.1, 0.0, True), (2.5, 1.0, False)])
def test_rivals_far_behind_are_left_as_they_are(text: float, at: float, worth: bool) -> None:
    """Behind in one of the two losses alone is not far."""
    assert is_worth_steps(standing(text, at), standing(1.0, 0.5)) == worth


def test_where_the_rivals_plan_is_its_own_it_sets_out_once() -> None:
    shared, steps = standing(1.0, 0.5, label="shared"), SimpleNamespace(holding=lambda *_: ())
    assert list(starts_of("mixture", shared, [shared], cast(Any, steps))) == [""]


def chosen_among(parts: Mapping[str, tuple[float, float]], rivals: Mapping[str, tuple[float, float]]) -> str:
    rung: Any = None

    def standings(given: Mapping[str, tuple[float, float]]) -> list[Standing]:
        return [
            Standing(name, rung, rung, torch.tensor([text + at]), torch.tensor([text]))
            for name, (text, at) in given.items()
        ]

    theirs = standings(rivals)
    return chosen([*standings(parts), *theirs], theirs).label
