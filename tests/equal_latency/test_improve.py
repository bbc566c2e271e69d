"""Rounds of steps: who takes part, whose proposals count, and who has the last word. Ladders, clock and judge are stand-ins."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch

from sparsesearch.equal_latency import improve
from sparsesearch.equal_latency.climb import Rung
from sparsesearch.equal_latency.menus import ANSWERS
from sparsesearch.equal_latency.standings import Judge, Standing
from sparsesearch.equal_latency.steps import Steps

NOISE = torch.tensor([0.125, -0.125, 0.125, -0.125], dtype=torch.float64)


def standing(label: str, text: float, at: float = 0.125, share: float = 0.5) -> Standing:
    losses = torch.full((4,), text, dtype=torch.float64) + NOISE
    plan: Any = SimpleNamespace(assignments=label)
    return Standing(label, cast(Any, label), Rung(0.5, plan, share), losses + at, losses)


class Model:
    """Every family has one proposal per start and round, whose loss and share are told; it remembers what was asked."""

    def __init__(self, proposals: Mapping[str, tuple[float, float, float]]) -> None:
        self.proposals, self.asked, self.gave_way = proposals, list[str](), list[str]()

    def holding(self, family: str, plan: Any) -> tuple[()]:
        return ()

    def ladders(self, family: str, start: Standing) -> tuple[dict[float, Any], float]:
        self.asked.append(f"{family} from {start.label}")
        return {0.1: f"{family} from {start.label}"}, 0.5

    def climb(
        self, ladder_of: Mapping[str, Any], begin: Mapping[str, float], favoured: Sequence[str]
    ) -> dict[str, Rung]:
        self.gave_way += favoured
        return {label: Rung(0.5, ladder_of[label], self.proposals[ladder_of[label]][2]) for label in ladder_of}

    def standing(self, family: str, label: str, ladder: Any, rung: Rung) -> Standing:
        text, at, share = self.proposals[ladder]
        return standing(ladder, text, at, share)


def improved(model: Model, standings: Mapping[str, Standing]) -> dict[str, Standing]:
    judge = SimpleNamespace(standing=model.standing, tried={"mixture": {}})
    return improve.improved(
        standings,
        [standings["mixture"]],
        cast(Steps, model),
        cast(Judge, judge),
        model.climb,
        first="mixture",
        num_steps=3,
        fast=lambda rung, gives_way: rung.share <= (0.5 if gives_way else 0.51),
        deadline=float("inf"),
        progress=lambda stage, done, total: None,
    )


def test_the_family_on_trial_answers_what_a_rival_has_become() -> None:
    """MoA overtakes in its step; the mixture sets out from its own plan and from MoA's new one, and goes on until nothing helps."""
    model = Model(
        {
            "MoA from MoA": (0.75, 0.125, 0.5),
            "MoA from MoA from MoA": (0.90625, 0.125, 0.5),
            "mixture from own": (0.875, 0.125, 0.5),
            "mixture from MoA from MoA": (0.625, 0.125, 0.5),
            "mixture from mixture from MoA from MoA": (0.6875, 0.125, 0.5),
        }
    )
    found = improved(model, {"MoA": standing("MoA", 1.0), "mixture": standing("own", 0.9375)})
    assert found["MoA"].label == "MoA from MoA"
    assert found["mixture"].label == "mixture from MoA from MoA"
    assert model.asked == [
        "MoA from MoA",
        "mixture from own",
        "mixture from MoA from MoA",
        "MoA from MoA from MoA",
        "mixture from mixture from MoA from MoA",
    ]
    assert all(", MoA" not in label for label in model.gave_way), "only the family on trial gives way"


def test_proposals_that_take_more_time_are_not_compared() -> None:
    """A rival may be the next slower one, within limits."""
    slow = {"MoA from MoA": (0.5, 0.125, 0.52), "mixture from own": (0.5, 0.125, 0.505)}
    found = improved(Model(slow), {"MoA": standing("MoA", 1.0), "mixture": standing("own", 0.90625)})
    assert {family: one.label for family, one in found.items()} == {"MoA": "MoA", "mixture": "own"}
    fast = {
        "MoA from MoA": (0.9375, 0.125, 0.505),
        "MoA from MoA from MoA": (1.0, 0.125, 0.5),
        "mixture from own": (0.90625, 0.125, 0.5),
    }
    assert improved(Model(fast), {"MoA": standing("MoA", 1.0), "mixture": standing("own", 0.90625)})["MoA"].label == (
        "MoA from MoA"
    )


def test_plans_for_answers_step_by_their_own_loss_and_far_rivals_do_not() -> None:
    model = Model(
        {
            f"{ANSWERS} from for answers": (4.0, 0.125, 0.5),
            f"{ANSWERS} from {ANSWERS} from for answers": (5.0, 0.125, 0.5),
            "mixture from own": (1.0, 0.125, 0.5),
        }
    )
    found = improved(
        model,
        {
            "DuoAttention": standing("far", 9.0),
            ANSWERS: standing("for answers", 3.0, 9.0),
            "mixture": standing("own", 0.90625),
        },
    )
    assert found["DuoAttention"].label == "far"
    assert found[ANSWERS].label == f"{ANSWERS} from for answers"
    assert found["mixture"].label == "own"
    assert not any("far" in asked for asked in model.asked)
