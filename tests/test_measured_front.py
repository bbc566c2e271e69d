"""A row of densities is measured family by family, and goes on where it was interrupted. What judging finds is borrowed from a shipped record."""

from collections.abc import Mapping
from typing import Any

import pytest

from sparsesearch import measured_front
from sparsesearch.errors import SpecError
from sparsesearch.evaluate import Metrics
from sparsesearch.evaluate.run import provenance
from sparsesearch.measured_front import measure_front
from sparsesearch.plan import Plan
from sparsesearch.presets import preset_path
from sparsesearch.profiling.record import Profile

RECORD = Metrics.load(preset_path("profiles", "needle-7m-metrics"))
LENGTH = RECORD.lengths_tokens[-1]
COUNT = RECORD.at(LENGTH, "dense").kl_text.num_sequences


class Judged:
    """Stands in for `evaluate`; remembers which plans it was given."""

    def __init__(self) -> None:
        self.plans: list[list[str]] = []

    def __call__(self, model: Any, tokenizer: Any, plans: Mapping[str, Plan], **given: Any) -> Metrics:
        self.plans.append(list(plans))
        for number in range(len(plans) + 1):
            given["progress"]("judged", number, len(plans))
        cells = {name: RECORD.at(LENGTH, "dense") for name in ("dense", *plans)}
        sums = {name: plan.sha256 for name, plan in plans.items()}
        stated = provenance(model, given["seed"], given["command"])
        return Metrics(model=given["model_name"], results={LENGTH: cells}, plans=sums, data={}, provenance=stated)


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Judged:
    found = Judged()
    monkeypatch.setattr(measured_front, "evaluate", found)
    return found


@pytest.fixture
def asked(needle_7m: Any) -> dict[str, Any]:
    profile = Profile.load(preset_path("profiles", "needle-7m"))
    return {
        "model": needle_7m, "tokenizer": None, "profile": profile, "families": ["MoA", "uniform window"], "densities": [0.5, 0.35],
        "lengths": [LENGTH], "num_sequences": COUNT, "command": "front",
    }  # fmt: skip


def test_an_interrupted_front_goes_on_with_the_families_that_are_missing(asked: dict[str, Any], judged: Judged) -> None:
    saved, told = list[Metrics](), list[tuple[str, int, int]]()

    def interrupted(metrics: Metrics) -> None:
        saved.append(metrics)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_front(**asked, saved=interrupted)
    assert list(saved[0].plans) == ["MoA @ 0.5", "MoA @ 0.35"]
    whole = measure_front(**asked, progress=lambda *at: told.append(at))
    assert [at[1] for at in told] == sorted(at[1] for at in told), "one bar for all families"
    assert told[-1] == ("judged", 900, 900)
    judged.plans.clear()
    assert measure_front(**asked, begun=saved[0]) == whole
    assert [{name.partition(" @ ")[0] for name in plans} for plans in judged.plans] == [{"uniform window"}]
    assert measure_front(**asked, begun=whole) == whole
    assert len(judged.plans) == 1


def test_metrics_of_other_sequences_are_not_gone_on_from(asked: dict[str, Any], judged: Judged) -> None:
    begun = measure_front(**{**asked, "families": ["MoA"]})
    with pytest.raises(SpecError, match=rf"num_sequences \[{COUNT + 1}\], but are of \[{COUNT}\]"):
        measure_front(**{**asked, "num_sequences": COUNT + 1}, begun=begun)
